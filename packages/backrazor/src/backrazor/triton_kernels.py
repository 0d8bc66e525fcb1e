"""CUDA: selection, gathering and casting in one pass over x, and the scatter back; the same numbers as on the CPU.

A program has some columns of one span in registers, n rows each, and finds the k largest of every column by k times
"maximum over the rows, strike it out", with the keys of :mod:`.packing`. Row r that was selected as the i-th of its
group (rows rising) adds C(r, i) to the group's rank. Checked against the CPU path under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import _subsets, binomials
from .layout import Layout
from .values import float_type

COLUMNS = 64


@triton.jit
def _pack_kernel(  # type: ignore[no-untyped-def]
    x,
    kept,
    ranks,
    binomials,
    size,
    m,
    n: tl.constexpr,
    n_pad: tl.constexpr,
    k: tl.constexpr,
    low: tl.constexpr,
    width: tl.constexpr,
    bf16: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)  # (width,)
    row = tl.arange(0, n_pad)[:, None]  # (n_pad, 1)
    place = row * m + column[None, :]
    there = (row < n) & (column[None, :] < m) & (place < size)
    value = tl.load(x + span * size + place, mask=there, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True) & (0x7FFFFFFF ^ low)
    keys = tl.where(there, bits | row, -1)
    chosen = there & (row < 0)
    for _ in range(k):
        best = tl.max(keys, axis=0) & low  # rows; keys are distinct
        now = row == best[None, :]
        chosen = chosen | now
        keys = tl.where(now, -1, keys)
    chosen = chosen & there
    order = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    terms = tl.load(binomials + order * n + row, mask=chosen, other=0)
    tl.store(ranks + span * m + column, tl.sum(terms, axis=0), mask=column < m)
    target = kept + span * k * m + order * m + column[None, :]
    if bf16:  # kept is int16: round to the nearest even by hand, so that every backend does
        raw = value.to(tl.int32, bitcast=True)
        rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        tl.store(target, tl.where(value == value, rounded, 0x7FC0).to(tl.int16), mask=chosen)
    else:
        tl.store(target, value, mask=chosen)


@triton.jit
def _unpack_kernel(  # type: ignore[no-untyped-def]
    values, ranks, subsets, out, stride, m, count, k: tl.constexpr, width: tl.constexpr
):
    span = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    inside = column < m
    rank = tl.load(ranks + span * m + column, mask=inside, other=0)
    for j in range(k):
        place = tl.load(subsets + j * count + rank, mask=inside, other=0)
        value = tl.load(values + (span * k + j) * m + column, mask=inside, other=0.0)
        tl.store(out + span * stride + place * m + column, value, mask=inside)


def pack_cuda(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Values (spans, k, m) and ranks int32 (spans, m) of ``x`` (spans, size)."""
    groups, m = layout.groups, layout.columns
    if x.dtype == torch.float64:
        x = x.float()
    padded = groups.n * m
    if m < groups.n and padded != layout.size:
        x = torch.nn.functional.pad(x, (0, padded - layout.size))
    kept = x.new_zeros((layout.spans, groups.k, m), dtype=float_type(layout.values))
    ranks = x.new_empty((layout.spans, m), dtype=torch.int32)
    grid = (layout.spans, triton.cdiv(m, COLUMNS))
    _pack_kernel[grid](
        x,
        kept.view(torch.int16) if kept.dtype == torch.bfloat16 else kept,
        ranks,
        binomials(groups.n, groups.k, x.device),
        x.shape[1],
        m,
        groups.n,
        triton.next_power_of_2(groups.n),
        groups.k,
        (1 << groups.place_bits) - 1,
        COLUMNS,
        kept.dtype == torch.bfloat16,
    )
    return kept, ranks


def unpack_cuda(values: Tensor, ranks: Tensor, layout: Layout) -> Tensor:
    """Zeros with ``values`` (spans, k, m) at the places that ``ranks`` (spans, m) tell: (spans · size,)."""
    groups, m, size = layout.groups, layout.columns, layout.size
    padded = groups.n * m
    short = m < groups.n and padded != size
    stride = padded if short else size
    out = values.new_zeros((layout.spans - 1) * stride + padded)
    table = _subsets(groups.n, groups.k, values.device)
    grid = (layout.spans, triton.cdiv(m, COLUMNS))
    _unpack_kernel[grid](values.contiguous(), ranks.int(), table, out, stride, m, table.shape[1], groups.k, COLUMNS)
    return out.view(layout.spans, padded)[:, :size].reshape(-1) if short else out[: layout.spans * size]
