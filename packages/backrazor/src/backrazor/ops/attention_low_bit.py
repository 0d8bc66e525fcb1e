"""Attention in the mode "low-bit": Q, K and V in few bits, from which P and O are made again.

    dQ, dK, dV, dmask = the gradients of O(Q̃, K̃, Ṽ), with the dropout mask of the forward pass

The forward pass is PyTorch's own call, of the kernel that it chooses. So is the backward pass: the same call runs again
on what was kept, or on a CPU, where that is faster, its steps (:mod:`.attention_parts`). Its O is the input of the
output projection, which is not stored either. P and its rows' sums are of the same Q̃ and K̃, so no error is
exponentiated against another. For dropout the state of the random numbers is kept, and on a CPU both passes are taken
in steps (:mod:`.attention_dropout`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..function import Function, Kept, save
from ..internals import own_saving, random_numbers, random_state
from ..keeper import Keeper
from .attention_dropout import attention_with_dropout, by_steps
from .attention_parts import Stepwise


class Recorded:
    """Attention as PyTorch computes it where gradients are needed, and its graph."""

    def __init__(self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...], settings: dict[str, Any]) -> None:
        with torch.enable_grad(), own_saving():
            self.leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
            if by_steps(settings, tensors[0]):
                self.out, _ = attention_with_dropout(*self.leaves, **settings)
            else:  # PyTorch's function by its other name, which a Razor does not meet
                self.out = torch.ops.aten.scaled_dot_product_attention(*self.leaves, **settings)

    def gradients(self, g: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """dQ, dK, dV and dmask of those that ``needs`` names."""
        grads = iter(torch.autograd.grad(self.out, [t for t in self.leaves if t.requires_grad], g.to(self.out.dtype)))
        return [next(grads) if need else None for need in needs]


class Replay:
    """Attention, run again on what is kept of Q, K and V: for O, and for the gradients after it."""

    def __init__(self, settings: dict[str, Any], needs: tuple[bool, ...], random: Tensor | None) -> None:
        self.settings, self.needs, self.random = settings, needs, random
        self.waiting = True
        """Whether the gradients are still to come, for which what is made for O is kept."""
        self._made: Recorded | Stepwise | None = None

    def output(self, *tensors: Tensor) -> Tensor:
        """O from Q, K, V and the mask."""
        run = self._run(tensors)
        if self.waiting:
            self._made = run
        return run.out.detach()

    def gradients(self, g: Tensor, make: Callable[[], tuple[Tensor, ...]]) -> list[Tensor | None]:
        """dQ, dK, dV and dmask."""
        self.waiting = False
        run = self._made if self._made is not None else self._run(make())
        self._made = None
        return run.gradients(g, self.needs)

    def _run(self, tensors: tuple[Tensor, ...]) -> "Recorded | Stepwise":
        if self.random is None:
            if Stepwise.fits(tensors) and Stepwise.pays(tensors):
                return Stepwise(tensors, self.settings)
            return Recorded(tensors, self.needs, self.settings)
        with random_numbers(tensors[0].device, self.random):  # the dropout of the forward pass
            if Stepwise.fits(tensors):
                return Stepwise(tensors, self.settings)
            return Recorded(tensors, self.needs, self.settings)


class LowBitAttention(Function):
    """``F.scaled_dot_product_attention``, whose gradients are those at Q, K, V in few bits; P and O are not stored."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: Any, replay: Replay, out: list[Tensor]
    ) -> Tensor:
        ctx.replay, ctx.dtypes = replay, [t.dtype for t in (q, k, v, mask) if t is not None]
        save(ctx, q=held[0], k=held[1], v=held[2], mask=mask, random=replay.random)
        return out.pop()

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        names = [name for name in ("q", "k", "v", "mask") if name in kept]

        def make() -> tuple[Tensor, ...]:
            return tuple(kept.as_given(name, g.dtype) for name in names)

        grads = [
            d.to(dtype) if d is not None else None
            for d, dtype in zip(ctx.replay.gradients(g, make), ctx.dtypes, strict=True)
        ]
        return *grads, *(None,) * (7 - len(grads))


def low_bit_attention(
    razor: Keeper, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: dict[str, Any]
) -> Tensor:
    given = tuple(t for t in (q, k, v, mask) if t is not None)
    needs = tuple(t.requires_grad for t in given)
    random = random_state(q) if settings["dropout_p"] > 0 else None
    if by_steps(settings, q):
        with torch.no_grad():
            out = [attention_with_dropout(*given, **settings)[0]]
    else:
        out = [Recorded(given, needs, settings).out.detach()]
    held = tuple(
        razor.hold(t, kind, heads_and(-1, t)) for t, kind in zip((q, k, v), ("query", "key", "value"), strict=True)
    )
    replay = Replay(settings, needs, random)
    y: Tensor = LowBitAttention.apply(q, k, v, mask, held, replay, out)
    razor.derive(y, replay.output, held, given[3:])
    return y


def heads_and(channel: int, x: Tensor) -> tuple[int, ...]:
    """The dimensions of channels in (…, H, N, d): heads and ``channel``."""
    return (channel, -3) if x.dim() > 2 else (channel,)
