"""``lora-xs glue --grid``: the combinations one after another, finished ones left alone, into one table."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memtrain_common.console import Console, format_table
from memtrain_common.data.text.glue import TASKS
from memtrain_common.errors import Stopped
from memtrain_common.runs.run_folder import RunFolder, default_run_path

from ..adapter_file import describe_adapter
from .glue import prepare, run_glue
from .glue_flags import GlueConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination over all seeds."""

    rank: int
    learning_rate: float
    head_learning_rate: float
    scores: dict[str, list[float]]
    """By metric, one a seed."""


def run_grid(config: GlueConfig, argv: Sequence[str]) -> list[Row]:
    """Train every cell that has no result yet, then write the table."""
    prepared = prepare(config)
    if config.resume:
        run = RunFolder.open(Path(config.resume))
    else:
        run = RunFolder.create(Path(config.out) if config.out else default_run_path("lora-xs-glue-grid"))
    folder = run.path
    config = dataclasses.replace(config, out=str(folder))
    run.write_config(
        config, prog="lora-xs", argv=["glue", *argv], data={"name": config.task, "sha256": prepared.sha256}
    )
    console = Console(folder / "log.txt")
    ranks: Sequence[int] = config.grid_ranks
    if config.from_adapter:
        ranks = (describe_adapter(config.from_adapter).config.rank,)
    rows = []
    for rank, lr, head_lr in itertools.product(ranks, config.grid_learning_rates, config.grid_head_learning_rates):
        scores: dict[str, list[float]] = {}
        for seed in config.grid_seeds:
            cell = folder / f"r{rank}-lr{lr:g}-head{head_lr:g}-seed{seed}"
            changed: dict[str, Any] = {"rank": rank, "learning_rate": lr, "head_learning_rate": head_lr, "seed": seed}
            for name, value in _cell(dataclasses.replace(config, grid=False, **changed), cell, argv, prepared).items():
                scores.setdefault(name, []).append(value)
        rows.append(Row(rank, lr, head_lr, scores))
        console.say(table(config.task, rows))
    (folder / "table.json").write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + "\n")
    (folder / "table.txt").write_text(table(config.task, rows) + "\n")
    console.say(f"grid folder {folder}")
    return rows


def _cell(config: GlueConfig, folder: Path, argv: Sequence[str], prepared: Any) -> dict[str, float]:
    """A finished cell's result, or that of training it (on)."""
    result = folder / "result.json"
    if result.is_file():
        return {name: json.loads(result.read_text())[name] for name in TASKS[config.task].metrics}
    begun = (folder / "config.json").is_file()
    config = dataclasses.replace(config, out=str(folder), resume=str(folder) if begun else "")
    try:
        return run_glue(config, argv, prepared)
    except Stopped as stop:
        raise Stopped(stop.signum, f"stopped by {stop.name}; go on with --resume {folder.parent}") from stop


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean (Student's t); NaN for a single value."""
    if len(values) < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _mean(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * interval(values):.2f}" if len(values) > 1 else mean


def table(task: str, rows: Sequence[Row]) -> str:
    """One line a combination: mean ± interval over seeds in hundredths; a star at the best mean of each rank."""
    metrics = TASKS[task].metrics
    best = {
        rank: max((r for r in rows if r.rank == rank), key=lambda r: statistics.mean(r.scores[metrics[0]]))
        for rank in {r.rank for r in rows}
    }
    lines: list[list[str]] = [["rank", "lr", "head lr", *metrics, "seeds", ""]]
    for row in rows:
        cells = [_mean(v) for v in row.scores.values()]
        n = str(len(row.scores[metrics[0]]))
        star = "*" if best[row.rank] is row else ""
        lines.append([str(row.rank), f"{row.learning_rate:g}", f"{row.head_learning_rate:g}", *cells, n, star])
    return format_table(lines)
