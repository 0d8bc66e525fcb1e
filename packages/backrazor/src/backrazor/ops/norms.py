"""Normalisations: x̂ is pruned, mean and rstd are exact, and the output's next user shares x̂, stored once.

With x̂ = (x − μ) r and y = x̂ γ + β; the sums below run over the M normalised elements:

    dx = r (γ g − mean(γ g) − x̂ mean(γ g x̂)),  dγ = Σ g x̂,  dβ = Σ g

RMSNorm has μ = 0 and no mean(γ g). With a batch norm's frozen statistics dx = r γ g is exact and needs no x̂.

A batch norm's x̂ is kept in 4 bits instead: its output goes through a ReLU before it is multiplied, so pruning it would
serve nobody else, and x̂, near normal by construction, errs by a tenth in 4 bits where its largest tenth errs by three
quarters. In the mode "paper" the pruned x itself is kept, so that an element left out becomes x̂ = −μ r.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..coded import Levels
from ..function import Function, Kept, save
from ..keeper import Keeper
from ..saved import Affine, Saved
from ..store import Held

NORMAL = Levels(4, -7.5 * 0.3352, 0.3352)
"""16 levels for a standard normal variable, at the spacing of least squared error, 0.0115 (Max, 1960)."""


def _share(razor: Keeper, held: Held, weight: Any, bias: Any, y: Tensor) -> Held:
    """What y's next user saves is made from x̂ too, if x̂ lies in memory as y does."""
    if not razor.same_geometry(held, y):
        return held
    base = held.saved
    recipe = Affine(base.recipe.geometry, base.recipe, len(base.tensors), weight is not None, bias is not None)
    razor.share(y, Saved((*base.tensors, *(t.detach() for t in (weight, bias) if t is not None)), recipe), held)
    return held


def _hold_channels(razor: Keeper, normal: Tensor) -> Held:
    """x̂ (N, C, …) of a batch or group norm."""
    return razor.hold(normal, "batch norm", (1,)) if razor.mode == "low-bit" else razor.hold_coded(normal, NORMAL)


class LayerNorm(Function):
    """``F.layer_norm``; ``rms`` makes it ``F.rms_norm``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: list[int],
        eps: float,
        rms: bool,
        razor: Keeper,
    ) -> Tensor:
        ctx.dims, ctx.rms, ctx.paper = len(shape), rms, razor.mode == "paper"
        ctx.dtypes = [t.dtype if t is not None else None for t in (x, weight, bias)]
        if torch.is_autocast_enabled(x.device.type):  # it may ask for float32 here: an empty call tells
            x = x.to(F.layer_norm(x.new_empty((0, *shape)), shape, weight, bias).dtype)
        mean = None
        dims = tuple(range(-len(shape), 0))
        if rms:
            y = F.rms_norm(x, shape, weight, eps)
            rstd = torch.rsqrt(_wide(x).square().mean(dims, keepdim=True) + eps)
            normalised = lambda: F.rms_norm(x, shape, None, eps)  # noqa: E731
        else:
            y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
            normalised = lambda: F.layer_norm(x, shape, None, None, eps)  # noqa: E731
        if ctx.paper:
            held = razor.hold(x, values="fp32", own=True)
        else:
            unmade = razor.hold_norm(x, (mean, rstd), dims, eps)
            held = unmade or razor.hold(normalised(), "norm", dims, rstd=(rstd, eps))
            _share(razor, held, weight, bias, y)
        save(ctx, x=held, rstd=rstd, mean=mean if ctx.paper else None, weight=weight)
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wide = torch.promote_types(g.dtype, torch.float32)
        g = g.to(wide)
        x, rstd = kept.dense("x", wide, own=ctx.rms), kept.dense("rstd", wide)
        weight = kept.dense("weight", wide) if "weight" in kept else None
        grads = _rms_grad if ctx.rms else _layer_grad
        mean = kept.dense("mean", wide) if "mean" in kept else None
        dx, dweight, dbias = grads(ctx, g, x, mean, rstd, weight)
        return (
            dx.to(x_dtype) if dx is not None else None,
            dweight.to(weight_dtype) if dweight is not None else None,
            dbias.to(bias_dtype) if dbias is not None else None,
            *(None,) * 4,
        )


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _layer_grad(ctx: Any, g: Tensor, x: Tensor, mean: Any, rstd: Tensor, weight: Any) -> Grads:
    """By PyTorch's own kernel: from x with mean and rstd, or from x̂ with 0 and 1, whose dx is still to be scaled."""
    normalised = mean is None
    at = (torch.zeros_like(rstd), torch.ones_like(rstd)) if normalised else (mean, rstd)
    shape = list(g.shape[g.dim() - ctx.dims :])
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    mask = [needs_x, needs_weight, needs_bias and weight is not None]  # the kernel has no bias without a weight
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(g.contiguous(), x, shape, *at, weight, weight, mask)
    if needs_bias and dbias is None:
        dbias = g.sum_to_size(shape)
    return dx.mul_(rstd) if normalised and dx is not None else dx, dweight, dbias


def _rms_grad(ctx: Any, g: Tensor, x: Tensor, mean: Any, rstd: Tensor, weight: Any) -> Grads:
    dims = tuple(range(-ctx.dims, 0))
    lead = tuple(range(g.dim() - ctx.dims))
    if ctx.paper:
        x.mul_(rstd)
    dx = dweight = None
    if ctx.needs_input_grad[1]:
        dweight = (g * x).sum(lead) if lead else g * x
    if ctx.needs_input_grad[0]:
        h = g * weight if weight is not None else g
        inner = x.mul_((h * x).mean(dims, keepdim=True))
        dx = torch.sub(h, inner, out=inner).mul_(rstd)
    return dx, dweight, None


class BatchNorm(Function):
    """``F.batch_norm`` over dimension 1; the running statistics are updated as PyTorch does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        training: bool,
        momentum: float,
        eps: float,
        razor: Keeper,
    ) -> Tensor:
        mean, variance = running
        ctx.training = training
        ctx.dtypes = [t.dtype if t is not None else None for t in (x, weight, bias)]
        y, batch_mean, rstd = torch.native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
        if not training:
            assert mean is not None
            assert variance is not None
            batch_mean, rstd = mean.clone(), torch.rsqrt(variance + eps)
        shape = _channels(x)
        held = None
        if training or ctx.needs_input_grad[1]:
            at = (batch_mean.view(shape).to(x.dtype), rstd.view(shape).to(x.dtype))
            gamma, beta = (t.view(shape) if t is not None else None for t in (weight, bias))
            normal = torch.sub(x, at[0], out=torch.empty_like(y, dtype=x.dtype)).mul_(at[1])  # in y's strides
            held = _share(razor, _hold_channels(razor, normal), gamma, beta, y)
        save(ctx, x=held, rstd=rstd, weight=weight)
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wide = torch.promote_types(g.dtype, torch.float32)
        g, shape = g.to(wide), _channels(g)
        dims = [d for d in range(g.dim()) if d != 1]
        rstd = kept.dense("rstd", wide).view(shape)
        dx = dweight = dbias = projection = x = None
        total = g.sum(dims)  # (C,)
        if "x" in kept:
            x = kept.dense("x", wide, own=True)
            projection = (g * x).sum(dims)  # (C,)
        if ctx.needs_input_grad[1]:
            assert projection is not None
            dweight = projection.to(weight_dtype)
        if ctx.needs_input_grad[2]:
            dbias = total.to(bias_dtype)
        if ctx.needs_input_grad[0]:
            scale = rstd * kept.dense("weight", wide).view(shape) if "weight" in kept else rstd
            dx = g
            if ctx.training:
                assert x is not None
                assert projection is not None
                count = g.numel() // max(g.shape[1], 1)
                dx = g - x.mul_((projection / count).view(shape)).add_((total / count).view(shape))
            dx = (dx * scale).to(x_dtype)
        return dx, dweight, dbias, None, None, None, None, None


class GroupNorm(Function):
    """``F.group_norm``: statistics over the channels of one group of one sample; x̂ in 4 bits, as of a batch norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, razor: Keeper
    ) -> Tensor:
        n, c = x.shape[:2]
        ctx.sizes = (n, c, x.numel() // (n * c), groups)
        ctx.dtypes = [t.dtype if t is not None else None for t in (x, weight, bias)]
        x = _as_kernel(x)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, x.numel() // (n * c), groups, eps)
        shape = [n, groups, *[1] * (x.dim() - 1)]
        normal = (x.unflatten(1, (groups, -1)) - mean.view(shape)).mul_(rstd.view(shape)).flatten(1, 2)
        gamma, beta = (t.view(_channels(x)) if t is not None else None for t in (weight, bias))
        held = _share(razor, _hold_channels(razor, normal), gamma, beta, y)
        save(ctx, x=held, rstd=rstd, weight=weight)
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        n, _, _, groups = ctx.sizes
        wide = torch.promote_types(g.dtype, torch.float32)
        g, x, rstd = g.to(wide).contiguous(), kept.dense("x", wide).contiguous(), kept.dense("rstd", wide)
        weight = kept.dense("weight", wide) if "weight" in kept else None
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        mask = [needs_x, needs_weight, needs_bias]
        at = (torch.zeros_like(rstd), torch.ones_like(rstd))
        grads = torch.ops.aten.native_group_norm_backward(g, x, *at, weight, *ctx.sizes, mask)
        if needs_x:
            grads[0].view(n, groups, -1).mul_(rstd.view(n, groups, 1))
        dx, dweight, dbias = (t.to(d) if m else None for t, d, m in zip(grads, ctx.dtypes, mask, strict=True))
        return dx, None, dweight, dbias, None, None


def _as_kernel(x: Tensor) -> Tensor:
    """``x`` in the memory that PyTorch's group norm works on: channels last stays so on a CPU."""
    channels_last = x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _channels(x: Tensor) -> list[int]:
    return [1, x.shape[1]] + [1] * (x.dim() - 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(
    razor: Keeper,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm``."""
    if not _needs_grad(input, weight, bias) or input.numel() == 0:
        return NotImplemented
    shape = list(normalized_shape)
    return LayerNorm.apply(input, weight, bias, shape, eps, False, razor)


def rms_norm(
    razor: Keeper,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``F.rms_norm``."""
    if not _needs_grad(input, weight) or input.numel() == 0:
        return NotImplemented
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    return LayerNorm.apply(input, weight, None, list(normalized_shape), eps, True, razor)


def batch_norm(
    razor: Keeper,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``."""
    if not _needs_grad(input, weight, bias) or input.numel() == 0 or razor.mode == "paper":
        return NotImplemented
    if training and input.numel() == input.shape[1]:
        return NotImplemented  # one value a channel: PyTorch says so
    running = (running_mean, running_var)
    return BatchNorm.apply(input, weight, bias, running, training, momentum, eps, razor)


def group_norm(
    razor: Keeper,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.group_norm``."""
    if not _needs_grad(input, weight, bias) or input.numel() == 0 or razor.mode == "paper":
        return NotImplemented
    if input.dim() < 2 or input.shape[1] % num_groups:
        return NotImplemented  # PyTorch says so
    return GroupNorm.apply(input, num_groups, weight, bias, eps, razor)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)
