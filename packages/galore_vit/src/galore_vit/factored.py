"""A linear layer's weight gradient by its two factors, so that it can be projected without being made.

A linear layer y = x Wᵀ + b has the gradient G = Yᵀ X, with Y (N×m) the gradient of its outputs and X (N×n) its inputs,
of N rows. Its projection needs two thin products in the place of the full one (N·m·n multiplications):

    Pᵀ G = (Y P)ᵀ X          N·m·r + N·r·n
    G Qᵀ = Yᵀ (X Qᵀ)         N·n·r + N·m·r
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from galore_vit.projection import Bases


@dataclass(frozen=True)
class Factors:
    """G = Yᵀ X as k matrices of m×n that share their X; nothing of that size is ever made."""

    Y: Tensor
    """(N, m), or (k, N, m)."""
    X: Tensor
    """(N, n)."""

    @classmethod
    def of(cls, Y: Tensor, X: Tensor, k: int) -> Factors:
        """Of Y (N, k·m), whose columns are k blocks of rows of the weight."""
        return cls(Y if k == 1 else Y.unflatten(-1, (k, -1)).transpose(0, 1), X)

    def project(self, bases: Bases) -> Tensor:
        """R = Pᵀ G Qᵀ (…, m or r, n or r), in the bases' dtype."""
        P, Q = bases
        Y = self.Y if P is None else self.Y @ P.to(self.Y.dtype)
        X = self.X if Q is None else _times_transposed(self.X, Q.to(self.X.dtype))
        return (Y.mT @ X).to((P if P is not None else Q).dtype)  # type: ignore[union-attr]  # one of them is there

    def times(self, M: Tensor) -> Tensor:
        """G M (…, m, s) of M (n, s)."""
        return (self.Y.mT @ (self.X @ M.to(self.X.dtype))).to(M.dtype)

    def transposed_times(self, M: Tensor) -> Tensor:
        """Gᵀ M (…, n, s) of M (m, s)."""
        return (self.X.mT @ (self.Y @ M.to(self.Y.dtype))).to(M.dtype)


def _times_transposed(X: Tensor, Q: Tensor) -> Tensor:
    """X Qᵀ of X (N, n) and Q (r, n) or (k, r, n): one product for all k."""
    if Q.ndim == 2:
        return X @ Q.mT
    k, r, n = Q.shape
    return (X @ Q.reshape(k * r, n).mT).view(-1, k, r).transpose(0, 1)


Take = Callable[[Tensor, Tensor, Tensor], None]
"""What is called in the backward pass with a weight, Y (N, m) and X (N, n)."""


class Receiver:
    """Who takes a layer's factors. A copy of the layer, or one read from a file, has nobody: its weight is another."""

    def __init__(self, wanted: Callable[[Tensor], bool] | None, take: Take | None) -> None:
        self.wanted, self.take = wanted, take

    def __deepcopy__(self, memo: Any) -> Receiver:
        return Receiver(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Receiver, (None, None)


class FactoredLinear(nn.Linear):
    """What an `nn.Linear` is while its weight's gradient is handed over by its factors: same numbers, same state."""

    receiver: Receiver

    def forward(self, input: Tensor) -> Tensor:
        """y = x Wᵀ + b; bit for bit that of `nn.Linear`."""
        wanted, take = self.receiver.wanted, self.receiver.take
        weight = self.weight
        if (
            wanted is None
            or take is None
            or not (torch.is_grad_enabled() and weight.requires_grad)
            or torch.compiler.is_compiling()  # a compiled backward pass calls nobody: it makes the gradient
            or not wanted(weight)
        ):
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))  # as autocast would; its copy is what is saved
        return _Linear.apply(input, weight, self.bias, take)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, take: Take) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.take = weight, take  # what is unpacked may be another object than the parameter
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        rows = dy.reshape(-1, dy.shape[-1])
        ctx.take(ctx.weight, rows, x.reshape(-1, x.shape[-1]))
        return dx, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None


def hand_over(linear: nn.Linear, receiver: Receiver) -> None:
    """From now on `linear`'s backward pass calls the receiver instead of making the gradient of its weight."""
    linear.__class__ = FactoredLinear
    linear.receiver = receiver  # type: ignore[assignment]


def take_back(linear: nn.Linear) -> None:
    """Makes it an ordinary `nn.Linear` again."""
    del linear.receiver
    linear.__class__ = nn.Linear
