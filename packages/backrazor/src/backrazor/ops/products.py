"""Elementwise products, and what a chain that ends in a product becomes (:mod:`.chains`).

* big · small (a weight, a gate of few elements): d small is a sum over the big one, which is pruned; d big is exact.
* two activations of one size (a gated MLP's gate and up): each is kept in 8.125 bits, since both gradients are
  elementwise.
* a factor that needs no gradient (a rotary embedding's cos and sin, a mask): PyTorch keeps that factor by reference
  only.
"""

from typing import Any

import torch
from torch import Tensor

from ..function import Function, Kept, save
from ..keeper import Keeper
from ..saved import Affine, Dense, Saved
from ..store import Held
from .pointwise import ACTIVATIONS, channel_of

SMALL = 16
"""A factor with at most a sixteenth of the other's elements is small."""


class Scaled(Function):
    """y = x w with a w that is small, or a weight: dx = g w (exact), dw = Σ g x̂.

    Where nothing is summed, dw is elementwise, and x is kept in 8.125 bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, razor: Keeper) -> Tensor:
        ctx.like = (x.shape, x.dtype, w.shape, w.dtype)
        y = x * w
        held = None
        if ctx.needs_input_grad[1]:
            small = w.numel() * SMALL <= x.numel()
            held = razor.hold(x, "input", (channel_of(x),)) if small else _factor(razor, x)
        save(ctx, x=held, w=w if ctx.needs_input_grad[0] else None)
        if held is not None and razor.mode != "paper" and y.dtype == x.dtype and razor.same_geometry(held, x, y):
            base = held.saved
            tensors = (*base.tensors, w.detach())
            razor.share(
                y, Saved(tensors, Affine(base.recipe.geometry, base.recipe, len(base.tensors), True, False)), held
            )
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        x_shape, x_dtype, w_shape, w_dtype = ctx.like
        dx = dw = None
        if ctx.needs_input_grad[1]:
            x = kept.dense("x", g.dtype, own=True)
            dw = (x.mul_(g) if x.shape == g.shape else x * g).sum_to_size(w_shape).to(w_dtype)
        if ctx.needs_input_grad[0]:
            dx = (g * kept.dense("w", g.dtype)).sum_to_size(x_shape).to(x_dtype)
        return dx, dw, None


def _factor(razor: Keeper, x: Tensor) -> Held:
    """A factor of two activations' product: low-bit, or in 8 bits in the other modes."""
    return razor.hold(x, "activation", (channel_of(x),)) if razor.mode == "low-bit" else razor.hold_eight_bit(x)


class Product(Function):
    """y = a b of two activations; dA = g b̃, dB = g ã, with tildes on the copies that are kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, razor: Keeper) -> Tensor:
        ctx.like = (a.shape, a.dtype, b.shape, b.dtype)
        needs_a, needs_b, _ = ctx.needs_input_grad
        save(ctx, a=_factor(razor, a) if needs_b else None, b=_factor(razor, b) if needs_a else None)
        return a * b

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        a_shape, a_dtype, b_shape, b_dtype = ctx.like
        da = db = None
        if ctx.needs_input_grad[0]:
            da = (kept.dense("b", g.dtype) * g).sum_to_size(a_shape).to(a_dtype)
        if ctx.needs_input_grad[1]:
            db = (kept.dense("a", g.dtype) * g).sum_to_size(b_shape).to(b_dtype)
        return da, db, None


class Gated(Function):
    """y = f(gate) up, a gated MLP: copies of gate and up; d gate = g up f'(gate), d up = g f(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, y: Tensor, call: Any, settings: Any, razor: Keeper) -> Tensor:
        ctx.call, ctx.settings, ctx.dtypes = call, settings, (gate.dtype, up.dtype)
        low_bit = razor.mode == "low-bit"
        gate_held, up_held = _factor(razor, gate), _factor(razor, up) if ctx.needs_input_grad[0] or low_bit else None
        save(ctx, gate=gate_held, up=up_held)
        y = y.detach()
        if low_bit and up_held is not None:
            razor.derive(y, lambda gate, up: call(gate, **settings).mul_(up), (gate_held, up_held))
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        gate = kept.dense("gate", g.dtype)
        d_gate = d_up = None
        if ctx.needs_input_grad[0]:
            d_gate = ACTIVATIONS[ctx.call].backward(kept.dense("up", g.dtype) * g, gate, **ctx.settings)
            d_gate = d_gate.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            d_up = (ctx.call(gate, **ctx.settings) * g).to(ctx.dtypes[1])
        return d_gate, d_up, None, None, None, None


class Normalised(Function):
    """x̂ = x r with r = rsqrt(mean(x²) + ε) computed by the caller: dx = r (g − x̂ mean(g x̂)), x̂ pruned, r exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, eps: float, razor: Keeper) -> Tensor:
        y = x * r
        ctx.dtype = x.dtype
        held = razor.hold(y, "norm", rstd=(r, eps))
        # By reference it is x that is kept, as PyTorch does: y may be changed in place.
        ctx.normalised = not isinstance(held.saved.recipe, Dense)
        save(ctx, x=held if ctx.normalised else x, r=r)
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        x = kept.dense("x", g.dtype, own=True)
        if not ctx.normalised:
            x.mul_(kept.dense("r", g.dtype))
        inner = x.mul_((x * g).mean(-1, keepdim=True))
        return torch.sub(g, inner, out=inner).mul_(kept.dense("r", g.dtype)).to(ctx.dtype), None, None, None
