"""Every combination's memory on fake tensors, which of them fit a budget, and what would make others fit."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from memtrain_common.console import Console, format_bytes
from memtrain_common.errors import UserError
from memtrain_common.interrupts import unwinding

from ..compose.axes import Axes, Optim
from .arms import Arm, Plan, Remedy
from .config import PlanConfig, planned_shape
from .counted import MissingError, Records, Store, cached_records, keep
from .forecast import (
    Workplace,
    between,
    compose_forecast,
    count_optimizers,
    count_step,
    largest,
    refuse,
)
from .known import read, scores_of, timing_of
from .uses import OptimizerUse, Step, StepUse

SAME_GRADIENT = ("all", "checkpoint", "offload")
"""Choices of ``save`` that change no number of the training."""


def make_plan(config: PlanConfig, console: Console | None = None) -> Plan:
    """Count what is needed, compose every combination, and look for what would make those fit that do not."""
    shape, tokens = planned_shape(config)
    step = Step(shape, tokens, config.weights, config.dtype, cuda=config.device == "cuda")
    place = Workplace(
        step, config.batch // config.gpus, config.gradient_accumulation_steps, config.gpus, config.parallel
    )
    counts = _Counts(config, place, console or Console(quiet=True))
    scores, overheads, timings = read()
    reference = counts.flops_of_plain_training()
    plan = Plan(config, place, [counts.arm(axes) for axes in _combinations(config)])
    for arm in plan.arms:
        if arm.forecast is None:
            continue
        arm.overhead = next((o for o in overheads if o.optim == arm.axes.optim), None)
        arm.time = arm.forecast.flops / reference * (arm.overhead.factor if arm.overhead else 1.0)
        arm.timing = timing_of(arm.axes, shape.task, timings)
        arm.fits = arm.forecast.peak <= config.usable_bytes
        arm.scores = scores_of(arm.axes, scores)
    for arm in plan.lacking:
        arm.remedies = list(_remedies(arm, plan, counts))
    if not plan.fitting and not any(arm.remedies or arm.largest for arm in plan.lacking):
        _refuse_all(plan, counts)
    plan.arms.sort(key=lambda arm: _order(arm, config.order))
    return plan


def _combinations(config: PlanConfig) -> Iterator[Axes]:
    for train in config.train:
        for save in config.save:
            for optim in config.optim:
                yield config.axes(train, save, optim)


def _order(arm: Arm, order: str) -> tuple[Any, ...]:
    """Fitting, lacking, refused; then as asked. Offloading counts as slow as checkpointing, and Back Razor too: the bus
    and the packing are not in the estimate."""
    if arm.forecast is None:
        return (2,)
    time = arm.time + (1 / 3 if arm.axes.save in ("offload", "backrazor") else 0.0)
    optims = ("adamw", "adamw8bit", "galore-scaled", "galore-adamw", "galore-adamw8bit", "galore-adafactor", "sgd")
    lossy = arm.axes.save not in SAME_GRADIENT
    keys = {
        "best": (-arm.forecast.trained, lossy, time, optims.index(arm.axes.optim)),
        "time": (time, -arm.forecast.trained, lossy, optims.index(arm.axes.optim)),
        "peak": (arm.forecast.peak, time, -arm.forecast.trained),
    }
    return (0 if arm.fits else 1, *keys[order])


def _remedies(arm: Arm, plan: Plan, counts: "_Counts") -> Iterator[Remedy]:
    """Single changes after which it fits, those first that change the training least: fewer samples at once, then
    other saving with the same gradients, Back Razor, another optimizer, other trained numbers; the fastest of each."""
    config = plan.config
    split = counts.split(arm.axes)
    if split is not None:
        rows, parts, peak = split
        steps = parts * config.gradient_accumulation_steps
        flags = f"--batch {rows * config.gpus} --gradient-accumulation-steps {steps}"
        yield Remedy(flags, peak, arm.time)
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
            yield Remedy(f"--{name} {getattr(best.axes, name)}", best.predicted.peak, best.time)


def _refuse_all(plan: Plan, counts: "_Counts") -> None:
    """Say what the least combination needs."""
    least = min(
        ((counts.peaks(a.axes)[min(counts.peaks(a.axes))], min(counts.peaks(a.axes)), a) for a in plan.lacking),
        key=lambda found: found[0],
        default=None,
    )
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


# -- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One thing to know: a forward and backward pass, or the steps of all optimizers of a choice of ``train``."""

    place: Workplace
    axes: Axes
    optims: tuple[Optim, ...] = ()


class _Counts:
    """The moments of all that is asked for, counted in several processes, and forecasts made of them."""

    def __init__(self, config: PlanConfig, place: Workplace, console: Console) -> None:
        self.config, self.place, self._console = config, place, console
        self._store = Store({} if config.recount else cached_records(place.step), live=False)
        self._steps: dict[tuple[str, str], dict[int, StepUse]] = {}
        self._optims: dict[tuple[str, str], OptimizerUse] = {}
        self._refused: dict[tuple[str, str], str] = {}
        axes = list(_combinations(config))
        meant = [a for a in axes if not self._why_refused(a)]
        trains = dict.fromkeys(a.train for a in meant)
        pairs = dict.fromkeys((a.train, a.save) for a in meant)
        steps = dict.fromkeys([("full", "all"), *pairs])
        tasks = []
        for train in reversed(trains):  # the longest first
            optims = tuple(dict.fromkeys(a.optim for a in meant if a.train == train))
            tasks.append(_Task(place, config.axes(train, "all", "sgd"), optims))
        tasks += [_Task(place, config.axes(train, save, "sgd")) for train, save in steps]
        self._count(tasks, "planning")
        # what does not fit may fit with fewer samples: a second point of its peak
        arms = [self.arm(a) for a in meant]
        short = [a.axes for a in arms if a.forecast and a.forecast.peak > config.usable_bytes]
        fewer = dict.fromkeys((a.train, a.save) for a in short if self._fewest(a) < place.rows)
        tasks = [
            _Task(replace(place, rows=self._fewest(axes)), axes)
            for axes in (config.axes(train, save, "sgd") for train, save in fewer)
        ]
        self._count(tasks, "smaller batches")
        keep(place.step, self._store.new)

    def _fewest(self, axes: Axes) -> int:
        return axes.heads if axes.train == "lte" else 1

    def _count(self, tasks: Sequence[_Task], label: str) -> None:
        missing = [task for task in tasks if not self._knows(task)]
        if missing:
            bar = self._console.progress(len(missing), label=label)
            try:
                with _processes(min(len(missing), self.config.workers or min(4, os.cpu_count() or 1))) as run_all:
                    for new in run_all(partial(_run, self._store.records), missing):
                        self._store.add(new)
                        bar.update()
            finally:
                bar.close()
        for task in tasks:
            result = _answer(task, self._store)
            train, save = task.axes.train, task.axes.save
            if isinstance(result, dict):
                for optim, found in result.items():
                    if isinstance(found, str):
                        self._refused[(train, optim)] = found
                    else:
                        self._optims[(train, optim)] = found
            elif isinstance(result, str):
                self._refused[(train, "" if task.optims else save)] = result
            else:
                self._steps.setdefault((train, save), {})[task.place.rows] = result

    def _knows(self, task: _Task) -> bool:
        try:
            _answer(task, self._store)
        except MissingError:
            return False
        return True

    def flops_of_plain_training(self) -> int:
        """Of an optimizer step, full training with everything saved."""
        found = self._steps.get(("full", "all"), {}).get(self.place.rows)
        if found is None:
            raise UserError(self._refused[("full", "all")])
        return found.flops * self.place.micro_batches

    def _why_refused(self, axes: Axes) -> str:
        try:
            refuse(self.place, axes)
        except UserError as error:
            return str(error)
        train = axes.train
        return next((self._refused[train, k] for k in (axes.save, axes.optim, "") if (train, k) in self._refused), "")

    def arm(self, axes: Axes) -> Arm:
        """The combination's forecast, or why it is refused."""
        why = self._why_refused(axes)
        if why:
            return Arm(axes, refused=why)
        step, optim = self._steps[(axes.train, axes.save)], self._optims[(axes.train, axes.optim)]
        found = compose_forecast(self.place, axes, step[self.place.rows], optim)
        most = largest(self.peaks(axes), self.config.usable_bytes, self._fewest(axes)) * self.config.gpus
        return Arm(axes, forecast=found, largest=most)

    def peaks(self, axes: Axes, micro_batches: int = 0) -> dict[int, int]:
        """Samples a micro-batch of one process -> the predicted peak, where it was counted."""
        place = replace(self.place, micro_batches=micro_batches or self.place.micro_batches)
        optim = self._optims[(axes.train, axes.optim)]
        steps = self._steps[(axes.train, axes.save)]
        return {r: compose_forecast(replace(place, rows=r), axes, m, optim).peak for r, m in steps.items()}

    def split(self, axes: Axes) -> tuple[int, int, int] | None:
        """The largest equal parts of a micro-batch that fit one after another: -> samples, parts, peak."""
        rows = self.place.rows
        known = self.peaks(axes, micro_batches=2)
        for parts in range(2, rows + 1):
            fewer = rows // parts
            if rows % parts or fewer % self._fewest(axes) or fewer < min(known):
                continue
            peak = between(known, fewer)
            if peak <= self.config.usable_bytes:
                return fewer, parts, peak
        return None


_RunAll = Callable[[Callable[[_Task], Records], Sequence[_Task]], Iterable[Records]]


@contextmanager
def _processes(workers: int) -> Iterator[_RunAll]:
    """``map`` over several processes, where the system can fork."""
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield map
        return
    import peft  # noqa: F401  # once, before the processes part
    import torch._dynamo  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    with unwinding(), ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _one_thread) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _run(known: Records, task: _Task) -> Records:
    """Count what is not known of a task; -> the new records."""
    store = Store(dict(known))
    _answer(task, store)
    return store.new


def _answer(task: _Task, store: Store) -> StepUse | dict[Optim, OptimizerUse | str] | str:
    """What a task asks, or the sentence that refuses it."""
    try:
        if task.optims:
            return count_optimizers(task.place, task.axes, task.optims, store)
        return count_step(task.place, task.axes, store)
    except UserError as error:
        return str(error)
