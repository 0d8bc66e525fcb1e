"""Deltas in few bits: of every 256 numbers the k largest, each an index and a code, with error feedback around it.

After Sarfi et al., "SparseLoCo" (2025, arXiv:2508.15706): what a message leaves out of x, by selecting and by rounding,
is kept by its sender and added to the next x, so that nothing is lost, only late:

    c = C(e + Δ),   e ← e + Δ − c

Other than there, the sender computes with e meanwhile: see :mod:`lte.headed`.

A message of n numbers, in chunks of 256 and blocks of 16 chunks:

    lo, hi     two bfloat16 a block: the least and the largest magnitude that is sent of it
    indices    k bytes a chunk
    codes      k·b bits a chunk: the sign, and in b − 1 bits which of 2^(b−1) equal steps from lo to hi it lies in

which is k·(8 + b)/256 + 1/128 bits a number: 0.15 for the largest 1.2 % in 4 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .config import LTEConfig

CHUNK, BLOCK = 256, 16


@dataclass(frozen=True)
class Sparse:
    """How deltas are sent."""

    kept: int
    """k of every 256 numbers."""
    bits: int
    """b of each."""

    @classmethod
    def of(cls, config: LTEConfig) -> "Sparse | None":
        """What a configuration asks for; None where all of a delta is sent, exactly."""
        if config.merge_density == 1:
            return None
        return cls(min(max(round(CHUNK * config.merge_density), 1), CHUNK - 1), config.merge_bits)

    def size(self, numbers: int) -> int:
        """Bytes of a message of so many numbers."""
        chunks = -(-numbers // CHUNK)
        return 4 * -(-chunks // BLOCK) + chunks * self.kept + -(-chunks * self.kept * self.bits // 8)

    def pack(self, x: Tensor) -> Tensor:
        """x, any shape -> its message, uint8 (size,)."""
        flat = x.detach().float().flatten()
        chunks = pad(flat, (0, -flat.numel() % CHUNK)).view(-1, CHUNK)  # (C, 256)
        indices = chunks.abs().topk(self.kept, dim=1).indices  # (C, k)
        values = chunks.gather(1, indices)
        magnitudes = _in_blocks(values.abs())  # (G, 16·k)
        lo, hi = magnitudes.amin(1).bfloat16(), magnitudes.amax(1).bfloat16()
        low, width = (t[: len(values), None] for t in _spread(lo, hi))  # (C, 1) each
        steps = 2 ** (self.bits - 1)
        step = ((values.abs() - low) / width * steps).nan_to_num(0.0).floor().clamp(0, steps - 1).int()
        codes = step + steps * (values < 0).int()
        bounds = torch.stack([lo, hi], 1).flatten().view(torch.uint8)
        return torch.cat([bounds, indices.flatten().to(torch.uint8), _pack_bits(codes.flatten(), self.bits)])

    def unpack(self, message: Tensor, like: Tensor) -> Tensor:
        """What a message says, in the shape and dtype of ``like``: zero where nothing was sent."""
        n, k = like.numel(), self.kept
        chunks = -(-n // CHUNK)
        first, second = 4 * -(-chunks // BLOCK), chunks * k
        bounds, indices, codes = message.split([first, second, len(message) - first - second])
        lo, hi = bounds.clone().view(torch.bfloat16).view(-1, 2).unbind(1)
        low, width = (t[:chunks, None] for t in _spread(lo, hi))
        code = _unpack_bits(codes, chunks * k, self.bits).view(chunks, k)
        steps = 2 ** (self.bits - 1)
        values = low + (code % steps + 0.5) / steps * width  # (C, k)
        values = torch.where(code >= steps, -values, values)
        out = values.new_zeros(chunks, CHUNK).scatter_(1, indices.view(chunks, k).long(), values)
        return out.flatten()[:n].view(like.shape).to(like.dtype)


def _in_blocks(values: Tensor) -> Tensor:
    """(C, k) -> (G, 16·k): the last block is filled up with its last chunk."""
    missing = -len(values) % BLOCK
    return torch.cat([values, values[-1:].expand(missing, -1)]).view(-1, BLOCK * values.shape[1])


def _spread(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """(low, width) of every chunk, from those of the blocks; in float32."""
    low = lo.float()
    return low.repeat_interleave(BLOCK), (hi.float() - low).repeat_interleave(BLOCK)


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits -> uint8, without gaps."""
    each = (codes[:, None] >> torch.arange(bits, device=codes.device)) & 1
    stream = pad(each.flatten(), (0, -each.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def _unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    stream = (packed[:, None].int() >> torch.arange(8, device=packed.device)) & 1
    each = stream.flatten()[: count * bits].view(count, bits)
    return (each << torch.arange(bits, device=packed.device)).sum(1)
