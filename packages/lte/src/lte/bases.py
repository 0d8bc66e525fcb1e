"""How a frozen weight W (m, n) is kept, so that a merge in float32 loses nothing.

============  ==================================================================  =====================
base          what is kept                                                        bytes a weight
============  ==================================================================  =====================
``float32``   W itself (float64 stays float64)                                    4
``bfloat16``  W's float32 bits in two halves: the nearest bfloat16, which the     4; a product under
              forward pass reads, and the 16 bits that are missing (int16)        bfloat16 reads 2
``4bit``      NF4 codes of the first W and a float32 maximum a block of 64,       0.56 + 4·min(1, f)
              never written again; beside them what merges have added, as the
              heads' own merged factors or as a dense float32 delta
============  ==================================================================  =====================

f = H·r·(m + n) / (m·n): the factors of all heads are enough where nothing is reset and merges are plain sums, since
then W = W₀ + s·mean_h(B'_h A'_h), newly summed at each merge, and no rounding accumulates.

NF4: Dettmers et al., *QLoRA* (arXiv:2305.14314), its 16 levels.
"""

import torch
from torch import Tensor

BLOCK = 64
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def split_float32(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-> (high, low): the nearest bfloat16 and the int16 difference of the bits; :func:`join_float32` is exact."""
    bits = weight.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16  # rounds half away from zero
    low = bits - (high << 16)  # in [-2¹⁵, 2¹⁵)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_float32(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that :func:`split_float32` took apart, bit for bit."""
    return ((high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def quantize_4bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-> (codes uint8 (⌈numel/2⌉,), two a byte; absmax float32 (⌈numel/64⌉,))."""
    flat = weight.detach().float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)  # (blocks, 64)
    absmax = padded.abs().amax(1)  # (blocks,)
    levels = torch.tensor(NF4, device=weight.device)
    unit = padded / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(unit.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    return codes[0::2] | (codes[1::2] << 4), absmax


def dequantize_4bit(codes: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
    """The float32 weight (m, n) that the codes stand for."""
    levels = torch.tensor(NF4, device=codes.device)
    unit = levels[torch.stack([codes & 15, codes >> 4], 1).int()].view(-1, BLOCK)  # (blocks, 64)
    m, n = shape
    return (unit * absmax[:, None]).flatten()[: m * n].view(m, n)


def materialize(kept: tuple[Tensor, ...], shape: tuple[int, int], scale: float) -> Tensor:
    """W (m, n) of a 4-bit base, in float32.

    Args:
        kept: (codes, absmax, delta), or (codes, absmax, A (H, r, n), B (H, m, r)): the first W and what was merged.
        scale: s/H, of the factors.
    """
    codes, absmax, *merged = kept
    weight = dequantize_4bit(codes, absmax, shape)
    if len(merged) == 1:
        return weight.add_(merged[0])
    A, B = merged
    m, n = shape
    return weight.addmm_(B.transpose(0, 1).reshape(m, -1), A.reshape(-1, n), alpha=scale)
