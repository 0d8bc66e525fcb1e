"""Every combination's memory on fake tensors, which of them fit a budget, and what would make others fit."""

from collections.abc import Iterator
from typing import Any

from memtrain_common.console import Console, format_bytes
from memtrain_common.errors import UserError

from ..compose.axes import save_words
from .arms import Arm, Plan, Remedy
from .config import PlanConfig, planned_shape
from .counting import PlanCounts, combinations_of
from .forecast import Workplace
from .known import read, scores_of, timing_of
from .uses import Step

SAME_GRADIENT = ("all", "checkpoint", "offload")
"""Choices of ``save`` that change no number of the training."""


def make_plan(config: PlanConfig, console: Console | None = None) -> Plan:
    """Count what is needed, compose every combination, and look for what would make those fit that do not."""
    shape, tokens = planned_shape(config)
    step = Step(shape, tokens, config.weights, config.dtype, cuda=config.device == "cuda")
    place = Workplace(
        step, config.batch // config.gpus, config.gradient_accumulation_steps, config.gpus, config.parallel
    )
    counts = PlanCounts(config, place, console or Console(quiet=True))
    scores, overheads, timings = read()
    reference = counts.flops_of_plain_training()
    plan = Plan(config, place, [counts.arm(axes) for axes in combinations_of(config)])
    for arm in plan.arms:
        if arm.forecast is None:
            continue
        arm.overhead = next((o for o in overheads if o.optim == arm.axes.optim), None)
        arm.time = arm.forecast.flops / reference * (arm.overhead.factor if arm.overhead else 1.0)
        arm.timing = timing_of(arm.axes, shape.task, timings)
        arm.fits = arm.forecast.peak <= config.usable_bytes
        arm.scores = scores_of(arm.axes, scores, shape.task)
    for arm in plan.lacking:
        arm.remedies = list(_remedies(arm, plan, counts))
    if not plan.fitting and not any(arm.remedies or arm.largest for arm in plan.lacking):
        _refuse_all(plan, counts)
    plan.arms.sort(key=lambda arm: _order(arm, config.order))
    return plan


def _order(arm: Arm, order: str) -> tuple[Any, ...]:
    """Fitting, lacking, refused; then as asked. Offloading counts as slow as checkpointing, and Back Razor too: the bus
    and the packing are not in the estimate."""
    if arm.forecast is None:
        return (2,)
    time = round(arm.time + (1 / 3 if arm.axes.save in ("offload", "backrazor") else 0.0), 2)  # what is shown alike
    optims = ("adamw", "adamw8bit", "galore-scaled", "galore-adamw", "galore-adamw8bit", "galore-adafactor", "sgd")
    lossy = arm.axes.save not in SAME_GRADIENT
    keys = {
        "best": (-arm.forecast.trained, lossy, time, optims.index(arm.axes.optim), arm.forecast.peak),
        "time": (time, -arm.forecast.trained, lossy, optims.index(arm.axes.optim), arm.forecast.peak),
        "peak": (arm.forecast.peak, time, -arm.forecast.trained),
    }
    return (0 if arm.fits else 1, *keys[order])


def _remedies(arm: Arm, plan: Plan, counts: PlanCounts) -> Iterator[Remedy]:
    """Single changes after which it fits, those first that change the training least: fewer samples at once, then
    other saving with the same gradients, Back Razor, another optimizer, other trained numbers; the fastest of each."""
    config = plan.config
    split = counts.split(arm.axes)
    if split is not None:
        rows, parts, peak = split
        steps = parts * config.gradient_accumulation_steps
        flags = f"--batch {rows * config.gpus} --gradient-accumulation-steps {steps}"
        yield Remedy(flags, peak, arm.time, measured=False)
    others = plan.fitting
    same = lambda a, *names: all(getattr(a.axes, n) == getattr(arm.axes, n) for n in names)  # noqa: E731
    kinds = [
        ("save", [a for a in others if same(a, "train", "optim") and a.axes.save in SAME_GRADIENT]),
        ("save", [a for a in others if same(a, "train", "optim") and a.axes.save not in SAME_GRADIENT]),
        ("optim", [a for a in others if same(a, "train", "save")]),
        ("train", [a for a in others if same(a, "save", "optim")]),
    ]
    for name, found in kinds:
        best = min(found, key=lambda a: _order(a, "best"), default=None)
        if best is not None:
            word = save_words(best.axes) if name == "save" else getattr(best.axes, name)
            time = best.time if best.timing is None else best.timing.factor
            yield Remedy(f"--{name} {word}", best.predicted.peak, time, measured=best.timing is not None)


def _refuse_all(plan: Plan, counts: PlanCounts) -> None:
    """Say what the least combination needs."""
    least = min(((*counts.least_peak(a.axes), a) for a in plan.lacking), key=lambda found: found[0], default=None)
    config = plan.config
    if least is None:
        reasons = sorted({a.refused for a in plan.refused})
        raise UserError(f"no combination that was asked for has a meaning for {config.model}: {reasons[0]}")
    peak, rows, arm = least
    need = int(peak * (1 + config.margin)) + config.reserve_bytes
    raise UserError(
        f"nothing fits --budget {config.budget}: the least, {arm.axes.name} with {rows * config.gpus} samples a "
        f"micro-batch, needs {format_bytes(need)} ({config.reserve} of it set aside); give more, choose a smaller "
        "model, or --gpus with --parallel fsdp"
    )
