"""The default packing: the k largest of every group of n, found without sorting, at sizes that depend on shapes alone.

A span (:mod:`.layout`) is a matrix of n rows and m columns, each column one group. Selection is k times "maximum over
the rows, strike it out", over 32-bit keys that order by magnitude:

    key = (bits of |x| as float32, without the lowest place_bits) | row

Stored for a span: values (k·m) in ``values`` format, rows rising within a group, and the groups' ranks
(:mod:`.groups`).
"""

import math

import torch
from torch import Tensor

from . import bits, cpu_kernels
from .groups import Groups, binomials, rank, short_subsets, unrank
from .internals import is_fake
from .layout import Layout
from .values import decode, encode, float_type, stored_bits

CHUNK = 1 << 19
"""Elements handled at a time: their keys (2 MiB) stay in a core's second-level cache."""


def pack(x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Pack ``x``, contiguous, of spans·size elements.

    Returns:
        The values' tensors (:func:`.values.encode`), each with the spans first, and ranks uint8 (spans, rank bytes).
    """
    groups = layout.groups
    if is_fake(x):
        kept = x.new_empty((layout.spans, layout.kept), dtype=torch.float32)
        ranks = x.new_empty((layout.spans, rank_bytes(groups, layout.columns)), dtype=torch.uint8)
        return (*encode(kept, layout.values), ranks)
    x = x.detach().reshape(layout.spans, layout.size)
    quick = cpu_kernels.pack(
        x,
        layout,
        float_type(layout.values),
        binomials(groups.n, groups.k, x.device),
        rank_bytes(groups, layout.columns),
    )
    if quick is not None:
        kept, packed = quick
        return (*encode(kept.view(layout.spans, -1), layout.values), packed)
    if x.is_cuda:
        from .triton_kernels import pack_cuda

        kept, ranks = pack_cuda(x, layout)
    else:
        kept, ranks = _pack_cpu(x, layout)
    return (*encode(kept.view(layout.spans, -1), layout.values), bits.pack(ranks, groups.rank_bits))


def _pack_cpu(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Values (spans, k, m), already in their type if it is a float's, and ranks int32 (spans, m)."""
    groups = layout.groups
    if x.dtype == torch.float64:
        x = x.float()
    padded = groups.n * layout.columns
    if layout.columns < groups.n and padded != layout.size:  # short: more than the last row may be missing
        x = torch.nn.functional.pad(x, (0, padded - layout.size))
    size, m, k = x.shape[1], layout.columns, groups.k
    kept = x.new_empty((layout.spans, k, m), dtype=float_type(layout.values))
    ranks = x.new_empty((layout.spans, m), dtype=torch.int32)
    columns = max(1, min(m, CHUNK // groups.n))
    spans = max(1, min(layout.spans, CHUNK // (groups.n * m)))
    keys = torch.empty(groups.n * spans * columns, dtype=torch.int32)
    flat = x.view(-1)
    for a in range(0, m, columns):
        b = min(m, a + columns)
        column = torch.arange(a, b, dtype=torch.int32)
        for s in range(0, layout.spans, spans):
            part = x[s : s + spans]
            chunk = keys[: groups.n * len(part) * (b - a)].view(groups.n, len(part), b - a)
            places = _select(part, a, b, m, groups, chunk)  # k of (spans, b - a), rising
            ranks[s : s + spans, a:b] = rank(places, groups)
            at = torch.add(column, torch.stack(places), alpha=m)  # (k, spans, b - a), within a span
            if len(part) > 1:
                at += torch.arange(0, len(part) * size, size, dtype=torch.int32).view(-1, 1)
            values = flat[s * size : (s + len(part)) * size].index_select(0, at.view(-1))
            kept[s : s + spans, :, a:b] = values.view(at.shape).transpose(0, 1)
    return kept, ranks


def _select(x: Tensor, a: int, b: int, m: int, groups: Groups, keys: Tensor) -> list[Tensor]:
    """Rows of the k largest in columns a … b of (spans, size): k of int32 (spans, b - a), rising."""
    spans, size = x.shape
    n, width = groups.n, b - a
    mask = (1 << groups.place_bits) - 1
    end = size - (n - 1) * m  # columns that have a last row
    whole = n if end == m else n - 1
    rows = x.as_strided((whole, spans, width), (m, size, 1), x.storage_offset() + a)
    _magnitudes(rows, keys[:whole], mask)
    keys[:whole].bitwise_or_(torch.arange(whole, dtype=torch.int32).view(-1, 1, 1))
    if whole < n:
        last = min(b, end)
        if last < b:
            keys[n - 1].fill_(-1)  # below every magnitude
        if a < last:
            start = (n - 1) * m
            there = keys[n - 1, :, : last - a]
            _magnitudes(x[:, start + a : start + last], there, mask)
            there.bitwise_or_(n - 1)
    rounds: list[Tensor] = []
    for j in range(groups.k):
        place = keys.amax(0).bitwise_and_(mask)
        rounds.append(place)
        if j + 1 < groups.k:
            keys.scatter_(0, place.long().unsqueeze(0), torch.full_like(place, -1).unsqueeze(0))
    return _rising(rounds)


def _magnitudes(x: Tensor, out: Tensor, mask: int) -> None:
    """The bits of |x| as float32 without the lowest place bits."""
    keep_bits = 0x7FFFFFFF & ~mask
    if x.dtype == torch.float32:
        torch.bitwise_and(x.view(torch.int32), keep_bits, out=out)
    else:
        out.view(torch.float32).copy_(x)
        out.bitwise_and_(keep_bits)


def _rising(places: list[Tensor]) -> list[Tensor]:
    """Sort k tensors elementwise (odd-even transposition; k is small)."""
    k = len(places)
    if k > 8:
        return list(torch.stack(places).sort(0).values)
    for start in range(k):
        for i in range(start % 2, k - 1, 2):
            low = torch.minimum(places[i], places[i + 1])
            places[i + 1] = torch.maximum(places[i], places[i + 1])
            places[i] = low
    return places


def unpack(tensors: tuple[Tensor, ...], layout: Layout, dtype: torch.dtype) -> Tensor:
    """Zeros, with the kept values at their places: (spans · size,) in ``dtype``."""
    spans, size, m, groups = layout.spans, layout.size, layout.columns, layout.groups
    if is_fake(tensors[0]):
        return tensors[0].new_empty((spans * size,), dtype=dtype)
    as_kept = layout.values == "bf16"  # the kernel widens those itself
    values = tensors[0] if as_kept else decode(tensors[:-1], layout.values, layout.kept, dtype)
    quick = cpu_kernels.unpack(values, tensors[-1], layout, dtype, short_subsets(groups))
    if quick is not None:
        return quick
    values = values.to(dtype).view(spans, groups.k, m)
    ranks = bits.unpack(tensors[-1], m, groups.rank_bits)
    if values.is_cuda:
        from .triton_kernels import unpack_cuda

        return unpack_cuda(values, ranks, layout)
    padded = groups.n * m
    short = m < groups.n and padded != size
    stride = padded if short else size
    # The last row of a span may reach into the next one; nothing is ever kept there.
    out = torch.zeros((spans - 1) * stride + padded, dtype=dtype)
    places = unrank(ranks.int(), groups)  # int64 (k, spans, m)
    out.as_strided((groups.n, spans, m), (m, stride, 1)).scatter_(0, places, values.transpose(0, 1))
    if short:
        return out.view(spans, padded)[:, :size].reshape(-1)
    return out[: spans * size]


def stored_bytes(layout: Layout) -> int:
    """Bytes that :func:`pack` keeps."""
    return layout.spans * (
        math.ceil(layout.kept * stored_bits(layout.values) / 8) + rank_bytes(layout.groups, layout.columns)
    )


def rank_bytes(groups: Groups, columns: int) -> int:
    """Bytes of the ranks of ``columns`` groups."""
    return bits.packed_bytes(columns, groups.rank_bits)
