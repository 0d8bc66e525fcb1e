"""A linear layer's weight gradient by its two factors, so that it can be projected without being made.

A linear layer y = x Wᵀ + b has the gradient G = Yᵀ X, with Y (N×m) the gradient of its outputs and X (N×n) its inputs,
of N rows. Its projection needs two thin products in the place of the full one (N·m·n multiplications):

    Pᵀ G = (Y P)ᵀ X          N·m·r + N·r·n
    G Qᵀ = Yᵀ (X Qᵀ)         N·n·r + N·m·r

Of the second, X Qᵀ (N×r) is known in the forward pass, and is then all that a layer keeps for the backward pass: n/r
times less than X.
"""

from __future__ import annotations

import copyreg
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from galore_vit.internals import gradient_is_asked_for, transformed
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
        return cls(_blocks(Y, k), X)

    def project(self, bases: Bases) -> Tensor:
        """R = Pᵀ G Qᵀ (…, m or r, n or r), in the bases' dtype."""
        P, Q = bases
        basis = P if P is not None else Q
        assert basis is not None
        Y = self.Y if P is None else self.Y @ P.to(self.Y.dtype)
        X = self.X if Q is None else times_transposed(self.X, Q)
        return (Y.mT @ X).to(basis.dtype)

    def times(self, M: Tensor) -> Tensor:
        """G M (…, m, s) of M (n, s)."""
        return (self.Y.mT @ (self.X @ M.to(self.X.dtype))).to(M.dtype)

    def transposed_times(self, M: Tensor) -> Tensor:
        """Gᵀ M (…, n, s) of M (m, s)."""
        return (self.X.mT @ (self.Y @ M.to(self.Y.dtype))).to(M.dtype)


def _blocks(Y: Tensor, k: int) -> Tensor:
    """(N, k·m) → (k, N, m), a view; (N, m) where k is 1."""
    return Y if k == 1 else Y.unflatten(-1, (k, -1)).transpose(0, 1)


def times_transposed(X: Tensor, Q: Tensor) -> Tensor:
    """X Qᵀ (…, N, r) of X (N, n) and Q (r, n) or (k, r, n), in X's dtype: one product for all k."""
    if Q.ndim == 2:
        return X @ Q.to(X.dtype).mT
    k, r, n = Q.shape
    return (X @ Q.reshape(k * r, n).to(X.dtype).mT).view(-1, k, r).transpose(0, 1)


def projected_from(Y: Tensor, XQ: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """G Qᵀ (…, m, r) of Y (N, k·m) and X Qᵀ (…, N, r)."""
    return (_blocks(Y, k).mT @ XQ).to(dtype)


class Projector(Protocol):
    """Who projects a layer's gradient."""

    def makes_no_gradient(self, p: Tensor) -> bool:
        """Whether the next gradient of the weight p may come by its factors."""

    def kept_basis(self, p: Tensor) -> Tensor | None:
        """Q where the layer is to keep X Qᵀ in the place of X; None where it keeps X."""

    def take(self, p: Tensor, Y: Tensor, X: Tensor, projected: bool) -> None:
        """Called in the backward pass with Y (N, m) and X (N, n), or X Qᵀ where it is projected."""


class Receiver:
    """Holds the projector, until it is closed."""

    def __init__(self, projector: Projector | None) -> None:
        self.projector = projector


class FactoredLinear(nn.Linear):
    """What an `nn.Linear` is while its weight's gradient is handed over by its factors: same numbers, same state. A
    copy of it, or what is read from a file, is an `nn.Linear`, since its weight is another."""

    receiver: Receiver

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        plain = {key: value for key, value in self.__dict__.items() if key != "receiver"}
        return copyreg._reconstructor, (nn.Linear, object, None), plain  # type: ignore[attr-defined]

    def forward(self, input: Tensor) -> Tensor:
        """y = x Wᵀ + b; bit for bit that of `nn.Linear`."""
        receiver: Receiver | None = getattr(self, "receiver", None)
        projector = None if receiver is None else receiver.projector
        if projector is None or not _simple(input, self.weight) or not projector.makes_no_gradient(self.weight):
            return F.linear(input, self.weight, self.bias)
        return _Linear.apply(_as_autocast_would(input), self.weight, self.bias, projector)


def _simple(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a plain forward pass in training; all else is left to PyTorch."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and not weight._backward_hooks  # somebody's hook wants the gradient
        and not torch.compiler.is_compiling()  # a compiled backward pass calls nobody
        and not transformed()
        and not x.is_nested
        and x.layout == torch.strided
    )


def _as_autocast_would(x: Tensor) -> Tensor:
    """x as autocast casts a product's operand; the copy is what is saved."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, projector: Projector) -> Tensor:
        ctx.weight, ctx.projector = weight, projector  # what is unpacked may be another object than the parameter
        ctx.set_materialize_grads(False)
        Q = projector.kept_basis(weight)
        X = x if Q is None else times_transposed(x.reshape(-1, x.shape[-1]), Q)
        # Q too: torch refuses the backward pass if it was replaced in between
        ctx.save_for_backward(X, weight if ctx.needs_input_grad[0] else None, Q)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if dy is None:
            return None, None, None, None
        X, weight, Q = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        rows = dy.reshape(-1, dy.shape[-1])
        dW = None
        asked = gradient_is_asked_for(ctx.weight)
        if asked is None:
            if Q is not None:
                raise RuntimeError(
                    "torch.autograd.grad asks for the gradient of a weight of whose layer only X Qᵀ was kept: call "
                    'backward(), or take norm="sketch", which keeps X'
                )
            dW = (rows.mT @ X.reshape(-1, X.shape[-1])).to(ctx.weight.dtype)
        elif asked:
            ctx.projector.take(ctx.weight, rows, X if Q is not None else X.reshape(-1, X.shape[-1]), Q is not None)
        return dx, dW, rows.sum(0) if ctx.needs_input_grad[2] else None, None


def hand_over(linear: nn.Linear, receiver: Receiver) -> None:
    """From now on `linear`'s backward pass calls the receiver instead of making the gradient of its weight."""
    linear.__class__ = FactoredLinear
    linear.receiver = receiver  # type: ignore[assignment]


def take_back(linear: nn.Linear) -> None:
    """Makes it an ordinary `nn.Linear` again; one whose class somebody changed meanwhile only goes the ordinary way."""
    layer: Any = linear
    layer.receiver.projector = None  # replicas that share it go the ordinary way, too
    if type(linear) is FactoredLinear:
        del layer.receiver
        layer.__class__ = nn.Linear
