"""What a plan needs to know, counted in several processes where no record tells it."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from memtrain_common.console import Console
from memtrain_common.errors import UserError
from memtrain_common.interrupts import unwinding

from ..compose.axes import Axes, Optim
from .arms import Arm
from .config import PlanConfig
from .counted import MissingError, Records, Store, keep, known_records, unit_of
from .forecast import Forecast, Workplace, between, compose_forecast, count_optimizers, count_step, largest, refuse
from .lines import LEAST
from .uses import OptimizerUse, StepUse


def combinations_of(config: PlanConfig) -> Iterator[Axes]:
    """Every combination that is asked for, once, valid or not."""
    for train in dict.fromkeys(config.train):
        for save in dict.fromkeys(config.save):
            for optim in dict.fromkeys(config.optim):
                yield config.axes(train, save, optim)


@dataclass(frozen=True)
class _Task:
    """One thing to know: a forward and backward pass, or the steps of all optimizers of a choice of ``train``."""

    place: Workplace
    axes: Axes
    optims: tuple[Optim, ...] = ()


class PlanCounts:
    """The moments of all that is asked for, counted in several processes, and forecasts made of them."""

    def __init__(self, config: PlanConfig, place: Workplace, console: Console) -> None:
        self.config, self.place, self._console = config, place, console
        self._store = Store({} if config.recount else known_records(place.step), live=False)
        self._optims: dict[tuple[str, str], OptimizerUse] = {}
        self._refused: dict[tuple[str, str], str] = {}
        axes = list(combinations_of(config))
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
        fewest = dict.fromkeys((a.train, a.save) for a in meant if self._needs_fewest(a))
        alone = [config.axes(train, save, "sgd") for train, save in fewest]
        self._count([_Task(replace(place, rows=unit_of(axes)), axes) for axes in alone], "smaller batches")
        keep(place.step, self._store.new)

    def _needs_fewest(self, axes: Axes) -> bool:
        """Whether it does not fit, and would not by any batch that is known."""
        usable, rows = self.config.usable_bytes, self.place.rows
        if self._why_refused(axes) or rows == unit_of(axes) or self.peak(axes, rows) <= usable:
            return False
        least = self._least(axes)
        return least == rows or self.peak(axes, least) > usable or self.split(axes) is None

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

    def _knows(self, task: _Task) -> bool:
        try:
            _answer(task, self._store)
        except MissingError:
            return False
        return True

    def flops_of_plain_training(self) -> int:
        """Of an optimizer step, full training with everything saved."""
        if ("full", "all") in self._refused:
            raise UserError(self._refused[("full", "all")])
        return (
            count_step(self.place, self.config.axes("full", "all", "sgd"), self._store).flops * self.place.micro_batches
        )

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
        found = self._forecast(axes, self.place.rows)
        assert found is not None
        least, usable, unit = self._least(axes), self.config.usable_bytes, unit_of(axes)
        most = largest(lambda rows: self.peak(axes, rows), least, self.place.rows, usable, unit)
        return Arm(axes, forecast=found, largest=most * self.config.gpus)

    def _forecast(self, axes: Axes, rows: int, micro_batches: int = 0) -> Forecast | None:
        """Of another micro-batch; None where only counting tells."""
        place = replace(self.place, rows=rows, micro_batches=micro_batches or self.place.micro_batches)
        try:
            step = count_step(place, axes, self._store)
        except MissingError:
            return None
        return compose_forecast(place, axes, step, self._optims[(axes.train, axes.optim)])

    def _least(self, axes: Axes) -> int:
        """The fewest samples a micro-batch of one process whose peak is known."""
        unit, rows = unit_of(axes), self.place.rows
        return next(r for r in (unit, LEAST * unit, rows) if r >= rows or self._forecast(axes, r) is not None)

    def peak(self, axes: Axes, rows: int, micro_batches: int = 0) -> int:
        """With so many samples a micro-batch of one process: as counted, or between two that were, an upper bound."""
        found = self._forecast(axes, rows, micro_batches)
        if found is not None:
            return found.peak
        known = {r: self._forecast(axes, r, micro_batches) for r in (self._least(axes), self.place.rows)}
        return between({r: f.peak for r, f in known.items() if f is not None}, rows)

    def least_peak(self, axes: Axes) -> tuple[int, int]:
        """-> the peak with the fewest samples that are known, and their number."""
        rows = self._least(axes)
        return self.peak(axes, rows), rows

    def split(self, axes: Axes) -> tuple[int, int, int] | None:
        """The largest equal parts of a micro-batch that fit one after another: -> samples, parts, peak."""
        rows, least = self.place.rows, self._least(axes)
        for parts in range(2, rows + 1):
            fewer = rows // parts
            if rows % parts or fewer % unit_of(axes) or fewer < least:
                continue
            peak = self.peak(axes, fewer, micro_batches=2)
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
