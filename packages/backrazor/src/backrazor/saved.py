"""What stands in the graph instead of an activation: its tensors, and a recipe that makes the activation from them."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import lowbit, packing, paper_packing
from .groups import Groups
from .internals import is_fake
from .layout import Layout, layout_of
from .rows import Rows, rows_of
from .values import decode, encode

HEAD = 1 << 17
"""A matrix of no more elements is the input of a head: it takes few bytes, and is kept in 8 bits."""


@dataclass(frozen=True)
class Geometry:
    """Shape and strides of a tensor whose elements fill a stretch of memory without holes, in some order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "Geometry":
        """The geometry of ``x``, or the contiguous one where ``x`` has holes or overlaps."""
        return _geometry(x.shape, x.stride())

    def order(self) -> tuple[int, ...]:
        """Dimensions from the outermost in memory to the innermost."""
        return _order(self.shape, self.stride)

    def in_memory_order(self, x: Tensor) -> Tensor:
        """``x``, of this shape, as a contiguous tensor in the order of its memory (no copy if it fills its memory)."""
        return x.permute(self.order()).contiguous() if self.shape else x.reshape(1)

    def restore(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride)

    def impose(self, x: Tensor) -> Tensor:
        """``x``, of this shape, with these strides: copied if it has others."""
        if tuple(x.stride()) == self.stride and x.shape == self.shape:
            return x
        return x.new_empty_strided(self.shape, self.stride).copy_(x.view(self.shape))


@functools.lru_cache(4096)
def _geometry(shape: torch.Size, stride: tuple[int, ...]) -> Geometry:
    if _fills_its_memory(shape, stride):
        return Geometry(tuple(shape), stride)
    contiguous, step = [], 1
    for size in reversed(shape):
        contiguous.append(step)
        step *= max(size, 1)
    return Geometry(tuple(shape), tuple(reversed(contiguous)))


@functools.lru_cache(4096)
def _order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(shape)), key=lambda d: (-stride[d], shape[d] != 1, d)))


def _fills_its_memory(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda d: (d[1], d[0])):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


class Recipe:
    """How to make a dense tensor from the tensors of a :class:`Saved`."""

    geometry: Geometry
    """Of the tensor that is made."""

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

    geometry: Geometry

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return tensors[0].to(dtype)


@dataclass(frozen=True)
class Pruned(Recipe):
    """The k largest of every group (:mod:`.packing`)."""

    layout: Layout
    geometry: Geometry

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return self.geometry.restore(packing.unpack(tensors, self.layout, dtype))


@dataclass(frozen=True)
class LowBit(Recipe):
    """Every element in a few bits, between the ends of its group (:mod:`.lowbit`)."""

    cut: Rows
    geometry: Geometry

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, ends = tensors
        return self.geometry.restore(lowbit.unpack(codes, ends, self.cut, dtype))


@dataclass(frozen=True)
class Normal(Recipe):
    """A norm's x̂ from codes that know no zero, with rstd beside them: x̂ is 0 where rstd says that x hardly varies.

    A row's mean x̂² is 1 − ε rstd², about 1 but of rows near to zero. Codes err by some 1.4 / (2^width − 1) in every
    row; one whose x̂ is well below that errs by less as zeros. A norm behind the next layer (QK-norm) would multiply the
    gradient of such a row, and the error with it, by 1 / √ε, a thousand in many models.
    """

    base: LowBit
    eps: float
    geometry: Geometry

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        *parts, rstd = tensors
        x = self.base.rebuild(tuple(parts), dtype)
        if is_fake(x):
            return x
        least = 0.8 / ((1 << self.base.cut.width) - 1)
        constant = rstd.square().mul_(self.eps) > 1 - least**2
        if constant.device.type == "cpu" and not bool(constant.any()):  # elsewhere asking would wait for the device
            return x
        return x.masked_fill_(constant, 0)


@dataclass(frozen=True)
class PaperPruned(Recipe):
    """What is at least the threshold of its sample (:mod:`.paper_packing`)."""

    geometry: Geometry

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        values, mask = tensors
        flat = paper_packing.unpack(values, mask, math.prod(self.geometry.shape), dtype)
        return self.geometry.restore(flat)


@dataclass(frozen=True)
class EightBit(Recipe):
    """Every element, as int8 with a scale for every 128 (:mod:`.values`)."""

    geometry: Geometry

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        flat = decode(tensors, "int8", tensors[0].shape[1], dtype)
        return self.geometry.restore(flat.reshape(-1))


@dataclass(frozen=True)
class Affine(Recipe):
    """x̂ γ + β: a normalisation's output, from its pruned x̂ and its exact weights."""

    geometry: Geometry
    base: Recipe
    base_tensors: int
    has_weight: bool
    has_bias: bool

    def weights(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """γ and β."""
        rest = [t.to(dtype) for t in tensors[self.base_tensors :]]
        weight = rest.pop(0) if self.has_weight else None
        return weight, rest.pop(0) if self.has_bias else None

    def apply(self, x: Tensor, tensors: tuple[Tensor, ...], alone: bool) -> Tensor:
        """From x̂, which is used up if it is the caller's ``alone``."""
        weight, bias = self.weights(tensors, x.dtype)
        if weight is not None:
            x, alone = (x.mul_(weight) if alone else x * weight), True
        if bias is not None:
            x = x.add_(bias) if alone else x + bias
        return x

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        x = self.base.rebuild(tensors[: self.base_tensors], dtype)
        return self.apply(x, tensors, alone=not isinstance(self.base, Dense))


def prune(x: Tensor, groups: Groups | None, values: str) -> Saved:
    """Pack ``x``, or keep it as it is where packing would not make it smaller."""
    if groups is None or x.numel() == 0:
        return Saved((x,), Dense(Geometry.of(x)))
    geometry = Geometry.of(x)
    flat = geometry.in_memory_order(x.detach())
    layout = layout_of(flat.shape[0], math.prod(flat.shape[1:]), groups, values)
    if packing.stored_bytes(layout) >= x.numel() * x.element_size():
        return Saved((x,), Dense(Geometry.of(x)))
    return Saved(packing.pack(flat.view(-1), layout), Pruned(layout, geometry))


def low_bit(x: Tensor, width: int, channels: tuple[int, ...]) -> Saved:
    """``x`` in codes of ``width`` bits, in groups of one channel; in 8 bits where that gives no groups."""
    geometry = Geometry.of(x)
    cut = _cut(x, geometry, width, channels)
    if cut is None:
        return eight_bit(x)
    if lowbit.stored_bytes(cut) >= x.numel() * x.element_size():
        return Saved((x,), Dense(geometry))
    return Saved(lowbit.pack(geometry.in_memory_order(x.detach()), cut), LowBit(cut, geometry))


def _cut(x: Tensor, geometry: Geometry, width: int, channels: tuple[int, ...]) -> Rows | None:
    """The groups of ``x`` in the order of its memory; None where it is too small or too short for them."""
    if x.numel() == 0 or (x.dim() <= 2 and x.numel() <= HEAD):
        return None
    return _rows(geometry.order(), tuple(x.shape), width, channels)


@functools.lru_cache(4096)
def _rows(order: tuple[int, ...], shape: tuple[int, ...], width: int, channels: tuple[int, ...]) -> Rows | None:
    return rows_of(tuple(shape[d] for d in order), {order.index(c % len(shape)) for c in channels}, width)


def low_bit_normal(x: Tensor, width: int, channels: tuple[int, ...], rstd: Tensor, eps: float) -> Saved:
    """A norm's x̂ as by :func:`low_bit`, but for rows next to zero, which ``rstd``, kept anyway, tells."""
    saved = low_bit(x, width, channels)
    if not isinstance(saved.recipe, LowBit) or rstd.dtype not in (torch.float32, torch.float64):
        return saved
    return Saved((*saved.tensors, rstd), Normal(saved.recipe, eps, saved.recipe.geometry))


def low_bit_norm(x: Tensor, at: tuple[Tensor | None, Tensor], width: int, dims: tuple[int, ...], eps: float) -> Saved:
    """x̂ of a norm of ``x`` over its last dimensions ``dims``, as by :func:`low_bit_normal`, without making x̂ first.

    Args:
        at: mean (None: 0) and rstd of each row, which they have 1 for each of ``dims`` for.
    """
    x = x.detach().contiguous()
    geometry, (mean, rstd) = Geometry.of(x), at
    cut = _cut(x, geometry, width, dims)
    if cut is None or lowbit.stored_bytes(cut) >= x.numel() * x.element_size():
        return low_bit_normal((x - mean if mean is not None else x) * rstd, width, dims, rstd, eps)
    return Saved((*lowbit.pack(x, cut, at), rstd), Normal(LowBit(cut, geometry), eps, geometry))


def prune_as_paper(x: Tensor, keep: float, values: str) -> Saved:
    """The official code's storage of ``x``."""
    if keep == 1 or x.numel() == 0:
        return Saved((x,), Dense(Geometry.of(x)))
    geometry = Geometry(tuple(x.shape), tuple(torch.empty(x.shape, device="meta").stride()))
    samples = x.shape[0] if x.dim() > 1 else 1
    return Saved(paper_packing.pack(x.detach().reshape(samples, -1).contiguous(), keep, values), PaperPruned(geometry))


def eight_bit(x: Tensor) -> Saved:
    """A copy of ``x`` in 8.125 bits an element, or ``x`` itself where that is not smaller."""
    geometry = Geometry.of(x)
    if x.numel() < 64 or x.element_size() == 1:
        return Saved((x,), Dense(Geometry.of(x)))
    return Saved(encode(geometry.in_memory_order(x.detach()).view(1, -1), "int8"), EightBit(geometry))
