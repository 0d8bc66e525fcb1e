"""What does lte-train without flags take, and how far is it from full training on the same batches?

    uv run python benchmarks/lte_default_run.py [--seeds 1337 1 2]

Runs the command as a person does (its whole time, start and pictures included), then with --compare-full for every
seed, and keeps losses, ledger, rate and the picture that the README shows.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memtrain_common.data.text.corpus import load_corpus, ngram_entropies
from memtrain_common.measuring.bench import write_results

HERE = Path(__file__).parent
RESULT, PICTURE = HERE / "results" / "lte_default_run.json", HERE / "results" / "lte_default_loss.png"
COMMAND = Path(sys.executable).parent / "lte-train"


def run(folder: Path, *flags: str) -> float:
    """Run lte-train to its end; -> seconds."""
    began = time.perf_counter()
    subprocess.run([COMMAND, "--out", folder, *flags], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def last_loss(folder: Path) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "val"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        seconds = run(Path(place) / "alone")
        print(f"lte-train without flags: {seconds:.0f} s")
        for seed in options.seeds:
            folder = Path(place) / str(seed)
            run(folder, "--compare-full", "--seed", str(seed))
            lte, full = last_loss(folder), last_loss(folder / "full")
            rows.append({"seed": seed, "lte": round(lte, 4), "full": round(full, 4), "gap": round(lte / full - 1, 4)})
            print(f"seed {seed}: LTE {lte:.4f}, full {full:.4f} nats per byte, LTE {100 * (lte / full - 1):+.1f} %")
        first = Path(place) / str(options.seeds[0])
        shutil.copy(first / "loss.png", PICTURE)
        config = json.loads((first / "config.json").read_text())["config"]
        ledgers = {
            name: json.loads((folder / "memory.json").read_text())["totals"]
            for name, folder in (("lte", first), ("full", first / "full"))
        }
    corpus = load_corpus()
    unigram, bigram = ngram_entropies(np.concatenate([corpus.train, corpus.val]))
    gaps = [row["gap"] for row in rows]
    spread = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    write_results(
        RESULT,
        argv=["python", "benchmarks/lte_default_run.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=options.seeds,
        threads=torch.get_num_threads(),
        seconds_without_flags=round(seconds),
        unit="nats per byte, validation",
        runs=rows,
        mean_gap=round(statistics.mean(gaps), 4),
        standard_error_of_gap=None if spread is None else round(spread, 4),
        unigram_entropy=round(unigram, 4),
        bigram_entropy=round(bigram, 4),
        ledger_bytes=ledgers,
        config={k: v for k, v in config.items() if k not in ("out", "resume", "data_dir", "tokenizer_dir")},
    )


if __name__ == "__main__":
    main()
