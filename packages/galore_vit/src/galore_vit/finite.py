"""Whether gradients are finite: the guard before anything is changed."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_vit import sharding
from galore_vit.counters import has_no_numbers


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no entry is NaN or Inf, nor so large that the squares' sum overflows fp32 and V with it.

    Fake and meta tensors hold no numbers, and count as finite.
    """
    if any(has_no_numbers(t) for t in tensors):
        return True
    norms = [sharding.gathered(torch.linalg.vector_norm(t, dtype=_wide_dtype(t))) for t in tensors]
    return all(bool(torch.stack(n).isfinite().all()) for n in _by_device(norms))


def _by_device(tensors: list[Tensor]) -> list[list[Tensor]]:
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        alike.setdefault((t.device, t.dtype), []).append(t)
    return list(alike.values())


def _wide_dtype(t: Tensor) -> torch.dtype:
    return t.dtype if t.dtype == torch.float64 else torch.float32
