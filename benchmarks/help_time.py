"""How long does ``--help`` of every installed memtrain command take?

    uv run python benchmarks/help_time.py [--repeats 15] [--out FILE]

The aim is under 0.5 s. Beside it stands ``python -c "import torch"``: what a command would take at least if it loaded
torch. Each repeat times all of them in turn.
"""

import argparse
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import torch
from memtrain_common.measuring.bench import write_results

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "help_time.json"


def seconds(words: Sequence[str | Path]) -> float:
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    names: list[str] = []
    for member in sorted([*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("apps/pyproject.toml")]):
        names += tomllib.loads(member.read_text())["project"].get("scripts", {})
    calls: dict[str, list[str | Path]] = {n: [Path(sys.executable).parent / n, "--help"] for n in names}
    calls["import torch"] = [sys.executable, "-c", "import torch"]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(options.repeats + 1):
        for name, words in calls.items():
            spent = seconds(words)
            if repeat:  # the first one fills the file cache
                times[name].append(spent)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:24} {median:.3f} s (from {min(times[name]):.3f} to {max(times[name]):.3f})")
    write_results(
        options.out,
        argv=["python", "benchmarks/help_time.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=[],
        unit="seconds, median",
        repeats=options.repeats,
        medians=medians,
    )


if __name__ == "__main__":
    main()
