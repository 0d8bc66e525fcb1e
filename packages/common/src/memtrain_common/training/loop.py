"""The training loop: the only one in the repository.

It knows a :class:`memtrain_common.training.task.Task`: a model, batches by number, a loss, an optimizer, a context
under which the forward pass runs (``saving``: what is kept for the backward pass) and a call after each optimizer step
(``after_step``: LTE merges there). What the methods are, it does not know.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Console, format_bytes, format_count
from ..data.batches import Batch, numbered, to_device
from ..measuring.energy import EnergyMeter
from ..measuring.memory import SavedActivations, measure
from ..measuring.peak import PeakMeter, memory_in_use
from ..runs.run_folder import RunFolder
from .distributed import any_rank, gpus_of, mean_over_ranks, synchronising, unwrap, world
from .evaluation import mean_loss as mean_loss
from .evaluation import numbers_of
from .fit_config import DTYPES, FitConfig, FitResult
from .heartbeat import Heartbeat
from .keeping import Keeper
from .leaving import rescuing, stop, stop_at_once
from .rng import rng_state, set_rng_state
from .stop_signals import LeaveEvaluation, StopSignals
from .task import EVAL_MODE, Task, one_number


def fit(
    task: Task,
    config: FitConfig,
    *,
    run: RunFolder | None = None,
    resume: bool = False,
    resume_path: Path | None = None,
    resume_key: Mapping[str, Any] | None = None,
    read_key: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    console: Console | None = None,
    label: str = "",
) -> FitResult:
    """Train ``task.model`` for ``config.max_iters`` optimizer steps.

    Gradients from before are dropped. No module's mode is changed; a model in eval mode as a whole is warned of.

    Args:
        run: where metrics, checkpoints, ledger and energy go; None keeps none of them.
        resume: go on from the newest valid checkpoint of ``run``, if it has one.
        resume_path: the folder that a stopped user is told to resume, if not the run's own.
        resume_key: what a checkpoint must agree in (the configuration, the data); checked when resuming.
        read_key: a checkpoint's ``resume_key`` under the names of today, where an older version wrote it.
        console: where lines and the progress bar go; None is silent.
        label: the progress bar's name.

    Raises:
        Stopped: after SIGTERM, SIGINT or SIGUSR1, with a checkpoint written.
        DivergedError: when the loss or a weight is no longer finite; such weights are never saved. Without ``run`` the
            weights are looked at after the last step.
        LostRankError: when another process is gone; with ``task.parts``, after this one's state was saved.
        UserError: if a checkpoint does not fit the model, or cannot be written.
        ValueError: if the task has no optimizer, or its evaluation lacks the best metric.
    """
    console = console or Console(quiet=True)
    trainer = _Trainer(task, config, run, console, resume_path, resume_key or {})
    return trainer.train(resume, label, read_key)


class _Trainer:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        task: Task,
        config: FitConfig,
        run: RunFolder | None,
        console: Console,
        resume_path: Path | None,
        resume_key: Mapping[str, Any],
    ) -> None:
        model = task.model
        self.task, self.config, self.run, self.console = task, config, run, console
        self.optimizer = task.needed_optimizer()
        self.inner = unwrap(model)
        self.model: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
        self.wrapper = model  # DDP's no_sync and FSDP's switch are on this one
        ddp = isinstance(model, nn.parallel.DistributedDataParallel)  # it would broadcast buffers at each forward
        self.evaluated_model = self.inner if ddp else self.model
        self.device = next(self.inner.parameters()).device
        self.trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.peaks = PeakMeter(self.device)
        self.keeper = Keeper(task, self.scaler, run, console, resume_path=resume_path, resume_key=resume_key)
        self.progress, self.result = self.keeper.progress, self.keeper.progress.result
        self.after_step = task.called_after_steps()
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, resume: bool, label: str, read_key: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> FitResult:
        config, result = self.config, self.result
        self.keeper.begin(config, resume, read_key)
        self.optimizer.zero_grad(set_to_none=True)  # what an earlier backward pass left is no part of the first step
        if not self.inner.training and result.step < config.max_iters and world().is_main:
            warnings.warn(EVAL_MODE, UserWarning, stacklevel=3)
        gpus = gpus_of(self.device)
        meter = EnergyMeter(self.run.path / "energy.csv" if self.run and self.run.writes else None, gpus=gpus)
        result.energy_source = meter.source
        bar = self.console.progress(config.max_iters, initial=result.step, label=label, lines=True)
        micro = config.gradient_accumulation_steps
        source = numbered(self.task.batches, range(result.step * micro, config.max_iters * micro), config.workers)
        first, timed_from = result.step, result.seconds
        lapse = 0.0  # seconds of training since the last logged step
        leaving = rescuing(self.keeper, every=config.agree_interval, since=config.agree_offset)
        heartbeat = Heartbeat(config.patience_s if self.task.apart else 0.0)
        try:
            with StopSignals() as signals, meter, leaving, heartbeat:
                while True:
                    self._look(signals)
                    self._agree_to_stop(signals)  # a signal came while something was saved
                    if result.step >= config.max_iters:
                        break
                    heartbeat.check()
                    self.peaks.begin("training")
                    began = time.perf_counter()
                    loss, norm = self._step(source, measuring=result.ledger is None)
                    result.step += 1
                    self.progress.evaluated = False
                    logged = result.step % config.log_interval == 0 or result.step == config.max_iters
                    if logged:
                        value = float(mean_over_ranks(loss))  # waits for the device
                    spent = time.perf_counter() - began
                    lapse += spent
                    result.seconds += spent
                    if result.step == first + 1:
                        timed_from = result.seconds
                        self.keeper.save_ledger()
                    result.note_rate(config.units_per_step, first, timed_from)  # a checkpoint knows it
                    bar.update()
                    if logged:
                        steps = result.step - max(first, (result.step - 1) // config.log_interval * config.log_interval)
                        self._log(value, norm, steps * config.units_per_step / lapse, bar)
                        lapse = 0.0
                    self._agree_to_stop(signals)
                result.joules, result.metered_seconds = meter.joules, meter.seconds
        except KeyboardInterrupt as interrupt:
            stop_at_once(self.keeper, interrupt)
        finally:
            bar.close()
            self.peaks.end()
            self.keeper.close()
        result.peak_bytes = {phase: self.peaks.peak(phase) for phase in ("training", "evaluation")}
        result.note_rate(config.units_per_step, first, timed_from)
        self.keeper.save_ledger()
        self.keeper.take_measurements()
        return result

    def _step(self, source: Iterator[Batch], measuring: bool) -> tuple[Tensor, Tensor | None]:
        """One optimizer step: -> mean loss over its micro-batches, norm of the gradient where it was clipped."""
        config, task = self.config, self.task
        if task.lr_factor is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * task.lr_factor(self.result.step)
        total = torch.zeros((), device=self.device)
        activations: dict[str, int] = {}
        for micro in range(config.gradient_accumulation_steps):
            batch = to_device(next(source), self.device)
            with synchronising(self.wrapper, micro == config.gradient_accumulation_steps - 1):
                if measuring and micro == 0:
                    saved = SavedActivations(self.inner, by_layer=not config.compile)
                    loss = self._forward(batch, saved)
                    activations = saved.by_layer()
                else:
                    loss = self._forward(batch, nullcontext())
                self.scaler.scale(loss / config.gradient_accumulation_steps).backward()
            total += loss.detach()
        total = total / config.gradient_accumulation_steps
        norm = None
        if task.parts is not None and task.apart:
            task.parts.average_gradients()
            if self.scaler.is_enabled():
                self._skip_together()
        if config.grad_clip > 0:
            self.scaler.unscale_(self.optimizer)
            clip = task.clip or (lambda limit: nn.utils.clip_grad_norm_(self.trainable, limit))
            norm = clip(config.grad_clip)
        scale, skips = self.scaler.get_scale(), getattr(self.optimizer, "skipped_steps", 0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        stepped = self.scaler.get_scale() >= scale  # float16: the scaler lowers its scale where it skips the step
        left_alone = getattr(self.optimizer, "skipped_steps", 0) > skips  # GaLore: a gradient was not finite
        if measuring and stepped:
            self.result.ledger = measure(self.inner, self.optimizer, activations)
        self.optimizer.zero_grad(set_to_none=True)
        if stepped:
            self.after_step()
        self.progress.finite &= total.isfinite()
        searching = not stepped and self.scaler.get_scale() >= 1  # the scaler still looks for its scale
        self.keeper.count_skip(left_alone or not stepped, 0 if searching else config.max_skipped)
        return total, norm

    def _skip_together(self) -> None:
        """Let an overflow in one process's gradients skip the step in all: their clocks must agree."""
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        if any_rank(int(not all(bool(g.isfinite().all()) for g in gradients))):
            gradients[0].fill_(math.inf)

    def _forward(self, batch: Batch, recording: AbstractContextManager[Any]) -> Tensor:
        dtype = DTYPES[self.config.dtype]
        with self.task.saving(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32), recording:
            return one_number(self.task.loss(self.model, batch))

    # -- looking: evaluation, checkpoints, metrics -----------------------------------------------------------------

    def _look(self, signals: StopSignals) -> None:
        """Evaluate and save if the current step asks for it."""
        config, step, progress = self.config, self.result.step, self.progress
        last = step >= config.max_iters
        new_best = False
        if last and step and self.run is None:  # where there is one, they are looked at before each checkpoint
            self.keeper.check_weights()
        if self.task.evaluate is not None and not progress.evaluated and (step % config.eval_interval == 0 or last):
            self.keeper.check_finite()
            self.peaks.begin("evaluation")
            before, modes = rng_state(), [(m, m.training) for m in self.inner.modules()]
            try:
                with signals.leaving_at_once() if world().size == 1 else nullcontext():
                    row = self._evaluate()
            except LeaveEvaluation:
                row = None
            finally:
                for module, training in modes:  # a module that the caller put into eval mode stays there
                    module.training = training
                set_rng_state(before)
            if row is None:
                stop(self.keeper, signals.received)
                return
            value = row[config.best_metric]
            if not math.isfinite(value):
                progress.finite.fill_(False)
                self.keeper.check_finite()
            self.result.evaluation = row
            best = self.result.best
            if best is None or (value > best[1] if config.higher_is_better else value < best[1]):
                self.result.best = (step, value)
                new_best = True
            self.keeper.write({"step": step, "split": "val", **row})
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
            self.console.say(f"step {step}: validation {numbers}")
            progress.evaluated = True
        every = config.checkpoint_interval or config.eval_interval
        due = last or step % every == 0 or (new_best and step > 0)
        if self.run is not None and step != progress.saved_step and due:
            self.keeper.save()

    def _evaluate(self) -> dict[str, float]:
        assert self.task.evaluate is not None
        self.inner.eval()
        dtype = DTYPES[self.config.dtype]
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return numbers_of(self.task.evaluate(self.evaluated_model), self.config.best_metric)

    def _log(self, loss: float, norm: Tensor | None, rate: float, bar: Any) -> None:
        self.keeper.check_finite()
        config, result = self.config, self.result
        row: dict[str, Any] = {"step": result.step, "split": "train", "loss": loss}
        row["lr"] = None if (lr := self.optimizer.param_groups[0]["lr"]) is None else float(lr)  # Adafactor's own
        if norm is not None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if self.task.apart:  # the root of the sum of the parts' squares
                norm = (mean_over_ranks(norm.square()) * world().size).sqrt()
            row["grad_norm"] = float(norm)
        row |= {f"{config.unit}_per_second": round(rate, 1)} if config.units_per_step else {}
        row["seconds"] = round(result.seconds, 3)
        row |= {"skipped": result.skipped_steps} if result.skipped_steps else {}
        self.keeper.write(row)
        speed = f"{format_count(rate)} {config.unit}/s, " if config.units_per_step else ""
        shown = f"loss {loss:.4f}, {speed}{format_bytes(memory_in_use(self.device))}"
        shown += f", {result.skipped_steps} skipped" if result.skipped_steps else ""
        bar.set_postfix_str(shown, refresh=False)

    def _agree_to_stop(self, signals: StopSignals) -> None:
        """Stop if a signal came to any process; asked at every step, or, of parts, where the processes speak."""
        if self.task.seldom and not (self.scaler.is_enabled() or self.config.processes_speak(self.result.step)):
            return
        signum = any_rank(signals.received)
        if signum:
            stop(self.keeper, signum)
