"""Block-wise 8-bit storage of a tensor, in plain torch.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2021, arXiv:2110.02861), Sections 2.1 and
2.2: each block of 256 numbers is divided by its largest magnitude and rounded to the nearest of 256 values
of dynamic-tree form, 10^(−e) times a linear fraction, which holds seven decades.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from galore_vit.counters import has_no_numbers

BLOCK = 256


@cache
def code_values(signed: bool) -> tuple[float, ...]:
    """The 256 values, ascending, in [−1, 1] or [0, 1]: 2^e (signed) or 2^(e+1) in the decade of 10^(e−6)."""
    values = [0.0, 1.0]
    for e in range(7):
        count = 2 ** (e if signed else e + 1)
        # the middles of `count` equal intervals of [0.1, 1]
        middles = [10.0 ** (e - 6) * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
        values += middles + ([-v for v in middles] if signed else [])
    return tuple(sorted(values))


_kept_tables: dict[tuple[bool, torch.device], tuple[Tensor, Tensor]] = {}


def _tables(signed: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """(values, (256,); the limits between them, (255,)) for a tensor, made once; those of a prediction each time, so
    that what it counts does not depend on what ran before."""
    device, fake = like.device, has_no_numbers(like)
    kept = None if fake else _kept_tables.get((signed, device))
    if kept is not None:
        return kept
    values = torch.tensor(code_values(signed), dtype=torch.float32, device=device)
    limits = (values[1:] + values[:-1]) / 2
    if not signed:
        limits[0] = 0.0  # only zero is stored as zero: a divisor must not vanish by rounding
    if not fake:
        _kept_tables[signed, device] = values, limits
    return values, limits


def scale_count(numel: int) -> int:
    """How many blocks, each with one fp32 scale, hold `numel` numbers."""
    return -(-numel // BLOCK)


def encode(x: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Writes x into codes (uint8, x's shape) and scales (fp32, one a block)."""
    blocks = _in_blocks(x.float())  # (blocks, 256)
    largest = blocks.abs().amax(dim=1)  # (blocks,)
    _, limits = _tables(signed, x)
    found = torch.bucketize(blocks / largest.clamp_min(1e-38).unsqueeze(1), limits, out_int32=True)
    codes.copy_(found.reshape(-1)[: x.numel()].view(x.shape))
    scales.copy_(largest)


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The tensor that codes and scales hold, fp32, shaped like codes."""
    values, _ = _tables(signed, codes)
    blocks = _in_blocks(values[codes.reshape(-1).int()])
    return (blocks * scales.unsqueeze(1)).reshape(-1)[: codes.numel()].view(codes.shape)


def _in_blocks(x: Tensor) -> Tensor:
    """x flattened and padded by zeros to (blocks, 256)."""
    missing = -x.numel() % BLOCK
    return torch.nn.functional.pad(x.reshape(-1), (0, missing)).view(-1, BLOCK)
