"""Finished runs as ``--figures`` and other readers see them."""

import dataclasses
from pathlib import Path
from typing import Any

from memtrain_common.commands.result import RESULT, read_result
from memtrain_common.errors import UserError
from memtrain_common.files import read_json
from memtrain_common.runs.run_folder import RunFolder


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
    result = read_result(path) or _old_summary(path)
    if result is None or not (path / "memory.json").exists():
        name = RESULT if result is None else "memory.json"
        raise UserError(f"{path} has no {name}: it is not finished; resume it with --resume {path}")
    known = {"method": "lte", "skip_attn": False, "skip_mlp": False, **config}
    try:
        memory = read_json(path / "memory.json")
        sum(memory["totals"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'memory.json'} is not a memory ledger ({error}): leave {path} out") from None
    return Finished(path, known, result, memory, run.metrics())


def _old_summary(path: Path) -> dict[str, Any] | None:
    """What runs kept in ``summary.json`` before every command wrote ``result.json``, in the new one's words."""
    file = path / "summary.json"
    if not file.exists():
        return None
    try:
        old = read_json(file)
        best = {"step": old["best"]["step"], "value": old["best"]["loss"]} if old["best"] else None
        return {**old, "best": best, "seconds": old["training_seconds"], "units_per_second": old["tokens_per_second"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): leave {path} out") from None
