"""``lora-xs glue --grid``: the combinations one after another, finished ones left alone, into one table."""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memtrain_common.commands.result import read_result
from memtrain_common.commands.session import Session
from memtrain_common.console import format_table
from memtrain_common.data.text.glue import TASKS
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.models.encoders import model_parts

from ..adapter_file import describe_adapter
from .glue import prepare, train_glue
from .glue_flags import PROG, GlueConfig


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
    session = Session.begin(config, argv, prog=PROG)
    prepared = prepare(config)
    parts = {**prepared.parts, **model_parts(config.model)}
    session.open({"name": config.task, "sha256": prepared.sha256, "parts": parts})
    config, folder, say = session.config, session.folder.path, session.console.say
    ranks: Sequence[int] = config.grid_ranks
    if config.from_adapter:
        ranks = (describe_adapter(config.from_adapter).config.rank,)
    rows = []
    for rank, lr, head_lr in itertools.product(ranks, config.grid_learning_rates, config.grid_head_learning_rates):
        scores: dict[str, list[float]] = {}
        for seed in config.grid_seeds:
            cell = f"r{rank}-lr{lr:g}-head{head_lr:g}-seed{seed}"
            changed: dict[str, Any] = {"rank": rank, "learning_rate": lr, "head_learning_rate": head_lr, "seed": seed}
            found = _finished(folder / cell, config.task)
            if found is None:
                found = train_glue(session.beside(cell, replace(config, grid=False, **changed)), prepared)
            for name, value in found.items():
                scores.setdefault(name, []).append(value)
        rows.append(Row(rank, lr, head_lr, scores))
        say(table(config.task, rows))
    session.folder.taken_up()  # where every cell had been finished
    if session.place.is_main:
        (folder / "table.json").write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + "\n")
        (folder / "table.txt").write_text(table(config.task, rows) + "\n")
    say(f"grid folder {folder}")
    return rows


def _finished(folder: Path, task: str) -> dict[str, float] | None:
    """A finished cell's metrics; older ones have them at the top of their result."""
    content = read_result(folder)
    if content is None:
        return None
    scores = content.get("scores", {}).get("dev", content)
    return {name: scores[name] for name in TASKS[task].metrics}


def _mean(values: Sequence[float]) -> str:
    mean, half = mean_and_ci(values)
    return f"{100 * mean:.2f}" + (f" ± {100 * half:.2f}" if len(values) > 1 else "")


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
