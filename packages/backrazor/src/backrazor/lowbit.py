"""The low-bit packing: every element in 2 to 8 bits, as a level between the ends of its group.

A tensor's memory is read as (blocks, rows, columns), where a column is one channel: for the input of a linear layer
rows are tokens and columns features. A group is some 64 rows of one column, so that a channel with large values
costs its neighbours nothing. With lo and hi the least and the largest of a group and L = 2^width − 1 steps,

    first = lo + s (hi − lo), towards −∞ in bfloat16          step = (hi − s (hi − lo) − first) / L, in bfloat16
    code = round((x − first) / step), within 0 … L            x̃ = first + code · step

where s = 1/20 at 2 bits, since few levels serve better within the ends, and 0 otherwise. One pass finds the ends, one
writes the codes; nothing is selected. Sizes follow from shapes alone.
"""

import torch
from torch import Tensor

from . import bits, cpu_kernels
from .internals import is_fake
from .rows import Rows

CHUNK = 1 << 17
"""Elements handled at a time."""


def shrink(width: int) -> float:
    """How far within the ends the outer levels stand, as a part of their distance."""
    return 0.05 if width == 2 else 0.0


def pack(x: Tensor, cut: Rows, norm: tuple[Tensor | None, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Pack ``x``, contiguous, of as many elements as the cut; with ``norm``, mean (None: 0) and rstd of each of its
    blocks · rows rows, (x − mean) · rstd.

    Returns:
        Codes, uint8 (:func:`.bits.packed_bytes`), and ends, bfloat16 (blocks, groups, 2, columns): first and step.
    """
    ends = x.new_empty((cut.blocks, cut.groups, 2, cut.columns), dtype=torch.bfloat16)
    n_bytes = bits.packed_bytes(cut.elements, cut.width)
    if is_fake(x):
        return x.new_empty(n_bytes, dtype=torch.uint8), ends
    x = x.detach().reshape(cut.blocks, cut.rows, cut.columns)
    quick = cpu_kernels.lowbit_pack(x, cut, shrink(cut.width), ends, n_bytes, norm)
    if quick is not None:
        return quick, ends
    if norm is not None:
        mean, rstd = norm
        rows = (cut.blocks, cut.rows, 1)
        x = (x - mean.view(rows) if mean is not None else x) * rstd.view(rows)
    if x.is_cuda:
        from .triton_lowbit import pack_cuda

        return bits.pack(pack_cuda(x, cut, shrink(cut.width), ends), cut.width), ends
    return bits.pack(_codes(x, cut, ends).view(-1), cut.width), ends


def _codes(x: Tensor, cut: Rows, ends: Tensor) -> Tensor:
    """Codes, uint8 (blocks, rows, columns); fills in the ends."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    top = (1 << cut.width) - 1
    whole = cut.rows // cut.group
    many = max(1, CHUNK // (cut.group * cut.columns))
    for first_row, rows in ((0, cut.group), (whole * cut.group, cut.rows - whole * cut.group)):
        count = whole if first_row == 0 else 1
        if rows == 0 or count == 0:
            continue
        at = slice(first_row, first_row + count * rows)
        parts = x[:, at].unflatten(1, (count, rows))  # (blocks, count, rows, columns)
        into = codes[:, at].unflatten(1, (count, rows))
        there = ends[:, first_row // cut.group : first_row // cut.group + count]
        blocks = max(1, many // count)
        for b in range(0, cut.blocks, blocks):
            for g in range(0, count, many):
                sub = (slice(b, b + blocks), slice(g, g + many))
                part = parts[sub].float()
                low, high = part.amin(2, keepdim=True), part.amax(2, keepdim=True)
                inside = (high - low).mul_(shrink(cut.width))
                first = _downwards(low + inside)
                step = (high - inside).sub_(first).div_(top).bfloat16().float()
                there[sub][:, :, 0], there[sub][:, :, 1] = first.squeeze(2), step.squeeze(2)
                inverse = torch.where(step > 0, 1 / step, 0)
                into[sub] = (part - first).mul_(inverse).round_().clamp_(0, top).to(torch.uint8)
    return codes


def _downwards(x: Tensor) -> Tensor:
    """The largest bfloat16 that is no larger, as float32."""
    raw = x.view(torch.int32)
    cut = raw & -65536
    return torch.where((raw < 0) & (cut != raw), cut + 65536, cut).view(torch.float32)


def unpack(codes: Tensor, ends: Tensor, cut: Rows, dtype: torch.dtype) -> Tensor:
    """first + code · step of every element, (elements,) in ``dtype``."""
    if is_fake(codes):
        return codes.new_empty((cut.elements,), dtype=dtype)
    quick = cpu_kernels.lowbit_unpack(codes, ends, cut, dtype)
    if quick is not None:
        return quick
    if codes.is_cuda:
        from .triton_lowbit import unpack_cuda

        return unpack_cuda(bits.unpack(codes, cut.elements, cut.width), ends, cut).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    x = bits.unpack(codes, cut.elements, cut.width).to(wide).view(cut.blocks, cut.rows, cut.columns)
    whole = cut.rows // cut.group
    at = whole * cut.group
    if whole:
        first, step = ends[:, :whole].to(wide).unsqueeze(2).unbind(3)  # (blocks, whole, 1, columns)
        x[:, :at].unflatten(1, (whole, cut.group)).mul_(step).add_(first)
    if at < cut.rows:
        first, step = ends[:, whole].to(wide).unsqueeze(1).unbind(2)
        x[:, at:].mul_(step).add_(first)
    return x.view(-1).to(dtype)


def stored_bytes(cut: Rows) -> int:
    """Bytes that :func:`pack` keeps."""
    return bits.packed_bytes(cut.elements, cut.width) + 4 * cut.blocks * cut.groups * cut.columns
