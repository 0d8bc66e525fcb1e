"""The training loop: the only one in the repository.

It knows a model, batches by number, a loss, an optimizer, a context under which the forward pass runs (``saving``:
what is kept for the backward pass) and a call after each optimizer step (``after_step``: LTE merges there). What the
methods are, it does not know.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Console, format_bytes, format_count
from ..data.batches import Batch, numbered, to_device
from ..errors import DivergedError, LostRankError, Stopped, UserError
from ..measuring.energy import EnergyMeter
from ..measuring.memory import PeakMeter, SavedActivations, measure, memory_in_use
from ..runs.run_folder import RunFolder
from ..runs.trackers import Tracker, open_tracker
from .distributed import any_rank, mean_over_ranks, unwrap, world
from .evaluation import mean_loss as mean_loss
from .fit_config import DTYPES, FitConfig, FitResult
from .heartbeat import Heartbeat
from .rng import rng_state, set_rng_state
from .stop_signals import LeaveEvaluation, StopSignals
from .training_state import Parts, Stateful, all_finite, capture, check_identity, put_back


def fit(
    model: nn.Module,
    batches: Callable[[int], Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    lr_factor: Callable[[int], float] | None = None,
    saving: Callable[[], AbstractContextManager[Any]] = nullcontext,
    after_step: Callable[[], Any] | None = None,
    clip: Callable[[float], Tensor] | None = None,
    stateful: Mapping[str, Stateful] | None = None,
    parts: Parts | None = None,
    run: RunFolder | None = None,
    resume: bool = False,
    resume_path: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    console: Console | None = None,
    label: str = "",
) -> FitResult:
    """Train ``model`` for ``config.max_iters`` optimizer steps.

    Args:
        model: on its device already; wrapped by :func:`memtrain_common.training.distributed.parallelize` where wanted.
        batches: ``batches(i)`` is micro-batch i, a pure function of i: this process's share of it, as tensors in
            tuples, lists or dicts. Resuming asks for the i it stopped at, and needs nothing else.
        loss_fn: (model, batch) -> the mean loss over the batch, a scalar.
        optimizer: over the parameters of ``model``.
        evaluate: model -> numbers by name, ``config.best_metric`` among them; called in eval mode without
            gradients at step 0, every ``eval_interval`` steps and at the end, with the random generators put back
            afterwards. On several processes every one calls it, and it must give the same numbers on all.
        lr_factor: step -> factor on each group's own learning rate.
        saving: makes the context of each forward pass.
        after_step: called after each optimizer step; not after one that float16's scaler skipped.
        clip: called with ``grad_clip`` instead of clipping by the norm of all gradients; returns the norm.
        stateful: further states to keep in checkpoints, by name.
        parts: on several processes, where each holds a part of the model that no wrapper looks after (LTE's heads):
            how to share gradients, and how checkpoints are put together and cut. ``clip`` then returns this process's
            part of the norm, and the processes speak at logged steps, evaluations, checkpoints and every
            ``agree_interval`` steps only.
        run: where metrics, checkpoints, ledger and energy go; None keeps none of them.
        resume: go on from the newest valid checkpoint of ``run``, if it has one.
        resume_path: the folder that a stopped user is told to resume, if not the run's own.
        identity: what a checkpoint must agree in (the configuration); checked when resuming.
        console: where lines and the progress bar go; None is silent.
        label: the progress bar's name.

    Raises:
        Stopped: after SIGTERM, SIGINT or SIGUSR1, with a checkpoint written.
        DivergedError: when the loss or a weight is no longer finite; such weights are never saved.
        LostRankError: when another process is gone; with ``parts``, after this one's state was saved.
        UserError: if a checkpoint does not fit the model, or cannot be written.
    """
    trainer = _Trainer(model, batches, loss_fn, optimizer, config, console or Console(quiet=True), run)
    trainer.evaluate, trainer.lr_factor, trainer.saving = evaluate, lr_factor, saving
    trainer.after_step, trainer.clip, trainer.stateful = after_step, clip, dict(stateful or {})
    trainer.identity, trainer.parts = dict(identity or {}), parts
    trainer.apart = parts is not None and parts.apart
    trainer.resume_path = resume_path or (run.path if run is not None else None)
    return trainer.train(resume, label)


class _Trainer:
    """The state of one call of :func:`fit`."""

    evaluate: Callable[[nn.Module], dict[str, float]] | None
    lr_factor: Callable[[int], float] | None
    saving: Callable[[], AbstractContextManager[Any]]
    after_step: Callable[[], Any] | None
    clip: Callable[[float], Tensor] | None
    stateful: dict[str, Stateful]
    identity: dict[str, Any]
    parts: Parts | None
    apart: bool
    resume_path: Path | None

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[int], Batch],
        loss_fn: Callable[[nn.Module, Batch], Tensor],
        optimizer: torch.optim.Optimizer,
        config: FitConfig,
        console: Console,
        run: RunFolder | None,
    ) -> None:
        self.inner = unwrap(model)
        self.model: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
        self.wrapper = model  # DDP's no_sync and FSDP's switch are on this one
        replicated = isinstance(model, nn.parallel.DistributedDataParallel)
        self.evaluated_model = self.inner if replicated else self.model  # DDP would broadcast buffers at each forward
        self.batches, self.loss_fn, self.optimizer = batches, loss_fn, optimizer
        self.config, self.console, self.run = config, console, run
        self.device = next(self.inner.parameters()).device
        self.trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.peaks = PeakMeter(self.device)
        self.result = FitResult()
        self.evaluated = False  # whether the evaluation due at the current step is done
        self.saved_step = 0  # nothing is saved before the first step: there is nothing to lose
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.tracker: Tracker | None = None
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, resume: bool, label: str) -> FitResult:
        config, result = self.config, self.result
        if resume:
            self._restore()
        gpus = range(world().local_size) if self.device.type == "cuda" else ()
        meter = EnergyMeter(self.run.path / "energy.csv" if self.run and self.run.writes else None, gpus=gpus)
        result.energy_source = meter.source
        if self.run and self.run.writes:
            since = result.step if resume else None
            names = {"project": config.tracker_project, "name": config.tracker_name}
            self.tracker = open_tracker(config.tracker, self.run.path, self.identity, resume_step=since, **names)
        bar = self.console.progress(config.max_iters, initial=result.step, label=label)
        micro = config.gradient_accumulation_steps
        source = numbered(self.batches, range(result.step * micro, config.max_iters * micro), config.workers)
        first, timed_from = result.step, result.seconds
        lapse = 0.0  # seconds of training since the last logged step
        try:
            with StopSignals() as stop, meter, self._rescuing(), self._heartbeat() as heartbeat:
                while True:
                    self._look(stop)
                    self._agree_to_stop(stop)  # a signal came while something was saved
                    if result.step >= config.max_iters:
                        break
                    heartbeat.check()
                    self.peaks.begin("training")
                    began = time.perf_counter()
                    loss, norm = self._step(source, measuring=result.ledger is None)
                    result.step += 1
                    self.evaluated = False
                    logged = result.step % config.log_interval == 0 or result.step == config.max_iters
                    if logged:
                        value = float(mean_over_ranks(loss))  # waits for the device
                    spent = time.perf_counter() - began
                    lapse += spent
                    result.seconds += spent
                    if result.step == first + 1:
                        timed_from = result.seconds
                        self._save_ledger()
                    bar.update()
                    if logged:
                        steps = result.step - max(first, (result.step - 1) // config.log_interval * config.log_interval)
                        self._log(value, norm, steps * config.units_per_step / lapse, bar)
                        lapse = 0.0
                    self._agree_to_stop(stop)
                result.joules = meter.joules
        except KeyboardInterrupt:
            self._stop_at_once()
        finally:
            bar.close()
            self.peaks.end()
            if self.tracker is not None:
                self.tracker.close()
        result.peak_bytes = {phase: self.peaks.peak(phase) for phase in ("training", "evaluation")}
        timed = result.step - first - 1
        if timed > 0:
            result.units_per_second = timed * config.units_per_step / (result.seconds - timed_from)
        elif result.seconds > 0:  # nothing was timed in this process: what all of them took
            result.units_per_second = result.step * config.units_per_step / result.seconds
        self._save_ledger()
        return result

    def _step(self, source: Iterator[Batch], measuring: bool) -> tuple[Tensor, Tensor | None]:
        """One optimizer step: -> mean loss over its micro-batches, norm of the gradient where it was clipped."""
        config = self.config
        if self.lr_factor is not None:
            factor = self.lr_factor(self.result.step)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        total = torch.zeros((), device=self.device)
        activations: dict[str, int] = {}
        for micro in range(config.gradient_accumulation_steps):
            batch = to_device(next(source), self.device)
            with self._synchronising(micro == config.gradient_accumulation_steps - 1):
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
        if self.parts is not None and self.apart:
            self.parts.average_gradients()
            if self.scaler.is_enabled():
                self._skip_together()
        if config.grad_clip > 0:
            self.scaler.unscale_(self.optimizer)
            clip = self.clip or (lambda limit: nn.utils.clip_grad_norm_(self.trainable, limit))
            norm = clip(config.grad_clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        stepped = self.scaler.get_scale() >= scale  # float16: the scaler lowers its scale where it skips the step
        if measuring and stepped:
            self.result.ledger = measure(self.inner, self.optimizer, activations)
        self.optimizer.zero_grad(set_to_none=True)
        if self.after_step is not None and stepped:
            self.after_step()
        self.finite &= total.isfinite()
        return total, norm

    def _skip_together(self) -> None:
        """Let an overflow in one process's gradients skip the step in all: their clocks must agree."""
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        if any_rank(int(not all(bool(g.isfinite().all()) for g in gradients))):
            gradients[0].fill_(math.inf)

    def _forward(self, batch: Batch, recording: AbstractContextManager[Any]) -> Tensor:
        dtype = DTYPES[self.config.dtype]
        with self.saving(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32), recording:
            return self.loss_fn(self.model, batch)

    def _synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """Let processes exchange gradients at the last micro-batch of a step only."""
        wrapper: Any = self.wrapper
        if hasattr(wrapper, "set_requires_gradient_sync"):  # FSDP2
            wrapper.set_requires_gradient_sync(last)
        elif not last and hasattr(wrapper, "no_sync"):  # DDP
            return wrapper.no_sync()
        return nullcontext()

    # -- looking: evaluation, checkpoints, metrics -----------------------------------------------------------------

    def _look(self, stop: StopSignals) -> None:
        """Evaluate and save if the current step asks for it."""
        config, step = self.config, self.result.step
        last = step >= config.max_iters
        new_best = False
        if self.evaluate is not None and not self.evaluated and (step % config.eval_interval == 0 or last):
            self._check_finite()
            self.peaks.begin("evaluation")
            before, modes = rng_state(), [(m, m.training) for m in self.inner.modules()]
            try:
                with stop.leaving_at_once() if world().size == 1 else nullcontext():
                    row = self._evaluate()
            except LeaveEvaluation:
                row = None
            for module, training in modes:  # a module that the caller put into eval mode stays there
                module.training = training
            set_rng_state(before)
            if row is None:
                self._stop(stop.received)
                return
            value = row[config.best_metric]
            if not math.isfinite(value):
                self.finite.fill_(False)
                self._check_finite()
            self.result.evaluation = row
            best = self.result.best
            if best is None or (value > best[1] if config.higher_is_better else value < best[1]):
                self.result.best = (step, value)
                new_best = True
            self._write({"step": step, "split": "val", **row})
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
            self.console.say(f"step {step}: validation {numbers}")
            self.evaluated = True
        every = config.checkpoint_interval or config.eval_interval
        due = last or step % every == 0 or (new_best and step > 0)
        if self.run is not None and step != self.saved_step and due:
            self._save()

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        self.inner.eval()
        dtype = DTYPES[self.config.dtype]
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.evaluate(self.evaluated_model)

    def _log(self, loss: float, norm: Tensor | None, rate: float, bar: Any) -> None:
        self._check_finite()
        config, result = self.config, self.result
        row: dict[str, Any] = {"step": result.step, "split": "train", "loss": loss}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        if norm is not None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if self.apart:  # the root of the sum of the parts' squares
                norm = (mean_over_ranks(norm.square()) * world().size).sqrt()
            row["grad_norm"] = float(norm)
        row[f"{config.unit}_per_second"] = round(rate, 1)
        row["seconds"] = round(result.seconds, 3)
        self._write(row)
        shown = f"loss {loss:.4f}, {format_count(rate)} {config.unit}/s, {format_bytes(memory_in_use(self.device))}"
        bar.set_postfix_str(shown, refresh=False)

    def _write(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.append_metrics([row])
        if self.tracker is not None:
            self.tracker.log(row)

    def _check_finite(self) -> None:
        if not any_rank(int(not self.finite)):
            return
        kept = self.run.checkpoints.steps() if self.run is not None else []
        where = f"the last good checkpoint is that of step {kept[-1]}" if kept else "there is no checkpoint yet"
        raise DivergedError(
            f"training diverged: the loss was no longer finite by step {self.result.step}; {where}; "
            "try a lower learning rate"
        )

    def _save_ledger(self) -> None:
        if self.run is not None and self.run.writes and self.result.ledger is not None:
            self.result.ledger.save(self.run.path / "memory.json", peak_bytes=self.result.peak_bytes)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> Any:
        assert self.run is not None
        self.finite &= all_finite(self.inner)
        self._check_finite()
        self.saved_step = self.result.step
        return self.run.checkpoints.save(self.result.step, self._state(), best=self._best_step())

    def _state(self, *, alone: bool = False) -> dict[str, Any]:
        assert self.run is not None
        result = self.result
        progress = {
            "step": result.step,
            "evaluated": self.evaluated,
            "seconds": result.seconds,
            "evaluation": result.evaluation,
            "best": result.best,
            "metrics_bytes": self.run.metrics_bytes(),
        }
        return capture(
            self.inner, self.optimizer, self._others(), parts=self.parts, alone=alone, progress=progress,
            identity=self.identity,
        )  # fmt: skip

    def _best_step(self) -> int | None:
        return self.result.best[0] if self.result.best else None

    def _others(self) -> dict[str, Stateful]:
        return {**self.stateful, "scaler": self.scaler}

    def _agree_to_stop(self, stop: StopSignals) -> None:
        """Stop if a signal came to any process; asked at every step, or less often where processes seldom speak."""
        if self.apart and self.result.step % self.config.agree_interval:
            return
        signum = any_rank(stop.received)
        if signum:
            self._stop(signum)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self.config.patience_s if self.apart else 0.0)

    @contextmanager
    def _rescuing(self) -> Iterator[None]:
        """When another process is lost: save what this one can vouch for, and leave."""
        try:
            yield
        except ConnectionAbortedError as error:
            message = f"stopped at step {self.result.step}: {error}; "
            if self.run is None:
                raise LostRankError(message + "nothing was saved, since there is no run folder") from None
            go_on = f"; go on with --resume {self.resume_path}"
            if not self.apart or not bool(self.finite & all_finite(self.inner)):
                kept = self.run.checkpoints.steps()
                last = f"the last checkpoint is that of step {kept[-1]}" if kept else "there is no checkpoint yet"
                raise LostRankError(message + last + go_on) from None
            saved = self.run.checkpoints.rescue(
                self.result.step, self._state(alone=True), best=self._best_step(), every=self.config.agree_interval
            )
            what = f"checkpoint {saved} holds" if saved else "another process saves"
            raise LostRankError(f"{message}{what} the last merged weights, for new heads{go_on}") from None

    def _stop(self, signum: int) -> None:
        """Save and leave because of a signal."""
        message = f"stopped by {Stopped(signum, '').name} at step {self.result.step}"
        if self.run is None:
            raise Stopped(signum, f"{message}; nothing was saved, since there is no run folder")
        step = self.result.step
        path = self.run.checkpoints.path(step) if self.saved_step == step else self._save()
        raise Stopped(signum, f"{message}; checkpoint {path}; go on with --resume {self.resume_path}")

    def _stop_at_once(self) -> None:
        """Leave on a second Ctrl-C, without saving."""
        steps = self.run.checkpoints.steps() if self.run is not None else []
        kept = f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint"
        message = f"stopped at once by a second SIGINT in step {self.result.step + 1}; {kept}"
        raise Stopped(signal.SIGINT, message) from None

    def _restore(self) -> None:
        """Take up the newest valid checkpoint; where there is none, begin the run anew."""
        if self.run is None:
            raise ValueError("resume=True needs a run folder: pass run=")
        checkpoints, say = self.run.checkpoints, self.console.say
        found = checkpoints.load_newest(say)
        if found is None:
            if checkpoints.steps():
                raise UserError(f"no checkpoint in {checkpoints.folder} is intact: begin a new run with another --out")
            say(f"{self.run.path} has no checkpoint yet: beginning at step 0")
            self.run.truncate_metrics(0)
            return
        step, state = found
        where = checkpoints.path(step)
        check_identity(state["identity"], self.identity, where)
        put_back(state, self.inner, self.optimizer, self._others(), where=where, say=say, parts=self.parts)
        progress, result = state["progress"], self.result
        result.step, result.seconds, result.evaluation = step, progress["seconds"], progress["evaluation"]
        result.best, self.evaluated, self.saved_step = progress["best"], progress["evaluated"], step
        self.run.truncate_metrics(progress["metrics_bytes"])
        say(f"resumed from {where}")
