"""How far do the loss curves of one process and of two part, and which parameters are why?

    python benchmarks/lte_curve.py [--work DIR]

Trains lte-train's default for 40 steps without warm-up, on 1 and on 2 processes (gloo) with the same seed, and compares
the losses of every step. Two ways: everything beside the heads is shared, as by default, or it is frozen. Only shared
parameters have a gradient that is a sum over all tokens, which two processes add in two parts. What was trained is kept
in the work folder, and a second call goes on behind it.
"""

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import lte.tasks.train  # noqa: F401  # once, before processes are forked
import torch
from memtrain_common.measuring.bench import write_results

RESULT = Path(__file__).parent / "results" / "lte_curve.json"
STEPS, SEEDS = 40, (1337, 1, 2)
# Way -> flags, seeds.
WAYS: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "frozen": (["--lte-trainable"], SEEDS[:1]),
    "shared": ([], SEEDS),
}
COMMON = [
    "--max-iters", str(STEPS), "--warmup-iters", "0", "--eval-interval", str(STEPS), "--eval-iters", "1",
    "--log-interval", "1", "--sample-tokens", "0", "--tracker", "none", "--device", "cpu",
]  # fmt: skip


def losses(folder: Path, words: list[str], processes: int) -> list[float]:
    """Training losses of every step."""
    run = folder / str(processes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    argv = [*words, *COMMON, "--out", str(run)]
    ranks = [context.Process(target=_rank, args=(r, processes, port, argv)) for r in range(processes)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row["loss"] for row in rows if row["split"] == "train"]
    assert len(found) == STEPS
    return found


def _rank(rank: int, size: int, port: int, argv: list[str]) -> None:
    from lte.cli import train

    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in told.items()}, MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    train(argv)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "memtrain-lte-curve")
    journal = parser.parse_args().work / "trained.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for way, (words, seeds) in WAYS.items():
        found[way] = []
        for seed in seeds:
            row = next((r for r in done if (r["way"], r["seed"]) == (way, seed)), None)
            if row is None:
                row = {"way": way, "seed": seed, **compare([*words, "--seed", str(seed)])}
                with journal.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            found[way].append({k: v for k, v in row.items() if k != "way"})
            print(row, flush=True)
    write_results(
        RESULT,
        argv=["python", "benchmarks/lte_curve.py"],
        device=torch.device("cpu"),
        seeds=SEEDS,
        steps=STEPS,
        largest={way: max(row["largest"] for row in rows) for way, rows in found.items()},
        runs=found,
    )


def compare(words: list[str]) -> dict[str, Any]:
    """How far the losses of one process and of two are from each other."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = (losses(Path(folder), words, n) for n in (1, 2))
    apart = [abs(a - b) for a, b in zip(one, two, strict=True)]
    return {"largest": max(apart), "last": apart[-1], "first_step_apart": _first(apart)}


def _first(apart: list[float]) -> int | None:
    """The first step, from 1, whose losses differ."""
    return next((i for i, difference in enumerate(apart, start=1) if difference), None)


if __name__ == "__main__":
    main()
