"""Numbers that merges are summed in stay wide in a model of 16 bits, whose layers compute in its type all the same."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

HALVES = (torch.bfloat16, torch.float16)
WIDTHS = (*HALVES, torch.float32, torch.float64)


def widened(t: Tensor) -> Tensor:
    """In float32 where it has 16 bits: merges add small deltas, and in bfloat16 a tenth of their sum would be lost."""
    return t.float() if t.dtype in HALVES else t


def can_be_summed_in(t: object) -> bool:
    """Whether deltas can be added to it: no codes, no complex numbers, no tensor that is made of others (torchao's)."""
    if not isinstance(t, Tensor) or t.dtype not in WIDTHS:
        return False
    plain = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain or isinstance(t, FakeTensor)  # as predictions have them


def can_be_trained(t: Tensor) -> bool:
    """Whether an optimizer can train it, where no merge has to add to it."""
    return can_be_summed_in(t) or t.is_complex()


def staying_wide(
    fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor | None], *, float32: bool = False
) -> Callable[[Tensor], Tensor]:
    """For ``_apply``: ``fn``, but of ``tensors`` the type stays where it would become 16-bit.

    Args:
        float32: or any other.
    """
    kept = {id(t) for p in tensors if p is not None for t in (p, p.grad) if t is not None}

    def moved(t: Tensor) -> Tensor:
        out = fn(t)
        return t.to(out.device) if id(t) in kept and out.dtype != t.dtype and (float32 or out.dtype in HALVES) else out

    return moved


def type_after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, like: Tensor) -> torch.dtype:
    """What ``fn`` of ``_apply`` makes of a tensor of that type."""
    return fn(like.new_empty(0, dtype=dtype)).dtype
