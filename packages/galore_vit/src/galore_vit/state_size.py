"""Bytes of optimizer state: measured on an optimizer, and by the formula.

For an m×n weight with m ≤ n projected on its smaller side, GaLore keeps a basis of m·r numbers and two
moments of r·n each: mr + 2nr, against Adam's 2mn and LoRA's 2mr + 2nr (GaLore, Table 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from galore_vit.adamw import moment_dtype
from galore_vit.counters import COUNTERS
from galore_vit.projection import layout_of
from galore_vit.settings import GALORE_DEFAULTS


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that the optimizer keeps now, without its scalar counters."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key not in COUNTERS
    )


def adamw_state_bytes_formula(groups: Iterable[dict[str, Any]]) -> int:
    """Bytes of GaLoreAdamW's state for these groups: 2mn numbers a plain weight, mr + 2nr a projected one."""
    total = 0
    for group in groups:
        group = {**GALORE_DEFAULTS, **group}
        for p in group["params"]:
            layout, basis, moments = layout_of(p.shape, group), 0, 2 * p.numel()
            if layout is not None:
                basis = sum(math.prod(shape) for shape in layout.basis_shapes.values())
                moments = 2 * math.prod(layout.compact_shape)
            total += basis * p.element_size() + moments * moment_dtype(p).itemsize
    return total
