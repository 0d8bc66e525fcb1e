"""Attention: softmax, products of activations, and ``scaled_dot_product_attention`` with everything it takes.

With S = s Q Kᵀ + mask, P = softmax(S), D = dropout(P), O = D V, and hats on what is pruned:

    dV = D̂ᵀ g        dD = g V̂ᵀ        dP = dropout'(dD)        dS = P̂ ∘ (dP − Σ_row dP ∘ P̂)
    dQ = s dS K̂      dK = s dSᵀ Q̂     dmask = dS

P is not made again from pruned Q and K: an error in S would be exponentiated, and rows would not sum to what the
forward pass saw. The output is PyTorch's own, of the kernel that it chooses; P is formed for a few samples at a time,
only to be packed. On a CPU dropout's mask is the one that PyTorch would draw; on a GPU, where a kernel draws it, the
output is computed here, with another mask of the same probability.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chains import Scores
from ..coded import mask_bits
from ..function import Function, Kept, save
from ..keeper import Keeper
from ..saved import Geometry, Saved
from ..store import Held, Holder
from ..weights import LEAF, rank
from .attention_dropout import attention_with_dropout
from .attention_low_bit import heads_and, low_bit_attention
from .attention_steps import by_head, folded, part_of, probabilities, repeated, softmax_backward
from .linear import Linear, again


class Softmax(Function):
    """P = softmax(S); dS = P̂ ∘ (g − Σ g ∘ P̂). The product that follows shares P̂."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, dim: int, dtype: torch.dtype | None, razor: Keeper) -> Tensor:
        ctx.dim, ctx.dtype = dim, s.dtype
        p = F.softmax(s, dim, dtype=dtype)
        scores = razor.scores.get(s) if razor.mode == "low-bit" else None
        if scores is not None and scores.unchanged():  # P is made from Q and K again
            made = scores.make
            held = razor.derive(
                p, lambda *given: torch.softmax(made(*given), dim), (scores.q, scores.k), scores.masks,
                least=scores.dtype,
            )  # fmt: skip
        elif razor.mode == "low-bit":
            held = razor.hold_eight_bit(p)
        else:
            held = razor.hold(p.detach(), probabilities=True)
        save(ctx, p=held)
        return p

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ds = softmax_backward(g, Kept(ctx).dense("p", g.dtype), ctx.dim)
        return ds.to(ctx.dtype), None, None, None


class Matmul(Function):
    """C = A B; dA = g B̂ᵀ, dB = Âᵀ g, with leading dimensions broadcast as in ``torch.matmul``.

    A factor that is a weight is kept by reference, so that the other one's gradient is exact.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, a_kept: Held | Tensor, b_kept: Held | Tensor) -> Tensor:
        ctx.like = (a.shape, a.dtype, b.shape, b.dtype)
        needs_a, needs_b, *_ = ctx.needs_input_grad
        save(ctx, a=a_kept if needs_b else None, b=b_kept if needs_a else None)
        return torch.matmul(a, b)

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        a_shape, a_dtype, b_shape, b_dtype = ctx.like
        da = db = None
        if ctx.needs_input_grad[0]:
            b = kept.dense("b", g.dtype)
            if len(a_shape) == 2 < g.dim():  # W x: one product, not one for each sample
                da = g.movedim(-2, 0).flatten(1) @ b.movedim(-2, 0).flatten(1).T
            else:
                da = (g @ b.mT).sum_to_size(a_shape)
            da = da.to(a_dtype)
        if ctx.needs_input_grad[1]:
            db = (kept.dense("a", g.dtype).mT @ g).sum_to_size(b_shape).to(b_dtype)
        return da, db, None, None


class Attention(Function):
    """``F.scaled_dot_product_attention`` over (B, H, N, d) queries and (B, H_kv, M, d) keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        p_drop: float,
        causal: bool,
        scale: float,
        done: tuple[Tensor | None, Tensor | None],
        razor: Keeper,
    ) -> Tensor:
        out, kept_by_dropout = done
        ctx.settings = (p_drop, scale)
        ctx.like = [Geometry.of(x) for x in (q, k, v)]  # a gradient has the layout of its tensor
        ctx.mask_like = (mask.shape, mask.dtype) if mask is not None else None
        ctx.dtypes = (q.dtype, k.dtype, v.dtype)
        needs = ctx.needs_input_grad
        named: dict[str, Held] = {}
        outs = []
        batch = q.shape[0]
        ctx.step = step = razor.samples_at_once(batch, math.prod(q.shape[1:-1]) * k.shape[-2], q.numel())
        for i in range(0, batch, step):
            p = probabilities(q[i : i + step], k[i : i + step], part_of(mask, slice(i, i + step), batch), causal, scale)
            named[f"p{i}"] = _alone(razor.prune(p, probabilities=True))
            if kept_by_dropout is not None:
                named[f"drop{i}"] = _alone(mask_bits(kept_by_dropout[i : i + step]))
            elif p_drop:
                p, drop = torch.native_dropout(p, p_drop, True)
                named[f"drop{i}"] = _alone(mask_bits(drop))
                outs.append(p.to(v.dtype) @ repeated(v[i : i + step], q.shape[1]))
        if out is None:
            out = torch.cat(outs)
        save(
            ctx,
            q=razor.hold(q) if needs[1] else None,
            k=razor.hold(k) if needs[0] else None,
            v=razor.hold(v) if needs[0] or needs[1] or needs[3] else None,
            **named,
        )
        return out

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        p_drop, scale = ctx.settings
        needs = ctx.needs_input_grad
        (batch, heads), kv_heads = ctx.like[0].shape[:2], ctx.like[1].shape[1]
        q, k, v = (kept.dense(n, g.dtype) if n in kept else None for n in "qkv")
        dq, dk, dv = (
            g.new_empty_strided(like.shape, like.stride) if needed else None
            for like, needed in zip(ctx.like, needs[:3], strict=True)
        )
        dmask = None
        for i in range(0, batch, ctx.step):
            at = slice(i, i + ctx.step)
            p = kept.dense(f"p{i}", g.dtype)  # (b, H, N, M)
            gi = by_head(g[at])
            drop = kept.dense(f"drop{i}", g.dtype).mul_(1 / (1 - p_drop)) if p_drop else None
            if dv is not None:
                dropped = p * drop if drop is not None else p
                dv[at] = folded(torch.bmm(by_head(dropped).mT, gi), heads, kv_heads)
            if v is None:
                continue
            dp = torch.bmm(gi, by_head(repeated(v[at], heads)).mT).view(p.shape)
            if drop is not None:
                dp = dp.mul_(drop)
            ds = softmax_backward(dp, p)
            del dp, p
            of_heads = by_head(ds)
            if dq is not None:
                assert k is not None
                part = torch.bmm(of_heads, by_head(repeated(k[at], heads)))
                dq[at] = part.mul_(scale).view(dq[at].shape)
            if dk is not None:
                assert q is not None
                part = torch.bmm(of_heads.mT, by_head(q[at]))
                dk[at] = folded(part.mul_(scale), heads, kv_heads)
            if needs[3]:
                shape, _ = ctx.mask_like
                if dmask is None:
                    dmask = g.new_zeros(shape)
                own = part_of(dmask, at, batch)
                own += ds.sum_to_size(own.shape)
        grads = (t.to(d) if t is not None else None for t, d in zip((dq, dk, dv), ctx.dtypes, strict=True))
        return *grads, dmask.to(ctx.mask_like[1]) if dmask is not None else None, None, None, None, None, None


def _as_pytorch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shape: tuple[int, ...], settings: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's own output over (B, H, N, d), and what its dropout kept, bool of ``shape`` (B, H, N, M)."""
    p_drop = settings["dropout_p"]
    if p_drop and query.device.type != "cpu":
        return None, None
    kept = None
    with torch.no_grad():
        if p_drop:
            out, kept = attention_with_dropout(query, key, value, mask, **settings)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)
    return out.reshape(*shape[:3], -1), kept.reshape(shape) if kept is not None else None


def _alone(saved: Saved) -> Held:
    return Held(Holder(saved), None)


def softmax(
    razor: Keeper,
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``F.softmax``, ``torch.softmax``."""
    if not input.requires_grad or dim is None or razor.attention == "exact" or input.numel() == 0:
        return NotImplemented
    return Softmax.apply(input, dim, dtype, razor)


def matmul(razor: Keeper, input: Tensor, other: Tensor) -> Tensor:
    """``torch.matmul``, ``torch.bmm``, ``@``: with a trained weight as a linear layer, otherwise two activations."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor) or input.numel() == 0 or other.numel() == 0:
        return NotImplemented
    left, right = rank(input), rank(other)
    if razor.attention == "exact" and max(left, right) == LEAF:
        return NotImplemented  # it may be a value as well as a weight
    if right > left and other.dim() == 2 and other.requires_grad:
        return again(razor, Linear.apply(input, other, None, True, razor), input, other, None, True)
    if input.dim() < 2 or other.dim() < 2:
        return NotImplemented
    if left != right:  # a frozen weight keeps nothing of x
        weight = other if right > left else input
        if not weight.requires_grad:
            return NotImplemented
        if right > left:
            return Matmul.apply(input, other, razor.hold(input), other)
        return Matmul.apply(input, other, input, razor.hold(other, "input", (-2,)))
    if left or not (input.requires_grad and other.requires_grad) or razor.attention == "exact":
        return NotImplemented  # two weights: PyTorch keeps both by reference
    if razor.mode != "low-bit":
        return Matmul.apply(input, other, razor.hold(input), razor.hold(other))
    a = razor.hold(input, "query", heads_and(-1, input))
    if other.stride(-2) < other.stride(-1):  # transposed, as the keys of attention are
        b = razor.hold(other, "key", heads_and(-2, other))
    else:
        b = razor.hold(other, "value", heads_and(-1, other))
    y: Tensor = Matmul.apply(input, other, a, b)
    razor.derive(y, torch.matmul, (a, b))
    return razor.scores.put(y, Scores(a, b, (), (), (), y.dtype))


def scaled_dot_product_attention(
    razor: Keeper,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``."""
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    if not any(t.requires_grad for t in tensors) or any(t.numel() == 0 for t in tensors):
        return NotImplemented
    if razor.attention == "exact" or not 0 <= dropout_p <= 1:
        return NotImplemented
    if razor.mode == "low-bit":
        settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return low_bit_attention(razor, query, key, value, attn_mask, settings)
    lead = query.shape[:-3]
    q, k, v = (t.reshape(-1, *t.shape[-3:]) if t.dim() > 4 else t for t in (query, key, value))
    q, k, v = (t[(None,) * (4 - t.dim())] for t in (q, k, v))
    if not q.shape[0] == k.shape[0] == v.shape[0] or (attn_mask is not None and query.dim() > 4):
        return NotImplemented
    if (k.shape[1] != q.shape[1] and not enable_gqa) or dropout_p >= 1:
        return NotImplemented
    settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    done = _as_pytorch(query, key, value, attn_mask, (*q.shape[:-1], k.shape[-2]), settings)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(dtype) for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out: Tensor = Attention.apply(q, k, v, attn_mask, dropout_p, is_causal, scale, done, razor)
    if query.dim() > 4:
        return out.reshape(*lead, *out.shape[-3:])
    return out.reshape(out.shape[4 - query.dim() :]) if query.dim() < 4 else out
