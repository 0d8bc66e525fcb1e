"""``scaled_dot_product_attention`` with dropout on a CPU, in the steps that PyTorch takes there, of the same bits.

PyTorch's one call draws the mask in its midst and keeps it to itself. Here the steps after the softmax are taken one by
one, so that what was kept is known (the mode "pruned" stores it), and is drawn by :mod:`..drawing`, which is faster.
The backward pass of the mode "low-bit" takes them without a graph (:mod:`.attention_parts`).
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..drawing import dropped, kept_of


class Drop(torch.autograd.Function):
    """x · kept / (1 − p)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, p: float) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(kept)
        return dropped(x, kept, p)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return dropped(g, kept, ctx.p), None, None


def by_steps(settings: dict[str, Any], q: Tensor) -> bool:
    """Whether attention with these arguments of PyTorch's function is taken in steps."""
    return bool(settings["dropout_p"] > 0 and q.device.type == "cpu")


def attention_with_dropout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    """O = dropout(P) V and which elements of P were kept, bool (…, H, N, M); arguments as of PyTorch's function."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (_autocast(t) for t in (q, k, v))
        mask = _autocast(mask) if mask is not None else None
    with torch.autocast("cpu", enabled=False):
        return _steps(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)


def _steps(
    q: Any, k: Any, v: Any, mask: Any, p_drop: float, causal: bool, scale: float | None, gqa: bool
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    if dtype.itemsize == 2 and not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed():
        q, k, v = q.float(), k.float(), v.float()  # as PyTorch does, unless it is told otherwise
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    # The product with V is still to come: this one is with no column of it.
    _, p = torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v[..., :0], mask, 0.0, causal, None, scale=scale, enable_gqa=gqa
    )
    kept = kept_of(p, p_drop)
    if gqa and v.shape[-3] != p.shape[-3]:
        v = v.repeat_interleave(p.shape[-3] // v.shape[-3], -3)
    out: Tensor = Drop.apply(p, kept, p_drop)
    return torch.matmul(out, v).to(dtype), kept


def _autocast(x: Tensor) -> Tensor:
    """As autocast hands it to PyTorch's function."""
    return x.to(torch.get_autocast_dtype("cpu")) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x
