"""Gradient checkpointing as a context: PyTorch's own, around each block of a model that need not know of it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointBlocks:
    """While open, a block keeps only its inputs, and its backward pass runs its forward pass again.

    The context may be entered anew for each forward pass; the backward pass may come after it is closed.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._blocks = list(blocks)

    def __enter__(self) -> None:
        for block in self._blocks:
            counting = [m for m in block.modules() if m._buffers.get("running_mean") is not None]
            once = {"context_fn": partial(_statistics_once, counting)} if counting else {}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **once)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._blocks:
            del block.forward  # the class's own shows again


def _statistics_once(
    modules: list[nn.Module],
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of the forward pass and of its repetition, in which running statistics have moved already."""
    return nullcontext(), _Spared(modules)


class _Spared:
    """What the modules count while it is open goes to copies of their buffers, which are forgotten. A graph that is run
    backward twice opens it twice."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules

    def __enter__(self) -> None:
        self._own = [dict(m._buffers) for m in self._modules]
        for module, buffers in zip(self._modules, self._own, strict=True):
            module._buffers.update({n: b if b is None else b.clone() for n, b in buffers.items()})

    def __exit__(self, *_: object) -> None:
        for module, buffers in zip(self._modules, self._own, strict=True):
            module._buffers.update(buffers)
