"""The memory ledger in transformers' Trainer.

    trainer = Trainer(model, args, …)
    trainer.add_callback(MemoryLedgerCallback(trainer))

After the first optimizer step Trainer's log has the sizes of weights, gradients, optimizer state, saved activations and
buffers, and the console has the answer to "why no saving?": what each kind of method could save of this step at most.
At the end of training the log has the peaks.
"""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from .console import format_bytes, format_table
from .measuring.memory import CATEGORIES, Ledger, SavedActivations, measure
from .measuring.peak import PeakMeter

MIB = 2**20
LARGEST = 3
"""Layers that are named."""


class MemoryLedgerCallback(TrainerCallback):
    """Measures one training step of a Trainer, and the peaks of training and evaluation.

    The log gets ``memory/weights``, ``memory/gradients``, … ``memory/total`` and, at the end, ``memory/peak_train`` and
    ``memory/peak_evaluation`` (where the system tells), all in MiB. ``memory.json`` in the output folder has every
    layer, in bytes.

    Activations are what the model's forward pass has saved for the backward pass when it returns, of a micro-batch's
    first one with gradients; of several micro-batches the largest. A loss that Trainer computes outside of the model
    adds a little that is not seen.

    Args:
        trainer: through whose ``log`` the numbers go, to TensorBoard and the like too. None: into
            ``trainer_state.json``'s history alone.
        step: the optimizer step that is measured, from 1.
    """

    def __init__(self, trainer: Any = None, *, step: int = 1) -> None:
        if step < 1:
            raise ValueError(f"step counts optimizer steps from 1, got {step}")
        self.ledger: Ledger | None = None
        """What was measured; None until then."""
        self._trainer, self._step = trainer, step
        self._watch: _Forward | None = None
        self._due: dict[str, int] = {}
        self._peak: PeakMeter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Nothing is told of a training that raised: what it left is put away here."""
        self._stop()
        self._due = {}
        self._peak = PeakMeter(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._peak is not None:
            self._peak.begin("train")
        if self.ledger is None and self._watch is None and state.global_step + 1 >= self._step:
            self._watch = _Forward(given["model"], state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._watch is not None:
            self._watch.wait()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After the step and before the gradients go."""
        model, optimizer = given["model"], given["optimizer"]
        if self._watch is None:
            return
        activations = self._watch.by_layer
        self._stop()
        self.ledger = measure(model, optimizer, activations)
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            why = why_no_saving(model, self.ledger)
            self.ledger.save(folder / "memory.json", why_no_saving=why)
            rows = [(c, format_bytes(n)) for c, n in self.ledger.totals.items()]
            print("\n".join(("memory of a training step", format_table(rows), *why)))
        self._due = {**self.ledger.totals, "total": sum(self.ledger.totals.values())}

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Once Trainer has counted the step."""
        if self._due:
            self._log(state, self._due)
        self._due = {}

    def on_prediction_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._peak is not None:
            self._peak.begin("evaluation")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._stop()
        if self.ledger is None:
            warnings.warn(
                f"training ended at step {state.global_step}, before the memory of step {self._step} was measured",
                UserWarning,
                stacklevel=2,
            )
        if self._peak is None:
            return
        self._peak.end()
        peaks = {f"peak_{phase}": self._peak.peak(phase) for phase in ("train", "evaluation")}
        self._log(state, {name: n for name, n in peaks.items() if n is not None})
        self._peak = None

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def _log(self, state: Any, sizes: dict[str, int]) -> None:
        numbers = {f"memory/{name}": n / MIB for name, n in sizes.items()}
        if self._trainer is not None:
            self._trainer.log(numbers)
        elif numbers:
            state.log_history.append({**numbers, "step": state.global_step})


class _Forward:
    """Records what a model's training forward pass saves, once after every :meth:`wait`.

    Its hooks go with the pass that they record, also where that raises: Trainer tells a callback of no exception. One
    that waits for a pass which never came is put away by the next training's.
    """

    _waiting: ClassVar[weakref.WeakSet[_Forward]] = weakref.WeakSet()

    def __init__(self, model: nn.Module, run: object) -> None:
        self.by_layer: dict[str, int] = {}
        self._model, self._run = model, run
        self._saved: SavedActivations | None = None
        self._hook: RemovableHandle | None = None
        for other in list(self._waiting):
            if other._model is model and other._run is not run:
                other.close()
        self.wait()

    def wait(self) -> None:
        """For the next forward pass."""
        if self._hook is None:
            self._hook = self._model.register_forward_pre_hook(self._begin)
            self._waiting.add(self)

    def _begin(self, model: nn.Module, args: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        self.close()
        self._saved = SavedActivations(model).__enter__()
        # The last hook: where the pass raises, torch goes on through a dictionary from which this removes hooks.
        self._hook = model.register_forward_hook(self._end, always_call=True)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        found = self._saved.by_layer() if self._saved is not None else {}
        self.close()
        if sum(found.values()) > sum(self.by_layer.values()):
            self.by_layer = found

    def close(self) -> None:
        if self._saved is not None:
            self._saved.__exit__(None, None, None)
        if self._hook is not None:
            self._hook.remove()
        self._saved = self._hook = None
        self._waiting.discard(self)


def why_no_saving(model: nn.Module, ledger: Ledger) -> list[str]:
    """What each kind of method could save of a measured step at most, in sentences; the most first."""
    total = sum(ledger.totals.values())
    share = {category: ledger.total(category) / total for category in CATEGORIES} if total else {}
    if not share:
        return ["nothing was measured"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained_share = trained / sum(p.numel() for p in model.parameters())
    bounds = [
        (share["activations"], "saving less for the backward pass (checkpointing, Back Razor, a smaller micro-batch)"),
        (share["gradients"] + share["optimizer"], "training fewer numbers (LoRA, LoRA-XS, a head)"),
        (share["optimizer"], "a smaller optimizer state (GaLore, 8-bit AdamW)"),
        (share["weights"], "keeping weights in fewer bits"),
    ]
    lines = [f"why no saving? {trained_share:.1%} of the parameters are trained; of this step's bytes"]
    lines += [f"  {what} can save {bound:.0%} at most" for bound, what in sorted(bounds, reverse=True)]
    category = max(CATEGORIES, key=ledger.total)
    layers = sorted(ledger.bytes_by_layer[category].items(), key=lambda item: -item[1])[:LARGEST]
    named = ", ".join(f"{name} {n / ledger.total(category):.0%}" for name, n in layers)
    lines.append(f"  most are {category}, and of them {named}")
    return lines
