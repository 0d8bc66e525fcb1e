"""Small codes packed into bytes: masks (1 bit), derivative and window codes (2 to 4 bits), ranks (up to 16 bits).

A code of w bits is cut into pieces of 8, 4, 2 and 1 bits; pieces of p bits are stored 8/p to a byte. The codes of one
byte stand ``ceil(n / (8/p))`` apart, so that packing is shifts of whole contiguous stretches.
"""

import torch
from torch import Tensor

from . import cpu_kernels
from .internals import is_fake

PIECES = (8, 4, 2, 1)


def packed_bytes(n: int, width: int) -> int:
    """Bytes that ``n`` codes of ``width`` bits take."""
    return sum(-(-n * piece // 8) for piece in _pieces(width))


def _pieces(width: int) -> list[int]:
    """Pieces from the lowest bits up: 12 -> [8, 4]; 3 -> [2, 1]."""
    pieces = []
    for piece in PIECES:
        while width >= piece:
            pieces.append(piece)
            width -= piece
    return pieces


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: (..., n), any integer type, each in [0, 2^width).
        width: bits of a code, at least 1.

    Returns:
        uint8 (..., :func:`packed_bytes` (n, width)).
    """
    n_bytes = packed_bytes(codes.shape[-1], width)
    if is_fake(codes):
        return codes.new_empty((*codes.shape[:-1], n_bytes), dtype=torch.uint8)
    quick = cpu_kernels.pack_codes(codes, width, n_bytes)
    if quick is not None:
        return quick
    planes, shift = [], 0
    for piece in _pieces(width):
        part = codes if shift == 0 else codes >> shift
        if width > piece + shift:
            part = part & ((1 << piece) - 1)
        planes.append(_pack_piece(part.to(torch.uint8), piece))
        shift += piece
    return planes[0] if len(planes) == 1 else torch.cat(planes, -1)


def _pack_piece(codes: Tensor, piece: int) -> Tensor:
    lanes = 8 // piece
    n = codes.shape[-1]
    stretch = -(-n // lanes)
    out = codes[..., :stretch]
    if lanes == 1:
        return out
    out = out.clone(memory_format=torch.contiguous_format)
    for lane in range(1, lanes):
        part = codes[..., lane * stretch : (lane + 1) * stretch]
        if part.shape[-1]:  # 2^(lane * piece) * code: disjoint bits, so adding is or-ing
            out[..., : part.shape[-1]].add_(part, alpha=1 << (lane * piece))
    return out


def unpack(packed: Tensor, n: int, width: int) -> Tensor:
    """What :func:`pack` packed: (..., n), uint8 for codes of at most 8 bits, otherwise int32."""
    dtype = torch.uint8 if width <= 8 else torch.int32
    if is_fake(packed):
        return packed.new_empty((*packed.shape[:-1], n), dtype=dtype)
    quick = cpu_kernels.unpack_codes(packed, n, width)
    if quick is not None:
        return quick
    out, start, shift = None, 0, 0
    for piece in _pieces(width):
        size = -(-n * piece // 8)
        part = _unpack_piece(packed[..., start : start + size], n, piece)
        out = part.to(dtype) if out is None else out + (part.to(dtype) << shift)
        start += size
        shift += piece
    assert out is not None
    return out


def _unpack_piece(packed: Tensor, n: int, piece: int) -> Tensor:
    lanes = 8 // piece
    if lanes == 1:
        return packed
    stretch = packed.shape[-1]
    out = packed.new_empty((*packed.shape[:-1], lanes * stretch))
    for lane in range(lanes):
        part = out[..., lane * stretch : (lane + 1) * stretch]
        torch.bitwise_right_shift(packed, lane * piece, out=part)
        if lane < lanes - 1:
            part.bitwise_and_((1 << piece) - 1)
    return out[..., :n]
