"""What stands in the graph instead of an activation: its tensors, and a recipe that makes the activation from them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import packing
from .packing import Layout


@dataclass(frozen=True)
class Geometry:
    """Shape and strides of a tensor whose elements fill a stretch of memory without holes, in some order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "Geometry":
        """The geometry of ``x``, or the contiguous one where ``x`` has holes or overlaps."""
        if _fills_its_memory(x):
            return cls(tuple(x.shape), tuple(x.stride()))
        stride, step = [], 1
        for size in reversed(x.shape):
            stride.append(step)
            step *= max(size, 1)
        return cls(tuple(x.shape), tuple(reversed(stride)))

    def order(self) -> list[int]:
        """Dimensions from the outermost in memory to the innermost."""
        return sorted(range(len(self.shape)), key=lambda d: (-self.stride[d], self.shape[d] != 1, d))

    def in_memory_order(self, x: Tensor) -> Tensor:
        """``x``, of this shape, as a contiguous tensor in the order of its memory (no copy if it fills its memory)."""
        return x.permute(self.order()).contiguous() if self.shape else x.reshape(1)

    def restore(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride)


def _fills_its_memory(x: Tensor) -> bool:
    step = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True


class Recipe:
    """How to make a dense tensor from the tensors of a :class:`Saved`."""

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Saved:
    """Tensors to hand to ``save_for_backward``, and their recipe."""

    tensors: tuple[Tensor, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Dense(Recipe):
    """The tensor itself, by reference: autograd checks its version."""

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return tensors[0].to(dtype)


@dataclass(frozen=True)
class Pruned(Recipe):
    """The k largest of every group (:mod:`.packing`)."""

    layout: Layout
    geometry: Geometry

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return self.geometry.restore(packing.unpack(tensors, self.layout, dtype))


def prune(x: Tensor, groups: Any, values: str) -> Saved:
    """Pack ``x``, or keep it as it is where packing would not make it smaller."""
    if groups is None or x.numel() == 0:
        return Saved((x,), Dense())
    geometry = Geometry.of(x)
    flat = geometry.in_memory_order(x.detach())
    samples = flat.shape[0]
    layout = packing.layout_of(samples, math.prod(flat.shape[1:]), groups, values)
    if packing.stored_bytes(layout) >= x.numel() * x.element_size():
        return Saved((x,), Dense())
    return Saved(packing.pack(flat.view(-1), layout), Pruned(layout, geometry))
