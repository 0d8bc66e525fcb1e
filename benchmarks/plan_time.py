"""How long does ``plan`` take from the shell, and are its numbers those of another checkout?

    python benchmarks/plan_time.py --other ../main-of-before

Every combination that both know, for four models, with an empty cache: this checkout's command as it is, then counting
all anew (``--recount``), and the other one's, with the same installed libraries. Runs that the result has of the same
two commits are not made again.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CALLS = {
    "google-bert/bert-base-uncased": ["--batch", "64", "--budget", "8GiB"],
    "google/vit-large-patch16-224": ["--batch", "64", "--budget", "8GiB"],
    "meta-llama/Llama-2-7b": ["--batch", "8", "--budget", "80GiB"],
    "mistralai/Mistral-7B-v0.1": ["--batch", "8", "--budget", "80GiB"],
}
OPTIMS = ("sgd", "adamw", "adamw8bit", "galore-adamw", "galore-adamw8bit", "galore-adafactor")
SAME = (
    "train", "save", "optim", "status", "peak_bytes", "ledger_bytes", "host_bytes", "ddp_bucket_bytes",
    "fsdp_gathered_bytes", "trained_parameters", "flops", "largest_batch",
)  # fmt: skip


def run(checkout: Path, words: list[str], cache: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds from the shell, by the clock and of processors, and what the command printed as JSON."""
    sources = [str(p) for p in (*sorted(checkout.glob("packages/*/src")), checkout / "apps" / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources), "XDG_CACHE_HOME": cache}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", "from memtrain_apps.cli import plan; plan()", *words, "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": round(seconds, 3), "processors": round(busy, 3)}, json.loads(done.stdout)


def numbers(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What must be equal, in the order of the axes' names."""
    found = [{k: c.get(k) for k in SAME} for c in content["combinations"]]
    return sorted(found, key=lambda c: (c["train"], c["save"], c["optim"]))


def head_of(checkout: Path) -> str:
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(git, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    """Time every call, and write ``results/plan_time.json`` after each."""
    import torch
    from memtrain_common.measuring.bench import write_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of another commit")
    parser.add_argument("--models", nargs="+", default=list(CALLS))
    parser.add_argument("--runs", type=int, default=5, help="of this checkout's command as it is; of the slow ones, 1")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan_time.json")
    flags = parser.parse_args()
    commits = [head_of(ROOT), head_of(flags.other)]
    known = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    calls: dict[str, Any] = known["calls"] if known.get("commits") == commits else {}
    for name in flags.models:
        found = calls.setdefault(name, {"runs": []})
        call = ["--model", name, *CALLS[name], "--gpus", "8", "--optim", *OPTIMS]
        while len(found["runs"]) < flags.runs:
            with tempfile.TemporaryDirectory() as cache:
                seconds, mine = run(ROOT, call, cache)
                found["runs"].append(seconds)
                if "other" not in found:
                    found["recounted"], anew = run(ROOT, [*call, "--recount"], cache)
                    found["other"], theirs = run(flags.other, call, cache)
                    found["equal"] = numbers(mine) == numbers(anew) == numbers(theirs)
                    found["combinations"] = len(mine["combinations"])
            for kind in ("clock", "processors"):
                median = statistics.median(r[kind] for r in found["runs"])
                found[f"times_faster_by_{kind}"] = round(found["other"][kind] / median, 1)
                found[f"times_faster_recounted_by_{kind}"] = round(found["other"][kind] / found["recounted"][kind], 2)
            print(name, found, flush=True)
            write_results(
                flags.out, argv=["python", "benchmarks/plan_time.py", "--other", "CHECKOUT"],
                device=torch.device("cpu"), seeds=[], commits=commits, calls=calls,
            )  # fmt: skip


if __name__ == "__main__":
    main()
