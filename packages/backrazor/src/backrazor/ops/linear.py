"""Linear layers: the input is pruned; dx and db are exact, dW is approximate and one two-dimensional product."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..function import Function, Kept, save
from ..keeper import Keeper
from ..weights import rank
from .logits import Logits, is_head


class Linear(Function):
    """y = x Wᵀ + b, or y = x W + b with ``rows_in`` (GPT-2's Conv1D stores W as (in, out)).

    x (…, in), W (out, in), b (out,); g = dL/dy (…, out); x̂ the pruned x:
    dx = g W (exact), dW = gᵀ x̂ (approximate), db = Σ g (exact).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows_in: bool, razor: Keeper) -> Tensor:
        ctx.x_like, ctx.rows_in = (x.shape, x.dtype), rows_in
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, bias.dtype if bias is not None else None
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        held = razor.hold(x) if needs_weight else None
        save(ctx, x=held, weight=weight if needs_x else None)
        if not rows_in:
            return F.linear(x, weight, bias)
        return torch.addmm(bias, x, weight) if bias is not None else torch.matmul(x, weight)

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.x_like
        flat = g.reshape(-1, g.shape[-1])  # (rows, out)
        dx = dweight = dbias = total = None
        kept = Kept(ctx)
        if ctx.needs_input_grad[1]:
            x, gamma, beta = kept.affine("x", g.dtype, shape[-1])
            x = x.reshape(-1, shape[-1])  # (rows, in)
            dweight = x.T @ flat if ctx.rows_in else flat.T @ x
            del x
            per_input = dweight if not ctx.rows_in else dweight.T  # (out, in)
            if gamma is not None:  # gᵀ (x̂ γ + β): cheaper done after the product
                per_input.mul_(gamma)
            if beta is not None:
                total = flat.sum(0)
                per_input.addr_(total, beta)
            dweight = dweight.to(ctx.weight_dtype)
        if ctx.needs_input_grad[0]:
            weight = kept.dense("weight", g.dtype)
            dx = (flat @ (weight.T if ctx.rows_in else weight)).view(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            dbias = (total if total is not None else flat.sum(0)).to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None


def linear(razor: Keeper, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``. Where the weight is frozen PyTorch itself keeps nothing of x."""
    razor.chains.forget(input)
    if bias is not None and bias.dim() != 1:
        return NotImplemented  # one for each row, or in a shape of its own: broadcast as PyTorch does
    if razor.fuses_loss and weight.dim() == 2 and input.numel() and is_head(input, weight):
        return Logits.of(input, weight, bias, functools.partial(_pruned, razor))
    if weight.dim() != 2 or input.numel() == 0:
        return NotImplemented
    if not weight.requires_grad:
        if razor.recompute is None:
            return NotImplemented
        return again(razor, F.linear(input, weight, bias), input, weight, bias, False)
    return again(razor, Linear.apply(input, weight, bias, False, razor), input, weight, bias, False)


def again(razor: Keeper, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows_in: bool) -> Tensor:
    """``y``, which attention or an activation function may make again from what is kept of x (``recompute``)."""
    held = razor.find(x) if razor.recompute is not None and y.requires_grad else None
    if held is None:
        return y

    def make(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.T if rows_in else weight, bias)

    razor.derive(y, make, (held,), (weight, bias) if bias is not None else (weight,), "recomputed")
    return y


def _pruned(razor: Keeper, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A head's output, when something else than the loss uses it: an activation function too, where a wide layer of an
    MLP was taken for a head."""
    y: Tensor = Linear.apply(x, weight, bias, False, razor) if weight.requires_grad else F.linear(x, weight, bias)
    return again(razor, y, x, weight, bias, False)


def addmm(razor: Keeper, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm`` as GPT-2's Conv1D calls it: bias + x W."""
    plain = beta == 1 and alpha == 1 and input.dim() == 1 and input.shape[0] == mat2.shape[-1]
    if not plain or not mat2.requires_grad or mat1.numel() == 0 or rank(mat2) <= rank(mat1):
        return NotImplemented
    return again(razor, Linear.apply(mat1, mat2, input, True, razor), mat1, mat2, input, True)
