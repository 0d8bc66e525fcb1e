"""Linear layers: the input is pruned; dx and db are exact, dW is approximate and one two-dimensional product."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .function import Function, rebuild, save

if TYPE_CHECKING:
    from .razor import Razor


class Linear(Function):
    """y = x Wᵀ + b.

    x (…, in), W (out, in), b (out,); g = dL/dy (…, out):
    dx = g W (exact), dW = gᵀ x̂ (x̂ is the pruned x), db = Σ g (exact).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, razor: "Razor") -> Tensor:
        ctx.x_like = (x.shape, x.dtype)
        holder = razor.hold(x) if ctx.needs_input_grad[1] else None
        save(ctx, x=holder, weight=weight if ctx.needs_input_grad[0] else None)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, bias.dtype if bias is not None else None
        return F.linear(x, weight, bias)

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.x_like
        flat = g.reshape(-1, g.shape[-1])  # (rows, out)
        dx = dweight = dbias = None
        kept = rebuild(ctx, g.dtype)
        if ctx.needs_input_grad[1]:
            x = kept.pop("x").reshape(-1, shape[-1])  # (rows, in)
            dweight = (flat.T @ x).to(ctx.weight_dtype)
            del x
        if ctx.needs_input_grad[0]:
            dx = (flat @ kept["weight"]).view(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            dbias = flat.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias, None


def linear(razor: "Razor", input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The rule for ``F.linear``: without a trained weight nothing of x is saved by PyTorch either."""
    if not weight.requires_grad:
        return NotImplemented
    out: Tensor = Linear.apply(input, weight, bias, razor)
    return out
