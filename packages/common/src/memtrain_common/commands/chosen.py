"""The weights that a training chose among its checkpoints, and what its evaluation said of them."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs import checkpoint
from ..runs.run_folder import RunFolder
from ..training.fit_config import FitConfig, FitResult


def evaluation_of(step: int, result: FitResult, config: FitConfig, run: RunFolder | None) -> dict[str, float]:
    """The evaluation of the weights of ``step``: the last one, or that of the best, which the run has logged."""
    if step == result.step or run is None:
        return result.evaluation
    logged = [row for row in run.metrics() if row.get("split") == "val" and row["step"] == step]
    if logged:
        return {name: value for name, value in logged[-1].items() if name not in ("step", "split")}
    return {config.best_metric: result.best[1]} if result.best else {}  # the rows before a checkpoint may be gone


def verified(run: RunFolder, step: int, where: Path) -> dict[str, Any]:
    """The state in the best checkpoint.

    Args:
        where: the folder to resume.

    Raises:
        UserError: if its hashes do not hold; which other one is intact is said.
    """
    path = run.checkpoints.path(step)
    wrong = checkpoint.verify(path)
    if wrong is None:
        return checkpoint.load(path)
    others = (s for s in reversed(run.checkpoints.steps()) if checkpoint.verify(run.checkpoints.path(s)) is None)
    intact = next(others, None)
    remedy = "no other one is intact: train anew"
    if intact is not None:
        remedy = f"that of step {intact} is intact: take it by --resume {where} --select last, or train anew"
    raise UserError(f"the best checkpoint {path} is damaged ({wrong}), and {remedy}")
