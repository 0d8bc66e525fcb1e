"""Attention without a graph, and its gradients after it, for as many samples at a time as leave P in the cache.

PyTorch's kernel for CPUs makes P twice, once for O and once for the gradients. Here P is kept between the two, as large
as Q, K, V and O at most, and each product is one of matrices that the processor still has at hand.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..drawing import dropped, kept_of
from .attention_steps import by_head, folded, part_of, probabilities, repeated, softmax_backward

PART = 1 << 18
"""Elements of P that are handled at a time, about: 1 MiB, which second-level caches hold."""
SHORTEST = 48
"""Below so many keys PyTorch's kernel is the faster."""


class Stepwise:
    """O of Q, K, V (B, H, N, d) with or without dropout, and dQ, dK, dV, dmask."""

    def __init__(self, tensors: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
        self.q, self.k, self.v, *rest = tensors
        self.mask = rest[0] if rest else None
        self.p_drop = settings["dropout_p"]
        self.scale = settings["scale"] if settings["scale"] is not None else 1 / math.sqrt(self.q.shape[-1])
        self.p = self.q.new_empty(*self.q.shape[:-1], self.k.shape[-2])
        self.kept = kept_of(self.p, self.p_drop) if self.p_drop else None
        self.out = _empty(self.q, self.v.shape[-1])
        heads = self.q.shape[1]
        for at in self._parts():
            mask = part_of(self.mask, at, len(self.q))
            probabilities(self.q[at], self.k[at], mask, settings["is_causal"], self.scale, out=self.p[at])
            out = torch.bmm(by_head(self._dropped(self.p[at], at)), by_head(repeated(self.v[at], heads)))
            self.out[at] = out.view(self.out[at].shape)

    @staticmethod
    def fits(tensors: tuple[Tensor, ...]) -> bool:
        """Whether these Q, K, V and mask are what the steps are written for; otherwise a graph is made of PyTorch's."""
        q, k, v, *_ = tensors
        plain = all(t.dim() == 4 and t.dtype == torch.float32 and t.device.type == "cpu" for t in (q, k, v))
        return plain and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1]

    @staticmethod
    def pays(tensors: tuple[Tensor, ...]) -> bool:
        """Whether they are faster than PyTorch's kernel without dropout, and P is no larger than Q, K, V and O."""
        q, k, v, *_ = tensors
        n, m = q.shape[-2], k.shape[-2]
        rest = q.numel() + k.numel() + v.numel() + q.shape[:-1].numel() * v.shape[-1]
        return min(n, m) >= SHORTEST and q.shape[:-1].numel() * m <= rest

    def gradients(self, g: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """dQ, dK, dV and dmask of those that ``needs`` names."""
        heads, kv_heads = self.q.shape[1], self.k.shape[1]
        g = g.to(self.out.dtype)
        like = (self.q, self.k, self.v)
        dq, dk, dv = (_empty(t, t.shape[-1]) if need else None for t, need in zip(like, needs, strict=False))
        dmask = self.mask.new_zeros(self.mask.shape) if self.mask is not None and needs[3] else None
        for at in self._parts():
            p, g3 = self.p[at], by_head(g[at])
            if dv is not None:
                dv[at] = folded(torch.bmm(by_head(self._dropped(p, at)).mT, g3), heads, kv_heads)
            if dq is None and dk is None and dmask is None:
                continue
            dp = torch.bmm(g3, by_head(repeated(self.v[at], heads)).mT).view(p.shape)
            ds = softmax_backward(self._dropped(dp, at), p)
            ds3 = by_head(ds)
            if dq is not None:
                dq[at] = torch.bmm(ds3, by_head(repeated(self.k[at], heads))).mul_(self.scale).view(dq[at].shape)
            if dk is not None:
                dk[at] = folded(torch.bmm(ds3.mT, by_head(self.q[at])).mul_(self.scale), heads, kv_heads)
            if dmask is not None:
                own = part_of(dmask, at, len(self.q))
                own += ds.sum_to_size(own.shape)
        return [dq, dk, dv, dmask][: len(needs)]

    def _parts(self) -> Iterator[slice]:
        """Samples at a time."""
        step = max(1, PART // self.p[0].numel())
        for first in range(0, len(self.p), step):
            yield slice(first, first + step)

    def _dropped(self, x: Tensor, at: slice) -> Tensor:
        return dropped(x, self.kept[at], self.p_drop) if self.kept is not None else x


def _empty(like: Tensor, features: int) -> Tensor:
    """(B, H, N, features), with the heads of a token side by side in memory, as the layers around attention have it."""
    b, h, n, _ = like.shape
    return like.new_empty(b, n, h, features).transpose(1, 2)
