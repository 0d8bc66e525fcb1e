"""What does ablate without arguments show, how long does it take, and does it repeat?

    uv run python benchmarks/ablation_digits.py            # the grid with 5 seeds: table, differences, picture
    uv run python benchmarks/ablation_digits.py rates      # the grid by which digits.toml's learning rates were chosen

The first runs the command as a person does, keeps a row a combination, and photographs the report's beginning where
PyQt6-WebEngine is installed (``uv run --with PyQt6-WebEngine``). Where a combination saves activations otherwise, its
accuracies are held, seed by seed, to those of the same training that saves everything. A second run, of the first seed
alone, must have the first's accuracies.
The command "rates" reads validation accuracy alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from memtrain_apps.ablate.results import Summary, read_results, summarise
from memtrain_apps.compose.axes import Axes
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.intervals import mean_and_ci
from photograph import photograph

RESULTS = Path(__file__).parent / "results"
COMMAND = Path(sys.executable).parent / "ablate"
CPU = torch.device("cpu")


@contextmanager
def kept_where_it_fails() -> Iterator[str]:
    """A folder that goes only when all went well."""
    place = tempfile.mkdtemp(prefix="ablation-")
    yield place
    shutil.rmtree(place)


def ablate(folder: Path, *words: str, after: Sequence[str] = ()) -> float:
    """Run the command to its end; -> seconds. ``after``: words that end it."""
    began = time.perf_counter()
    own = ["--devices", "cpu", "cpu", "--out", folder.name]
    subprocess.run([COMMAND, *words, *own, *after], cwd=folder.parent, check=True)
    return time.perf_counter() - began


def row(s: Summary) -> dict[str, Any]:
    mean, half = s.interval
    return {
        "combination": s.first["combination"],
        "lr": s.first["lr"],
        "test_accuracy": s.scores,
        "mean": round(mean, 4),
        "ci95": round(half, 4),
        "trained_parameters": s.trained,
        "memory_bytes": {"measured": s.measured, "predicted": s.predicted},
        "prediction_error": round(s.prediction_error, 5),
        "on_pareto_front": s.on_front,
        "seconds": round(s.seconds, 2),
        "samples_per_second": round(s.rate[0], 1),
        "command_of_seed_0": s.first["command"],
    }


def less_dense(s: Summary, among: list[Summary]) -> dict[str, float] | None:
    """Points of accuracy above the same training that saves everything, paired by seed: mean, half a 95 % interval."""
    axes = s.first["axes"]
    for dense in among:
        same = dense.first["axes"]
        if same["save"] == "all" and (same["train"], same["optim"]) == (axes["train"], axes["optim"]):
            mean, half = mean_and_ci([100 * (a - b) for a, b in zip(s.scores, dense.scores, strict=True)])
            return {"mean": round(mean, 2), "ci95": round(half, 2)}
    return None


def table() -> None:
    with kept_where_it_fails() as place:
        first, second = Path(place) / "first", Path(place) / "second"
        seconds = [ablate(first, "--seeds", "5"), ablate(second, "--seeds", "1")]
        found, again = ([s for s in summarise(read_results(p)) if s.runs] for p in (first, second))
        other = {s.first["combination"]: s.scores for s in again}
        write_results(
            RESULTS / "ablation_digits.json",
            argv=["python", "benchmarks/ablation_digits.py"],
            device=CPU,
            seeds=[r["seed"] for r in found[0].results],
            razor_mode=Axes().razor_mode,
            command_seconds=[round(s, 1) for s in seconds],
            same_accuracies_in_a_second_run={
                s.first["combination"]: other[s.first["combination"]] == s.scores[:1] for s in found
            },
            arms=[
                {**row(s), "points_above_everything_saved": less_dense(s, found)}
                for s in sorted(found, key=lambda s: s.rank)
            ],
        )
        photograph(first / "report.html", RESULTS / "ablation_report.png")


def rates() -> None:
    with kept_where_it_fails() as place:
        folder = Path(place) / "rates"
        ablate(folder, "digits-rates")
        found = json_rows(folder)
    by_rate: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for r in found:
        name = r["train"] if r["optim"] == "adamw" else f"{r['train']}+{r['optim']}"
        by_rate.setdefault(name, {}).setdefault(r["lr"], []).append(r)
    chosen = {name: min(rates, key=lambda lr: _of_all_seeds(rates[lr])) for name, rates in by_rate.items()}
    write_results(
        RESULTS / "ablation_digits_rates.json",
        argv=["python", "benchmarks/ablation_digits.py", "rates"],
        device=CPU,
        seeds=sorted({r["seed"] for r in found}),
        chosen_by="mean validation accuracy of the best checkpoints over the seeds, then their mean loss",
        chosen=chosen,
        arms=found,
    )
    print(json.dumps(chosen, indent=2))


def _of_all_seeds(rows: list[dict[str, Any]]) -> tuple[float, float]:
    return -sum(r["val_accuracy"] for r in rows) / len(rows), sum(r["val_loss"] for r in rows) / len(rows)


def json_rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "train": r["axes"]["train"],
            "optim": r["axes"]["optim"],
            "lr": r["lr"],
            "seed": r["seed"],
            "val_accuracy": round(r["val"], 4),
            "val_loss": round(r["scores"]["val"]["loss"], 4),
        }
        for r in read_results(folder)
        if r["status"] == "done"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["table", "rates"], default="table")
    {"table": table, "rates": rates}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
