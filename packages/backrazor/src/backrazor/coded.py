"""A tensor in 2 to 4 bits an element: each element becomes the nearest of a few evenly spaced levels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits
from .fake import is_fake
from .saved import Geometry, Recipe, Saved

CHUNK = 1 << 20


@dataclass(frozen=True)
class Levels:
    """2^bits levels first, first + step, …: what elements are rounded to."""

    bits: int
    first: float
    step: float

    @property
    def values(self) -> list[float]:
        return [self.first + i * self.step for i in range(1 << self.bits)]


@dataclass(frozen=True)
class Coded(Recipe):
    """Codes of a few bits; rebuilt as the levels."""

    levels: Levels
    geometry: Geometry
    size: int

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes = bits.unpack(tensors[0], self.size, self.levels.bits)
        return self.geometry.restore(codes.to(dtype).mul_(self.levels.step).add_(self.levels.first))


def code(x: Tensor, function: Callable[[Tensor, Tensor], Tensor], levels: Levels) -> Saved:
    """The nearest level of ``function`` at each element of ``x``; it is given ones, and some elements at a time."""
    geometry = Geometry.of(x)
    flat = geometry.in_memory_order(x.detach()).view(-1)
    recipe = Coded(levels, geometry, flat.numel())
    if is_fake(x):
        return Saved((x.new_empty(bits.packed_bytes(flat.numel(), levels.bits), dtype=torch.uint8),), recipe)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=x.device)
    last = (1 << levels.bits) - 1
    ones = torch.ones(min(CHUNK, flat.numel()), dtype=x.dtype, device=x.device)
    half = torch.tensor(0.5 - levels.first / levels.step, dtype=x.dtype, device=x.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        d = function(ones[: part.numel()], part)
        d = torch.add(half, d, alpha=1 / levels.step).clamp_(0, last + 0.5)  # cut off below: rounds to the nearest
        codes[start : start + CHUNK].copy_(d)
    return Saved((bits.pack(codes, levels.bits),), recipe)
