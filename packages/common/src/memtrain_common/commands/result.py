"""What a finished training has to tell: its outcome, and ``result.json``, the same for every command.

What only one command knows stands under ``own``::

    {"command", "data", "seed", "metric", "step", "steps", "skipped_steps",
     "scores": {split: {name: number}}, "best": {"step", "value"},
     "evaluation", "train_loss", "measured": {category: bytes}, "peak_bytes", "trained_parameters", "parameters",
     "seconds", "unit", "units_per_second", "joules", "energy_source", "own": {…}}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from ..files import read_json, write_json
from ..training.fit_config import FitConfig, FitResult
from .summary import count_parameters

RESULT, COST = "result.json", "cost.csv"


@dataclass(frozen=True)
class Outcome:
    """A finished training."""

    model: nn.Module
    """Without wrappers, with the weights that were chosen."""
    result: FitResult
    """Its ledger is this process's, or an earlier one's that took all the steps; None where no step was taken."""
    step: int
    """Whose weights they are."""
    config: FitConfig
    evaluation: dict[str, float]
    """The training's evaluation of these weights; ``result.evaluation`` is that of the last step."""


def result_content(
    outcome: Outcome,
    about: Mapping[str, Any],
    *,
    train_loss: float | None,
    scores: Mapping[str, Mapping[str, float]],
    own: Mapping[str, Any],
    numbers: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """What ``result.json`` says.

    Args:
        about: the command, the data's name and the seed.
        train_loss: of the last logged step.
        scores, own, numbers: as :meth:`memtrain_common.commands.session.Session.finish` has them.
    """
    result = outcome.result
    trained, total = numbers or count_parameters(outcome.model)
    return {
        **about,
        "metric": outcome.config.best_metric,
        "step": outcome.step,
        "steps": result.step,
        "skipped_steps": result.skipped_steps,
        "scores": {split: dict(numbers) for split, numbers in scores.items()},
        "best": {"step": result.best[0], "value": result.best[1]} if result.best else None,
        "evaluation": result.evaluation,
        "train_loss": train_loss,
        "measured": result.ledger.totals if result.ledger is not None else None,
        "peak_bytes": result.peak_bytes,
        "trained_parameters": trained,
        "parameters": total,
        "seconds": round(result.seconds, 3),
        "unit": outcome.config.unit,
        "units_per_second": result.units_per_second,
        "joules": result.joules,
        "energy_source": result.energy_source,
        "own": dict(own),
    }


def write_result(folder: Path, content: Mapping[str, Any], result: FitResult) -> None:
    """``result.json`` and ``cost.csv``, a run's time and energy as a table of one row, for a spreadsheet.

    "unavailable" stands where nothing was measured. Evaluation and saving are left out of the seconds. They are in the
    joules, those of the devices that ``energy_source`` names; the watts are of all the time that these were counted.
    """
    write_json(folder / RESULT, dict(content))
    joules = "unavailable" if result.joules is None else f"{result.joules:.1f}"
    watts = "unavailable"
    if result.joules is not None and result.metered_seconds > 0:
        watts = f"{result.joules / result.metered_seconds:.1f}"
    row = (str(result.step), f"{result.seconds:.3f}", joules, watts, result.energy_source)
    (folder / COST).write_text(f"steps,seconds,joules,mean_watts,energy_source\n{','.join(map(_cell, row))}\n")


def _cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text


def read_result(folder: Path) -> dict[str, Any] | None:
    """The content of a run's ``result.json``; None where there is none.

    Raises:
        UserError: if it is damaged.
    """
    try:
        content = read_json(folder / RESULT)
        if isinstance(content, dict):
            return content
        why = "it is no object"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = str(error)
    raise UserError(f"{folder / RESULT} is damaged ({why}): remove it and resume the run, which writes it again")


def ended_before(folder: Path, result: FitResult) -> dict[str, Any] | None:
    """The ``result.json`` of a run that had ended when it was resumed: ``result`` gets its measurements. Else None."""
    try:
        before = read_result(folder)
    except UserError:  # it is written again
        return None
    if before is None or before.get("steps") != result.step or "command" not in before:
        return None
    result.units_per_second = before.get("units_per_second") or result.units_per_second  # of an older checkpoint
    if result.joules is None and before.get("joules") is not None:  # it ended where there was a counter
        result.joules, result.energy_source = before["joules"], before["energy_source"]
    return before


def same_command(
    before: dict[str, Any] | None, outcome: Outcome, scores: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The command of a run that had ended, where the one that resumed it found the same."""
    found = {split: dict(numbers) for split, numbers in scores.items()}
    same = before is not None and before.get("step") == outcome.step and before.get("scores") == found
    return {"command": before["command"]} if before is not None and same else {}
