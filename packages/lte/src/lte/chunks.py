"""What layers with heads need of a batch: how many rows it has, and gradients as of a chunk's own mean loss."""

from typing import Any

import torch
from torch import Tensor, nn


class BatchSize:
    """A forward pre-hook of the model that has heads: how many rows the batch has. 0: not known, or evaluation.

    Args:
        trained: which parameters of the plain model were trained, by name.
    """

    def __init__(self, trained: dict[str, bool]) -> None:
        self.rows, self.trained = 0, trained

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        sizes = [t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
        self.rows = sizes[0] if sizes and model.training else 0

    def forget(self, model: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: what is called by another way than the model's forward has another batch."""
        if not torch.compiler.is_compiling():
            self.rows = 0


def equal_chunks(path: str, rows: int, heads: int, batch: BatchSize | None) -> None:
    """Whether a layer's input can be cut into equal chunks of the batch, one a head.

    Args:
        path: the layer's name, and ``rows`` the size of its input's dim 0.

    Raises:
        ValueError: if not.
    """
    known = 0 if batch is None or torch.compiler.is_compiling() else batch.rows
    if known and rows % known:
        raise ValueError(
            f"{path} meets {rows} rows, no multiple of the batch of {known}: it is fed by a table (of positions), by "
            "routed tokens or by a sequence, which heads cannot share out; add it to exclude, leave its kind out of "
            "replicas and vectors, or use mode='sequential'"
        )
    if rows % heads:
        raise ValueError(f"a batch of {rows} cannot be cut into {heads} equal chunks, one a head")


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return g * ctx.factor, None
