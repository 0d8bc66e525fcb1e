"""CUDA: the low-bit codes and their ends in one pass over x, and back; the same numbers as on the CPU.

A program has ``width`` groups of one to some 100 rows in registers. Fused multiply-adds are off and divisions are
exact, so that every backend rounds alike. Checked against the CPU path under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows

WIDTH = 32


@triton.jit
def _place(job, groups, group, rows, columns):  # type: ignore[no-untyped-def]
    """Where a group begins in x, where its first end stands, and its rows."""
    column = job % columns
    g = (job // columns) % groups
    block = job // columns // groups
    start = (block * rows + g * group) * columns + column
    return start, (block * groups + g) * 2 * columns + column, tl.minimum(group, rows - g * group)


@triton.jit
def _pack_kernel(  # type: ignore[no-untyped-def]
    x, ends, codes, jobs, groups, group, rows, columns, shrink, top, tall: tl.constexpr, width: tl.constexpr
):
    job = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)  # (width,)
    start, end, here = _place(job, groups, group, rows, columns)
    row = tl.arange(0, tall)[:, None]  # (tall, 1)
    there = (row < here[None, :]) & (job < jobs)[None, :]
    at = start[None, :] + row * columns
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    low = tl.min(tl.where(there, value, float("inf")), axis=0)
    high = tl.max(tl.where(there, value, float("-inf")), axis=0)
    inside = (high - low) * shrink
    raw = (low + inside).to(tl.int32, bitcast=True)
    cut = raw & -65536  # downwards to bfloat16: a negative number that is not whole grows in magnitude
    first = tl.where((raw < 0) & (cut != raw), cut + 65536, cut).to(tl.float32, bitcast=True)
    raw = tl.div_rn(high - inside - first, top + tl.zeros_like(first)).to(tl.int32, bitcast=True)
    half = (raw + 0x7FFF + ((raw >> 16) & 1)) & -65536  # to the nearest even bfloat16
    step = half.to(tl.float32, bitcast=True)
    used = job < jobs
    tl.store(ends + end, (first.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=used)
    tl.store(ends + end + columns, (half >> 16).to(tl.int16), mask=used)
    inverse = tl.where(step > 0, tl.div_rn(tl.zeros_like(step) + 1.0, tl.where(step > 0, step, 1.0)), 0.0)
    code = (value - first[None, :]) * inverse[None, :]
    code = tl.minimum(tl.maximum((code + 12582912.0) - 12582912.0, 0.0), top)  # to the nearest even whole number
    tl.store(codes + at, code.to(tl.uint8), mask=there)


@triton.jit
def _unpack_kernel(  # type: ignore[no-untyped-def]
    codes, ends, out, jobs, groups, group, rows, columns, tall: tl.constexpr, width: tl.constexpr
):
    job = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    start, end, here = _place(job, groups, group, rows, columns)
    row = tl.arange(0, tall)[:, None]
    used = job < jobs
    there = (row < here[None, :]) & used[None, :]
    at = start[None, :] + row * columns
    first = tl.load(ends + end, mask=used, other=0.0).to(tl.float32)
    step = tl.load(ends + end + columns, mask=used, other=0.0).to(tl.float32)
    code = tl.load(codes + at, mask=there, other=0).to(tl.float32)
    tl.store(out + at, code * step[None, :] + first[None, :], mask=there)


def _sizes(cut: Rows) -> tuple[int, tuple[int, ...], tuple[int]]:
    jobs = cut.blocks * cut.groups * cut.columns
    return jobs, (jobs, cut.groups, cut.group, cut.rows, cut.columns), (triton.cdiv(jobs, WIDTH),)


def pack_cuda(x: Tensor, cut: Rows, shrink: float, ends: Tensor) -> Tensor:
    """Codes, uint8 (elements,), of ``x`` (blocks, rows, columns), contiguous; fills in the ends."""
    x = x.float() if x.dtype == torch.float64 else x
    codes = x.new_empty(cut.elements, dtype=torch.uint8)
    _, sizes, grid = _sizes(cut)
    top, tall = float((1 << cut.width) - 1), triton.next_power_of_2(cut.group)
    _pack_kernel[grid](x, ends.view(torch.int16), codes, *sizes, shrink, top, tall, WIDTH, enable_fp_fusion=False)
    return codes


def unpack_cuda(codes: Tensor, ends: Tensor, cut: Rows) -> Tensor:
    """first + code · step, float32 (elements,)."""
    out = torch.empty(cut.elements, device=codes.device)
    _, sizes, grid = _sizes(cut)
    tall = triton.next_power_of_2(cut.group)
    _unpack_kernel[grid](codes, ends, out, *sizes, tall, WIDTH, enable_fp_fusion=False)
    return out
