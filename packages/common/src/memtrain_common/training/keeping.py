"""What a training keeps: its progress, as checkpoints, and how it goes on from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import Console
from ..errors import DivergedError, UserError
from ..files import read_json
from ..measuring.memory import Ledger
from ..runs.run_folder import RunFolder
from ..runs.state_tree import check
from ..runs.trackers import Tracker, open_tracker
from .distributed import any_rank, refusing_together, unwrap
from .fit_config import FitConfig, FitResult
from .task import Task
from .training_state import Stateful, all_finite, capture, check_resume_key, infinite_buffers, put_back

LEDGER = "memory.json"


@dataclass
class Progress:
    """How far a training has come."""

    finite: Tensor
    """Whether every loss so far was finite, and every weight that was looked at: a boolean on the training's device."""
    result: FitResult = field(default_factory=FitResult)
    evaluated: bool = False
    """Whether the evaluation that is due at the current step is done."""
    skipped_in_a_row: int = 0
    saved_step: int = 0
    """Nothing is saved before the first step: there is nothing to lose."""


class Keeper:
    """Saves a training's state, and puts it back. Without a run folder it keeps nothing."""

    def __init__(
        self,
        task: Task,
        scaler: torch.amp.GradScaler,
        run: RunFolder | None,
        console: Console,
        *,
        resume_path: Path | None,
        resume_key: Mapping[str, Any],
    ) -> None:
        """
        Args:
            resume_path: the folder that a stopped user is told to resume, if not the run's own.
            resume_key: what a checkpoint must agree in.
        """
        self.task, self.run, self.console = task, run, console
        self.model, self.optimizer = unwrap(task.model), task.needed_optimizer()
        self.resume_path = resume_path or (run.path if run is not None else None)
        self.resume_key = dict(resume_key)
        self.progress = Progress(torch.ones((), dtype=torch.bool, device=next(self.model.parameters()).device))
        self._others: dict[str, Stateful] = {**task.stateful, "scaler": scaler}
        self._infinite = infinite_buffers(self.model)
        self._tracker: Tracker | None = None
        if run is not None:
            self._check_storable()

    def _check_storable(self) -> None:
        """Now rather than at the first checkpoint.

        Raises:
            UserError: naming what no checkpoint can hold.
        """
        others = {name: other.state_dict() for name, other in self._others.items()}
        try:
            check({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "others": others})
        except TypeError as error:
            raise UserError(str(error)) from None

    @property
    def best_step(self) -> int | None:
        best = self.progress.result.best
        return best[0] if best else None

    @property
    def last_kept(self) -> str:
        """Which checkpoint there is, in words."""
        steps = self.run.checkpoints.steps() if self.run is not None else []
        return f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"

    def save(self) -> Path:
        """Write a checkpoint of the current step.

        Raises:
            DivergedError: if a loss or a weight is not finite; such weights are never saved.
        """
        assert self.run is not None
        self.check_weights()
        progress = self.progress
        progress.saved_step = progress.result.step
        return self.run.checkpoints.save(progress.result.step, self.state(), best=self.best_step)

    def all_finite(self) -> Tensor:
        """Whether the model's numbers are finite, but for buffers that were not at the start, as masks of −∞."""
        return all_finite(self.model, but=self._infinite)

    def check_weights(self) -> None:
        """Look at every weight.

        Raises:
            DivergedError: if a loss was not finite or a weight is not, on any process.
        """
        self.progress.finite &= self.all_finite()
        self.check_finite()

    def check_finite(self) -> None:
        """Raises:
        DivergedError: if a loss was not finite, or a weight that was looked at, on any process.
        """
        if not any_rank(int(not self.progress.finite)):
            return
        raise DivergedError(
            f"training diverged: the loss or a weight was no longer finite by step {self.progress.result.step}; "
            f"{self.last_kept.replace('the last checkpoint', 'the last good checkpoint')}; try a lower learning rate"
        )

    def count_skip(self, skipped: bool, in_a_row: int) -> None:
        """Count a step in which no weight moved.

        Args:
            in_a_row: so many of them, one after another, are a divergence; 0 counts this one as no such sign.

        Raises:
            DivergedError: where that many are reached.
        """
        progress = self.progress
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped and in_a_row else 0
        progress.result.skipped_steps += skipped
        if in_a_row and progress.skipped_in_a_row >= in_a_row:
            raise DivergedError(
                f"training diverged: the last {in_a_row} steps, up to step {progress.result.step + 1}, were skipped "
                f"because a gradient was NaN or Inf; {self.last_kept}; try a lower learning rate"
            )

    def state(self, *, alone: bool = False) -> dict[str, Any]:
        """Everything that a checkpoint holds; collective unless ``alone``."""
        assert self.run is not None
        result = self.progress.result
        progress = {
            "step": result.step,
            "evaluated": self.progress.evaluated,
            "seconds": result.seconds,
            "units_per_second": result.units_per_second,
            "skipped": result.skipped_steps,
            "evaluation": result.evaluation,
            "best": result.best,
            **self.run.metrics_mark(),
        }
        return capture(
            self.model, self.optimizer, self._others, parts=self.task.parts, alone=alone, progress=progress,
            identity=self.resume_key,
        )  # fmt: skip

    def save_ledger(self) -> None:
        """Write ``memory.json``, once a step was measured."""
        result = self.progress.result
        if self.run is not None and self.run.writes and result.ledger is not None:
            result.ledger.save(self.run.path / LEDGER, peak_bytes=result.peak_bytes)

    def take_measurements(self) -> None:
        """Where this process measured no step, since all were taken: what the one that took them had measured.

        Raises:
            UserError: if its ``memory.json`` is damaged.
        """
        result = self.progress.result
        if self.run is None or result.ledger is not None or not (self.run.path / LEDGER).is_file():
            return
        result.ledger = Ledger.read(self.run.path / LEDGER)
        before = read_json(self.run.path / LEDGER).get("peak_bytes") or {}
        now = {phase: n for phase, n in result.peak_bytes.items() if n is not None}
        result.peak_bytes = {**result.peak_bytes, **before, **now}

    def begin(
        self, config: FitConfig, resume: bool, read_key: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> None:
        """Go on from the newest checkpoint, or begin at step 0; open the tracker.

        Raises:
            UserError: as :meth:`restore`; or where a run would begin in the folder of another, whose checkpoints its
                own first one would replace; or if the tracker does not open.
        """
        if resume:
            said = self.restore(read_key)
            self._open_tracker(config, self.progress.result.step)
            assert self.run is not None
            self.run.taken_up()
            self.console.say(said)
            return
        begun = self.run is not None and self.run.writes and bool(self.run.checkpoints.steps())
        if any_rank(int(begun)):  # said by every process, or the others would wait for the one that writes
            where = self.run.path if self.run is not None else "the folder of another process"
            raise UserError(
                f"{where} holds a run with checkpoints: go on with it (resume=True), or begin in another folder"
            )
        self._open_tracker(config, None)

    def _open_tracker(self, config: FitConfig, resume_step: int | None) -> None:
        """Before anything is written: where it does not open, a run that is resumed stays as it was."""

        def opening() -> None:
            if self.run is not None and self.run.writes:
                self._tracker = open_tracker(
                    config.tracker, self.run.path, self.resume_key, resume_step=resume_step,
                    project=config.tracker_project, name=config.tracker_name,
                    say=None if self.console.quiet else self.console.say,
                )  # fmt: skip

        if config.tracker != "none":
            refusing_together(opening)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``, and give it to the tracker."""
        if self.run is not None:
            self.run.append_metrics([row])
        if self._tracker is not None:
            self._tracker.log(row)

    def close(self) -> None:
        """The tracker gets no more rows."""
        if self._tracker is not None:
            self._tracker.close()

    def restore(self, read_key: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> str:
        """Take up the newest valid checkpoint; where there is none, begin the run anew; -> what to say of it.

        Raises:
            UserError: if no checkpoint is intact, or the newest one is of another training.
        """
        if self.run is None:
            raise ValueError("resume=True needs a run folder: pass run=")
        checkpoints, say = self.run.checkpoints, self.console.say
        found = checkpoints.load_newest(say)
        if found is None:
            if checkpoints.steps():
                raise UserError(f"no checkpoint in {checkpoints.folder} is intact: begin a new run with another --out")
            self.run.take_back_metrics(0)
            return f"{self.run.path} has no checkpoint yet: beginning at step 0"
        step, state = found
        where = checkpoints.path(step)
        try:
            self._take_up(step, state, where, read_key)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(f"{where} does not hold what this version's checkpoints do ({error!r})") from None
        return f"resumed from {where}"

    def _take_up(
        self,
        step: int,
        state: dict[str, Any],
        where: Path,
        read_key: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        """Put a checkpoint's state into the model and all that goes with it."""
        assert self.run is not None
        check_resume_key(read_key(state["identity"]), self.resume_key, where)
        say, parts = self.console.say, self.task.parts
        put_back(state, self.model, self.optimizer, self._others, where=where, say=say, parts=parts)
        saved, result = state["progress"], self.progress.result
        result.step, result.seconds, result.evaluation = step, saved["seconds"], saved["evaluation"]
        result.best, self.progress.evaluated, self.progress.saved_step = saved["best"], saved["evaluated"], step
        result.skipped_steps = saved.get("skipped", 0)  # older checkpoints do not know it, nor the rate
        result.units_per_second = saved.get("units_per_second", 0.0)
        if not self.run.take_back_metrics(saved["metrics_bytes"], saved.get("metrics_sha256", "")):
            say(f"{self.run.path / 'metrics.jsonl'} is gone: it begins again behind step {step}")
