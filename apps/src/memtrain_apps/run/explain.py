"""Why no saving? What each choice of a run saves, what still dominates its memory, and the cheapest next step.

Every figure is a prediction of the whole ledger (:mod:`memtrain_common.measuring.prediction`) for this very model and
batch: of the run, of the run with one choice put back to the plain one, and of the run with one thing changed.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from memtrain_common.console import format_bytes, format_table
from memtrain_common.errors import UserError
from memtrain_common.measuring.memory import CATEGORIES, Ledger
from memtrain_common.measuring.prediction import Prediction

from ..compose.axes import OPTIM, SAVE, Axes, refusal
from ..compose.compose import plain_name
from .config import RunConfig
from .predicting import predict_run
from .workload import Workload

PLAIN = {"train": "full", "save": "all", "optim": "adamw"}
Predict = Callable[[Axes], Prediction]
LARGEST = 5
"""Layers that are named."""


def explain(workload: Workload, config: RunConfig, device: torch.device) -> str:
    """The report as text."""
    here = Axes(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Axes)})

    def predicted(axes: Axes) -> Prediction:
        return predict_run(workload, config, axes, device=device)

    now = predicted(here)
    total = _total(now.ledger)
    parts = [f"{here.name}: a training step holds {format_bytes(total)}, {format_bytes(now.peak_bytes)} at its peak"]
    parts.append(format_table([(c, format_bytes(n), f"{100 * n / total:.0f} %") for c, n in now.ledger.totals.items()]))
    parts.append(_what_choices_save(here, now, predicted))
    parts.append(_what_dominates(now.ledger))
    parts.append(_next_steps(here, now, predicted))
    return "\n".join(parts)


def _what_choices_save(here: Axes, now: Prediction, predicted: Predict) -> str:
    rows = []
    for axis, plain in PLAIN.items():
        choice = getattr(here, axis)
        if choice == plain:
            continue
        without = _try(dataclasses.replace(here, **{axis: plain}), predicted)  # type: ignore[arg-type]
        if without is None:
            rows.append((f"{axis} {choice}", f"{plain} instead is refused here"))
            continue
        difference = {c: without.ledger.total(c) - now.ledger.total(c) for c in CATEGORIES}
        saved = _total(without.ledger) - _total(now.ledger)
        details = ", ".join(f"{c} {_signed(-n)}" for c, n in difference.items() if n)
        verdict = (
            f"saves {format_bytes(saved)}"
            if saved > 0
            else f"costs {format_bytes(-saved)}"
            if saved
            else "saves nothing"
        )
        rows.append((f"{axis} {choice} for {plain}", f"{verdict} ({details or 'no category changes'})"))
    if not rows:
        return "every choice is the plain one: full, all, adamw"
    return "what each choice saves\n" + format_table(rows)


def _what_dominates(ledger: Ledger) -> str:
    category = max(CATEGORIES, key=ledger.total)
    layers = sorted(ledger.bytes_by_layer[category].items(), key=lambda item: -item[1])
    rows = [
        (plain_name(name), format_bytes(n), f"{100 * n / ledger.total(category):.0f} %") for name, n in layers[:LARGEST]
    ]
    more = len(layers) - LARGEST
    rest = f"\n  and {more} more layers" if more > 0 else ""
    return f"what dominates: {category}, most of it in\n{format_table(rows)}{rest}"


def _next_steps(here: Axes, now: Prediction, predicted: Predict) -> str:
    found = []
    for what, axes in _neighbours(here):
        prediction = _try(axes, predicted)
        if prediction is not None:
            found.append((_total(now.ledger) - _total(prediction.ledger), what))
    useful = sorted((f for f in found if f[0] > 0.02 * _total(now.ledger)), reverse=True)
    if not useful:
        return (
            "next step: no other single choice saves 2 % more; a smaller batch with --gradient-accumulation-steps does"
        )
    rows = [(what, f"saves {format_bytes(n)}", f"{100 * n / _total(now.ledger):.0f} %") for n, what in useful[:4]]
    return "cheapest next steps, one change each\n" + format_table(rows)


def _neighbours(here: Axes) -> Iterator[tuple[str, Axes]]:
    """One change each that keeps what is trained: the same numbers learn, or as many of them as before."""
    if here.dropout and here.train == "lora":
        yield "--dropout 0 (it keeps a copy of every adapted layer's input)", dataclasses.replace(here, dropout=0.0)
    for save in SAVE:
        if save not in (here.save, "all"):
            yield f"--save {save}", dataclasses.replace(here, save=save)
    if here.save == "backrazor" and here.keep > 0.05:
        yield "--keep 0.05", dataclasses.replace(here, keep=0.05)
    for optim in OPTIM:
        if optim != here.optim:
            yield f"--optim {optim}", dataclasses.replace(here, optim=optim)
    if here.train == "full":
        yield "--train lora", dataclasses.replace(here, train="lora")


def _try(axes: Axes, predicted: Predict) -> Prediction | None:
    if refusal(axes) is not None:
        return None
    try:
        return predicted(axes)
    except UserError:  # it has no meaning for this model
        return None


def _total(ledger: Ledger) -> int:
    return sum(ledger.totals.values())


def _signed(n: int) -> str:
    return f"{'+' if n > 0 else '−'}{format_bytes(abs(n))}"
