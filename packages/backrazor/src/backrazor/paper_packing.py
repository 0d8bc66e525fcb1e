"""The official code's packing, for comparison: a threshold a sample, everything that reaches it, and a bitmask.

With ratio = 1 − keep and n elements a sample, k = int(clip(n · ratio, 1, n)); the threshold is the k-th smallest |x| of
the sample, and |x| ≥ threshold is kept: n − k + 1 elements, and all that tie with the threshold. Sizes depend on the
data.
"""

import numpy as np
import torch
from torch import Tensor

from . import bits
from .internals import is_fake
from .values import encode


def kept_without_ties(n: int, keep: float) -> int:
    """Elements of a sample of ``n`` that are kept where nothing ties."""
    return n - int(min(max(n * (1 - keep), 1), n)) + 1


def pack(x: Tensor, keep: float, values: str) -> tuple[Tensor, Tensor]:
    """Pack (samples, n) into the kept values, one after the other, and a bitmask uint8 over all elements."""
    samples, n = x.shape
    kept = kept_without_ties(n, keep)
    if is_fake(x):
        (stored,) = encode(x.new_empty((1, samples * kept)), values)
        return stored.view(-1), x.new_empty(bits.packed_bytes(samples * n, 1), dtype=torch.uint8)
    magnitude = x.abs()
    comparable = magnitude.float() if x.element_size() == 2 else magnitude
    threshold = _smallest(comparable, n - kept + 1)
    mask = comparable >= threshold
    (stored,) = encode(x[mask].view(1, -1), values)
    return stored.view(-1), bits.pack(mask.view(-1).view(torch.uint8), 1)


def _smallest(x: Tensor, k: int) -> Tensor:
    """The k-th smallest number of each row, (rows, 1). On the CPU by NumPy, which is several times as fast."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.partition(x.numpy(), k - 1, axis=1)[:, k - 1 : k])
    return x.kthvalue(k, dim=1, keepdim=True).values


def unpack(values: Tensor, mask: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Zeros, with the kept values at their places: (n,) in ``dtype``."""
    if is_fake(values):
        return values.new_empty((n,), dtype=dtype)
    out = torch.zeros(n, dtype=dtype, device=values.device)
    out[bits.unpack(mask, n, 1).bool()] = values.to(dtype)
    return out
