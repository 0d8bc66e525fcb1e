"""What layers with heads need of a batch: how many rows it has, and gradients as of a chunk's own mean loss."""

from typing import Any

import torch
from torch import Tensor, nn


class BatchSize:
    """A forward pre-hook of the model that has heads: how many rows the batch has. 0: not known, or evaluation."""

    rows = 0

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        sizes = [t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
        self.rows = sizes[0] if sizes and model.training else 0


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return g * ctx.factor, None
