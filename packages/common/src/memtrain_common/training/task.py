"""What is trained: one frozen dataclass that every command, workload and composition makes, and ``fit`` takes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..data.batches import Batch, to_device
from .training_state import Parts, Stateful

EVAL_MODE = (
    "the model is in eval mode, as from_pretrained gives it, and is trained so: dropout does nothing, and batch norm "
    "keeps its statistics; call model.train() before fit, and .eval() of single modules that are to stay so"
)


@dataclass(frozen=True)
class Task:
    """A model with everything that an optimizer step needs."""

    model: nn.Module
    """On its device; wrapped by :func:`memtrain_common.training.distributed.parallelize` where wanted. It is trained in
    the mode that each of its modules is in: call ``train()`` before, and ``eval()`` of what is to stay so."""
    batches: Callable[[int], Batch]
    """``batches(i)`` is micro-batch i, a pure function of i: this process's share of it, as tensors in tuples, lists
    or dicts. Resuming asks for the i it stopped at, and needs nothing else."""
    loss: Callable[[nn.Module, Batch], Tensor]
    """(model, batch) -> the mean loss over the batch, a scalar."""
    optimizer: torch.optim.Optimizer | None = None
    """Over the parameters of ``model``; None until a composition has chosen one."""
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    """model -> numbers by name, the best metric among them; called in eval mode without gradients at step 0, every
    ``eval_interval`` steps and at the end, with the random generators put back afterwards. On several processes every
    one calls it, and it must give the same numbers on all."""
    lr_factor: Callable[[int], float] | None = None
    """step -> factor on each group's own learning rate."""
    saving: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes the context of each forward pass: what is kept for the backward pass."""
    after_step: Callable[[], Any] | None = None
    """Called after each optimizer step, and may change weights; not after one that float16's scaler skipped."""
    after_first_step: Callable[[], Any] | None = None
    """Called once, after the first such step of this process: to look whether it reached what is trained."""
    clip: Callable[[float], Tensor] | None = None
    """Called with ``grad_clip`` instead of clipping by the norm of all gradients; returns the norm."""
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    """Further states to keep in checkpoints, by name."""
    fresh: tuple[str, ...] = ()
    """Modules of the plain model, besides the task head, that begin at random: whatever a method trains, these too."""
    parts: Parts | None = None
    """On several processes, where each holds a part of the model that no wrapper looks after (LTE's heads): how to
    share gradients, and how checkpoints are put together and cut. ``clip`` then returns this process's part of the
    norm, and the processes speak at logged steps, evaluations, checkpoints and every ``agree_interval`` steps only, or
    at each step where they have gradients to share."""

    def needed_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer.

        Raises:
            ValueError: if none has been chosen yet, it is one that wants a closure, or it has nothing to train.
        """
        if self.optimizer is None:
            raise ValueError("a task without an optimizer cannot be trained: give it one")
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS computes the loss several times a step, by a closure, and fit once: take another")
        lazy = next((name for name, p in self.model.named_parameters() if is_lazy(p)), None)
        if lazy is not None:
            raise ValueError(f"{lazy} has no size yet: run one batch through the model before it is trained")
        if not any(p.requires_grad for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError("the optimizer has no parameter that requires a gradient: nothing would be trained")
        return self.optimizer

    def losses(self, n: int) -> Iterator[Tensor]:
        """The losses of micro-batches 0 to n − 1, one after another: for what looks at the data before training."""
        device = next(self.model.parameters()).device
        for i in range(n):
            yield self.loss(self.model, to_device(self.batches(i), device))

    def called_after_steps(self) -> Callable[[], None]:
        """``after_first_step``, the first time, and ``after_step`` as one call."""
        first = [self.after_first_step] if self.after_first_step is not None else []

        def call() -> None:
            if first:
                first.pop()()
            if self.after_step is not None:
                self.after_step()

        return call

    @property
    def apart(self) -> bool:
        """Whether each process holds a part of the model."""
        return self.parts is not None and self.parts.apart

    @property
    def seldom(self) -> bool:
        """Whether such processes have steps at which they say nothing to each other."""
        return self.parts is not None and self.parts.apart and not self.parts.speaks_each_step


def one_number(loss: Tensor) -> Tensor:
    """The loss as a scalar.

    Raises:
        ValueError: if it is several numbers.
    """
    if loss.dim() == 0:
        return loss
    if loss.numel() != 1:
        raise ValueError(f"the loss has the shape {tuple(loss.shape)}, and must be one number: take its mean")
    return loss.reshape(())
