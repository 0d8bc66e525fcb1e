"""The steps of attention, each a product or a softmax: what makes P, and what takes it apart again.

With S = s Q Kᵀ + mask, P = softmax(S), D = dropout(P), O = D V:

    dV = Dᵀ g        dP = dropout'(g Vᵀ)        dS = P ∘ (dP − Σ_row dP ∘ P)        dQ = s dS K        dK = s dSᵀ Q
"""

import math
from typing import overload

import torch
from torch import Tensor

from ..internals import is_fake


def probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, *, out: Tensor | None = None
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask): (b, H, N, M), in ``out`` if given; a row that is masked everywhere is zero."""
    q3, k3 = by_head(q), by_head(repeated(k, q.shape[1]))
    s = q.new_empty(len(q3), q.shape[-2], k.shape[-2])
    s = torch.baddbmm(s, q3, k3.mT, beta=0, alpha=scale, out=s).view(*q.shape[:-1], -1)
    if causal:
        n, m = s.shape[-2:]
        s = s.masked_fill_(torch.ones(n, m, dtype=torch.bool, device=s.device).triu_(1), -math.inf)
    if mask is None:
        return torch.softmax(s, -1, out=out)  # every row has a key
    s = s.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else s.add_(mask)
    if s.device.type != "cpu" or is_fake(s):  # where to ask would wait for the device
        p = torch.ops.aten._safe_softmax(s, -1)
        return p if out is None else out.copy_(p)
    p = torch.softmax(s, -1, out=out)
    return p.copy_(torch.ops.aten._safe_softmax(s, -1)) if p[..., 0].isnan().any() else p


@overload
def part_of(mask: Tensor, at: slice, batch: int) -> Tensor: ...
@overload
def part_of(mask: Tensor | None, at: slice, batch: int) -> Tensor | None: ...
def part_of(mask: Tensor | None, at: slice, batch: int) -> Tensor | None:
    """The mask of the samples ``at``, of ``batch`` in all."""
    return mask[at] if mask is not None and mask.dim() == 4 and mask.shape[0] == batch > 1 else mask


def softmax_backward(g: Tensor, p: Tensor, dim: int = -1) -> Tensor:
    """P ∘ (g − Σ g ∘ P)."""
    return torch._softmax_backward_data(g, p, dim, g.dtype)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Grouped queries: each key and value head serves heads / H_kv query heads in a row."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def by_head(x: Tensor) -> Tensor:
    """(b, H, N, d) -> (b · H, N, d), in which a product may be told to transpose where (b, H, d, N) would be copied."""
    return x.reshape(-1, *x.shape[2:])


def folded(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """(b · H, N, d) -> (b, H_kv, N, d), the sum over the query heads of each: the transpose of :func:`repeated`."""
    grouped = x.view(-1, kv_heads, heads // kv_heads, *x.shape[1:])
    return grouped[:, :, 0] if heads == kv_heads else grouped.sum(2)
