"""A tensor in 1 to 4 bits an element: each element becomes one of a few evenly spaced levels.

Which level f(x) is nearest to is a step function of x, so its steps are found once for each f and x is only compared.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits, cpu_kernels
from .internals import is_fake
from .saved import Geometry, Recipe, Saved

CHUNK = 1 << 17


@dataclass(frozen=True)
class Levels:
    """2^bits levels first, first + step, …: what elements are rounded to."""

    bits: int
    first: float
    step: float

    @property
    def values(self) -> list[float]:
        return [self.first + i * self.step for i in range(1 << self.bits)]

    def nearest(self, y: Tensor) -> Tensor:
        """Codes of the nearest levels."""
        return ((y - self.first) / self.step).round().clamp(0, (1 << self.bits) - 1).int()


@dataclass(frozen=True)
class Steps:
    """A step function of x: ``first``, plus ``steps[j]`` for every ``points[j]`` that x exceeds; points rise."""

    first: int
    points: tuple[float, ...]
    steps: tuple[int, ...]

    @functools.cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The points as float32, and the steps as int32."""
        return torch.tensor(self.points, dtype=torch.float32), torch.tensor(self.steps, dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.full(x.shape, self.first, dtype=torch.uint8, device=x.device)
        for point, step in zip(self.points, self.steps, strict=True):
            above = (x > point).view(torch.uint8)
            if step > 0:
                out.add_(above, alpha=step)
            else:
                out.sub_(above, alpha=-step)
        return out


def steps_of(function: Callable[[Tensor], Tensor], levels: Levels) -> Steps:
    """Where the nearest level of ``function`` changes: looked for on a logarithmic grid, then halved to the last bit.

    ``function`` is elementwise, of float64, and smooth at the scale of a thousandth of |x|, from 1e-9 to 1e9.
    """
    ladder = torch.logspace(-9, 9, 60_001, dtype=torch.float64)
    low = torch.cat([-ladder.flip(0), torch.zeros(1, dtype=torch.float64), ladder])
    codes = levels.nearest(function(low))
    changes = (codes[1:] != codes[:-1]).nonzero().flatten()
    steps = (codes[changes + 1] - codes[changes]).tolist()
    low, high, before = low[changes], low[changes + 1], codes[changes]
    for _ in range(80):
        middle = (low + high) / 2
        same = levels.nearest(function(middle)) == before
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return Steps(int(codes[0]), tuple(low.tolist()), tuple(steps))


@functools.cache
def rounding(levels: Levels) -> Steps:
    """x itself, to the nearest level."""
    count = 1 << levels.bits
    return Steps(0, tuple(levels.first + (i + 0.5) * levels.step for i in range(count - 1)), (1,) * (count - 1))


@dataclass(frozen=True)
class Coded(Recipe):
    """Codes of a few bits; rebuilt as the levels."""

    levels: Levels
    geometry: Geometry

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        n, levels = math.prod(self.geometry.shape), self.levels
        if dtype == torch.float32:
            quick = cpu_kernels.decode(tensors[0], n, levels.bits, levels.first, levels.step)
            if quick is not None:
                return self.geometry.restore(quick)
        x = bits.unpack(tensors[0], n, levels.bits).to(dtype)
        if levels.step != 1:
            x.mul_(levels.step)
        return self.geometry.restore(x.add_(levels.first) if levels.first else x)

    def times(self, tensors: tuple[Tensor, ...], g: Tensor) -> Tensor:
        """The levels times g, in g's dtype."""
        n, levels = math.prod(self.geometry.shape), self.levels
        if g.dtype == torch.float32 and type(g) is Tensor and tuple(g.stride()) == self.geometry.stride:
            quick = cpu_kernels.decode(tensors[0], n, levels.bits, levels.first, levels.step, g)
            if quick is not None:
                return self.geometry.restore(quick)
        return self.rebuild(tensors, g.dtype).mul_(g)


def code(x: Tensor, steps: Steps, levels: Levels) -> Saved:
    """``x`` as codes: ``steps`` tells the code of an element, ``levels`` what a code stands for."""
    geometry = Geometry.of(x)
    flat = geometry.in_memory_order(x.detach()).view(-1)
    n, n_bytes = flat.numel(), bits.packed_bytes(flat.numel(), levels.bits)
    recipe = Coded(levels, geometry)
    if is_fake(x):
        return Saved((x.new_empty(n_bytes, dtype=torch.uint8),), recipe)
    if x.element_size() == 2:
        flat = flat.float()
    packed = cpu_kernels.code(flat, *steps.tables, steps.first, levels.bits, n_bytes)
    if packed is None:
        codes = torch.empty(n, dtype=torch.uint8, device=x.device)
        for start in range(0, n, CHUNK):
            codes[start : start + CHUNK] = steps(flat[start : start + CHUNK])
        packed = bits.pack(codes, levels.bits)
    return Saved((packed,), recipe)


def mask_bits(mask: Tensor, scale: float = 1.0) -> Saved:
    """A bool tensor in 1 bit an element; rebuilt as 0 and ``scale``."""
    geometry = Geometry.of(mask)
    flat = geometry.in_memory_order(mask).view(-1).view(torch.uint8)
    return Saved((bits.pack(flat, 1),), Coded(Levels(1, 0.0, scale), geometry))
