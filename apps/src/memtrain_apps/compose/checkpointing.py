"""Gradient checkpointing as a context: PyTorch's own, around each block of a model that need not know of it."""

from collections.abc import Iterable
from functools import partial
from types import TracebackType

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
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._blocks:
            del block.forward  # the class's own shows again
