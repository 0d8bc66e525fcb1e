"""How kept values are written: bfloat16, float32, float16, or int8 with a scale for every 128 values."""

import torch
from torch import Tensor

FORMATS = ("bf16", "fp32", "fp16", "int8")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
BLOCK = 128
"""Values that share a scale in the int8 format."""


def stored_bits(values: str) -> float:
    """Bits a kept value takes (int8's scales are bfloat16: an eighth of a bit each value)."""
    return {"bf16": 16, "fp32": 32, "fp16": 16, "int8": 8 + 16 / BLOCK}[values]


def float_type(values: str) -> torch.dtype:
    """The type that selected values are gathered in: the format's own, or float32 for int8 and fp16 (clamped)."""
    return _DTYPES[values] if values in ("bf16", "fp32") else torch.float32


def encode(x: Tensor, values: str) -> tuple[Tensor, ...]:
    """Write (spans, n) values.

    Errors: relative 2^-8 (bf16), 2^-11 (fp16, absolute 2^-25 below 2^-14; clamped to ±65504 instead of becoming
    infinite), 0 (fp32); for int8 at most 1/254 + 2^-8 of the largest in its block.

    Returns:
        One tensor (spans, n); int8 adds its scales, bfloat16 (spans, ceil(n / 128)).
    """
    if values == "int8":
        spans, n = x.shape
        blocks = -(-n // BLOCK)
        x = torch.nn.functional.pad(x.float(), (0, blocks * BLOCK - n)).view(spans, blocks, BLOCK)
        scale = (x.abs().amax(-1) / 127).bfloat16()
        divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        codes = (x / divisor).round_().clamp_(-127, 127).to(torch.int8)
        return codes.view(spans, -1)[:, :n].contiguous(), scale
    if values == "fp16":
        x = x.clamp(-65504, 65504)
    return (x.to(_DTYPES[values]),)


def decode(tensors: tuple[Tensor, ...], values: str, n: int, dtype: torch.dtype) -> Tensor:
    """What :func:`encode` wrote, as (spans, n) in ``dtype``."""
    if values == "int8":
        codes, scale = tensors
        spans, blocks = scale.shape
        x = torch.nn.functional.pad(codes.to(dtype), (0, blocks * BLOCK - n)).view(spans, blocks, BLOCK)
        return (x * scale.to(dtype).unsqueeze(-1)).view(spans, -1)[:, :n]
    return tensors[0].to(dtype)
