"""Attention in the mode "low-bit": Q, K and V in few bits, from which P and O are made again.

    dQ, dK, dV, dmask = the gradients of O(Q̃, K̃, Ṽ), with the dropout mask of the forward pass

The forward pass is PyTorch's own call, of the kernel that it chooses. So is the backward pass: the same call runs again
on what was kept. Its O is the input of the output projection, which is not stored either. P and its rows' sums are of
the same Q̃ and K̃, so no error is exponentiated against another. For dropout the state of the random numbers is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..function import Function, Kept, save
from ..internals import own_saving, random_numbers, random_state
from ..keeper import Keeper
from .attention_dropout import attention_with_dropout


class Replay:
    """PyTorch's own attention, run again on what is kept of Q, K and V: for O, and for the gradients after it."""

    def __init__(self, settings: dict[str, Any], needs: tuple[bool, ...], random: Tensor | None) -> None:
        self.settings, self.needs, self.random = settings, needs, random
        self.waiting = True
        """Whether the gradients are still to come, for which what is made for O is kept."""
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def output(self, *tensors: Tensor) -> Tensor:
        """O from Q, K, V and the mask."""
        out, leaves = self._run(tensors)
        if self.waiting:
            self._made = (out, leaves)
        return out.detach()

    def gradients(self, g: Tensor, make: Callable[[], tuple[Tensor, ...]]) -> Iterator[Tensor | None]:
        """dQ, dK, dV and dmask."""
        self.waiting = False
        out, leaves = self._made if self._made is not None else self._run(make())
        self._made = None
        wanted = [t for t in leaves if t.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, g.to(out.dtype)))
        return iter([next(grads) if t.requires_grad else None for t in leaves])

    def _run(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        return run(tensors, self.needs, self.settings, self.random)


def run(
    tensors: tuple[Tensor, ...], needs: tuple[bool, ...], settings: dict[str, Any], random: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Attention as PyTorch computes it where gradients are needed, with the dropout of ``random`` if it is given."""
    by_steps = settings["dropout_p"] > 0 and tensors[0].device.type == "cpu"
    with torch.enable_grad(), own_saving():
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        with random_numbers(leaves[0].device, random) if random is not None else nullcontext():
            if by_steps:
                return attention_with_dropout(*leaves, **settings)[0], leaves
            # PyTorch's function by its other name, which a Razor does not meet.
            return torch.ops.aten.scaled_dot_product_attention(*leaves, **settings), leaves


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
    out = [run(given, needs, settings)[0].detach()]
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
