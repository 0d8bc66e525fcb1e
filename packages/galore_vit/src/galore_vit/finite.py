"""Whether gradients are finite: the guard before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_vit import sharding
from galore_vit.counters import has_no_numbers


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no entry is NaN or Inf, nor so large that the squares' sum overflows fp32 and V with it.

    Fake and meta tensors hold no numbers, and count as finite.
    """
    alike: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for t in tensors:
        alike.setdefault((t.device, t.dtype, type(t) is Tensor), []).append(t)
    found = []
    for (device, dtype, whole), same in alike.items():
        if any(has_no_numbers(t) for t in ([same[0]] if whole else same)):
            return True
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms: Sequence[Tensor]
        if whole and device.type == "cpu" and dtype == wide:
            flat = [t.reshape(-1) for t in same]
            norms = [torch.dot(t, t) for t in flat]  # there a dot product is faster than a norm
        elif whole:
            norms = torch._foreach_norm(same, 2, dtype=wide)
        else:
            norms = [sharding.gathered(torch.linalg.vector_norm(t, dtype=wide)) for t in same]
        found.append(torch.stack(list(norms)).isfinite().all())
    return bool(torch.stack([f.to(found[0].device) for f in found]).all())  # one word from the device a step
