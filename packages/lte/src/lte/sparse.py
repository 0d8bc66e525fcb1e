"""Deltas in few bits: of every 256 numbers the k largest, their places and a code each, with error feedback around it.

After Sarfi et al., "SparseLoCo" (2025, arXiv:2508.15706): what a message leaves out of x, by selecting and by rounding,
is kept by its sender and added to the next x, so that nothing is lost, only late:

    c = C(e + Δ),   e ← e + Δ − c

Other than there, the sender computes with e meanwhile (see :mod:`lte.headed`), and places are not sent one by one. A
message of n numbers, in chunks of c and blocks of 16 chunks:

    lo, hi     two bfloat16 a block: the least and the largest magnitude that is sent of it; with b = 1 one, their mean
    places     P bits a chunk: which of the C(c, k) choices of k places out of c, P = ⌈log₂ C(c, k)⌉
    codes      k·b bits a chunk: the sign, and in b − 1 bits which of 2^(b−1) equal steps from lo to hi it lies in

The number of a choice p_1 < … < p_k is Σ_i C(p_i, i) (the combinatorial number system; Knuth, The Art of Computer
Programming, volume 4A, 7.2.1.3). c is 256, or 128 or 64 where the choices would take more than 63 bits. For the largest
3 % in 4 bits that is (49 + 32)/256 + 1/128 = 0.32 bits a number.
"""

from dataclasses import dataclass
from functools import cache
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import pad

from .config import LTEConfig

CHUNKS, BLOCK = (256, 128, 64), 16


@dataclass(frozen=True)
class Sparse:
    """How deltas are sent."""

    kept: int
    """k, of every chunk."""
    bits: int
    """b of each."""
    chunk: int = CHUNKS[0]
    """c: numbers of a chunk."""

    @classmethod
    def of(cls, config: LTEConfig, *, copies: bool = False) -> "Sparse | None":
        """What a configuration asks for, of heads or of copies; None where all of a delta is sent, exactly."""
        density = config.merge_density
        if density == 1:
            return None
        if copies and config.merge_density_replicas is not None:
            density = config.merge_density_replicas
        chunk, kept = CHUNKS[-1], 0
        for chunk in CHUNKS:
            kept = min(max(round(chunk * density), 1), chunk - 1)
            if comb(chunk, min(kept, chunk // 2)) < 2**63:
                break
        return cls(kept, config.merge_bits, chunk)

    @property
    def bits_of_places(self) -> int:
        """P."""
        return (comb(self.chunk, self.kept) - 1).bit_length()

    def _parts(self, numbers: int) -> tuple[int, int, int]:
        """Bytes of a message's magnitudes, places and codes."""
        chunks = -(-numbers // self.chunk)
        magnitudes = (2 if self.bits == 1 else 4) * -(-chunks // BLOCK)
        return magnitudes, -(-chunks * self.bits_of_places // 8), -(-chunks * self.kept * self.bits // 8)

    def size(self, numbers: int) -> int:
        """Bytes of a message of so many numbers."""
        return sum(self._parts(numbers))

    def pack(self, x: Tensor) -> Tensor:
        """x, any shape -> its message, uint8 (size,)."""
        flat = x.detach().float().flatten()
        chunks = pad(flat, (0, -flat.numel() % self.chunk)).view(-1, self.chunk)  # (C, c)
        places = chunks.abs().topk(self.kept, dim=1).indices.sort(1).values  # (C, k)
        values = chunks.gather(1, places)
        bounds = self._bounds(values.abs())
        low, width = self._levels(bounds, len(chunks))
        steps = 2 ** (self.bits - 1)
        step = ((values.abs() - low) / width * steps).nan_to_num(0.0).floor().clamp(0, steps - 1).int()
        codes = step + steps * (values < 0).int()
        order = torch.arange(1, self.kept + 1, device=x.device)
        number = _choices(self.chunk, self.kept).to(x.device)[order, places].sum(1)  # (C,)
        in_bits = [_pack_bits(number, self.bits_of_places), _pack_bits(codes.flatten(), self.bits)]
        return torch.cat([bounds.flatten().view(torch.uint8), *in_bits])

    def unpack(self, message: Tensor, like: Tensor) -> Tensor:
        """What a message says, in the shape and dtype of ``like``: zero where nothing was sent."""
        n, k = like.numel(), self.kept
        chunks = -(-n // self.chunk)
        magnitudes, packed, codes = message.split(self._parts(n))
        bounds = magnitudes.clone().view(torch.bfloat16).view(-1, 1 if self.bits == 1 else 2)
        low, width = self._levels(bounds, chunks)
        code = _unpack_bits(codes, chunks * k, self.bits).view(chunks, k)
        steps = 2 ** (self.bits - 1)
        values = low + (code % steps + 0.5) / steps * width  # (C, k)
        values = torch.where(code >= steps, -values, values)
        places = self._places(_unpack_bits(packed, chunks, self.bits_of_places))
        out = values.new_zeros(chunks, self.chunk).scatter_(1, places, values)
        return out.flatten()[:n].view(like.shape).to(like.dtype)

    def _bounds(self, magnitudes: Tensor) -> Tensor:
        """(C, k) -> (G, 2) bfloat16, lo and hi of every block; (G, 1), their mean, where a code is a sign alone."""
        missing = -len(magnitudes) % BLOCK
        if self.bits == 1:
            sums = pad(magnitudes.sum(1), (0, missing)).view(-1, BLOCK).sum(1)
            sums[-1] *= BLOCK / (BLOCK - missing)  # the last block may have fewer chunks
            return (sums / (BLOCK * self.kept)).bfloat16()[:, None]
        filled = torch.cat([magnitudes, magnitudes[-1:].expand(missing, -1)])  # with its last chunk again
        blocks = filled.view(-1, BLOCK * self.kept)
        return torch.stack([blocks.amin(1), blocks.amax(1)], 1).bfloat16()

    @staticmethod
    def _levels(bounds: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """Of every chunk (C, 1), in float32: the least magnitude, and how far the largest is from it."""
        each = bounds.float().repeat_interleave(BLOCK, 0)[:chunks]
        return each[:, :1], each[:, -1:] - each[:, :1]

    def _places(self, number: Tensor) -> Tensor:
        """The numbers of choices (C,) -> the places of each (C, k), in order."""
        table, out = _choices(self.chunk, self.kept).to(number.device), []
        for i in range(self.kept, 0, -1):
            place = torch.searchsorted(table[i], number, right=True) - 1  # the largest p with C(p, i) <= number
            number = number - table[i][place]
            out.append(place)
        return torch.stack(out[::-1], 1)


@cache
def _choices(chunk: int, kept: int) -> Tensor:
    """C(p, i) at [i, p], int64 (k + 1, c)."""
    return torch.tensor([[comb(p, i) for p in range(chunk)] for i in range(kept + 1)])


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits -> uint8, without gaps."""
    each = (codes[:, None] >> torch.arange(bits, device=codes.device)) & 1
    stream = pad(each.flatten(), (0, -each.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def _unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    stream = (packed[:, None].int() >> torch.arange(8, device=packed.device)) & 1
    each = stream.flatten()[: count * bits].view(count, bits).long()
    return (each << torch.arange(bits, device=packed.device)).sum(1)
