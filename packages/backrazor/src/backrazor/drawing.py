"""Dropout's random numbers: what PyTorch's dropout keeps, drawn from PyTorch's own generator, and its product.

On a CPU ``bernoulli_`` draws one number after the other. :mod:`.cpu_kernels` draws the same ones from the same
generator, many at a time. That they are the same is looked at once in each process; where they are not (another
PyTorch) or there is no compiler, PyTorch draws.
"""

import functools

import torch
from torch import Tensor

from . import cpu_kernels
from .internals import is_fake


def scale_of(p: float, dtype: torch.dtype) -> float:
    """1 / (1 − p) as PyTorch rounds it on a CPU: divided, and kept, in ``dtype``."""
    return float(torch.ones((), dtype=dtype, device="cpu").div_(1 - p)) if p < 1 else 0.0


def kept_of(x: Tensor, p: float) -> Tensor:
    """Which elements of ``x``, on a CPU, PyTorch's dropout of probability ``p`` keeps: bool, with the strides of x."""
    kept = torch.empty_like(x, dtype=torch.bool)
    if p >= 1:
        return kept.fill_(False)
    if is_fake(x) or kept.numel() == 0:
        return kept
    if draws_the_same():
        state = torch.default_generator.get_state()
        if cpu_kernels.bernoulli(state, 1 - p, in_memory_order(kept)):
            torch.default_generator.set_state(state)
            return kept
    return kept.bernoulli_(1 - p)


def in_memory_order(x: Tensor) -> Tensor:
    """The memory of ``x``, which ``empty_like`` made and which has no holes, as one row."""
    return x.as_strided((x.numel(),), (1,))


def dropped(x: Tensor, kept: Tensor, p: float) -> Tensor:
    """x · kept / (1 − p) with the bits of ``F.dropout`` on a CPU."""
    scale = scale_of(p, x.dtype)
    quick = cpu_kernels.dropout(x, kept, scale) if not is_fake(x) else None
    return quick if quick is not None else x * kept.to(x.dtype).mul_(scale)


@functools.cache
def draws_the_same() -> bool:
    """Whether the C kernel's numbers, and the state that it leaves, are PyTorch's, from an odd place in a state on."""
    if cpu_kernels.library() is None:
        return False
    generator = torch.Generator()
    generator.manual_seed(20_221_127)
    ours, theirs = (torch.empty(1_000, dtype=torch.bool, device="cpu") for _ in range(2))
    torch.empty(3, device="cpu").random_(generator=generator)
    state = generator.get_state()
    if not cpu_kernels.bernoulli(state, 0.7, ours):
        return False
    theirs.bernoulli_(0.7, generator=generator)
    return torch.equal(ours, theirs) and torch.equal(state, generator.get_state())
