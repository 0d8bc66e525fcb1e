"""What a finished run has to tell, as a file beside its metrics: ``--figures`` and other readers take it from there."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from memtrain_common.errors import UserError
from memtrain_common.files import write_json
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.loop import FitResult

SUMMARY = "summary.json"


def write_summary(run: RunFolder, result: FitResult, *, trained: int, total: int) -> None:
    """Write ``summary.json``: steps, losses, parameters, seconds, peak bytes, joules (null where unavailable)."""
    content: dict[str, Any] = {
        "steps": result.step,
        "evaluation": result.evaluation,
        "best": {"step": result.best[0], "loss": result.best[1]} if result.best else None,
        "trained_parameters": trained,
        "parameters": total,
        "training_seconds": round(result.seconds, 3),
        "tokens_per_second": round(result.units_per_second, 1),
        "peak_bytes": result.peak_bytes,
        "joules": result.joules,
    }
    if run.writes:
        write_json(run.path / SUMMARY, content)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run as figures see it."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    memory: dict[str, Any]
    """``memory.json``: bytes by category under "totals"."""
    metrics: list[dict[str, Any]]

    @property
    def step_bytes(self) -> int:
        """Bytes that a training step holds, by the ledger."""
        return sum(self.memory["totals"].values())

    @property
    def replaced(self) -> str:
        """Which layers have heads."""
        if self.config["method"] == "full":
            return "none (full)"
        kinds = [name for name, key in (("attention", "skip_attn"), ("MLP", "skip_mlp")) if not self.config[key]]
        return " + ".join(kinds)


def read_finished(path: Path) -> Finished:
    """A finished run.

    Raises:
        UserError: if it is none, or is not finished.
    """
    run = RunFolder.open(path, writes=False)
    config = run.read_config()["config"]
    files = {}
    for name in (SUMMARY, "memory.json"):
        if not (path / name).exists():
            raise UserError(f"{path} has no {name}: it is not finished; go on with it by --resume {path}")
        files[name] = json.loads((path / name).read_text())
    known = {"method": "lte", "skip_attn": False, "skip_mlp": False, **config}
    return Finished(path, known, files[SUMMARY], files["memory.json"], run.metrics())
