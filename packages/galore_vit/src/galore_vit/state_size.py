"""Bytes of optimizer state: measured on an optimizer, and by the formula.

For an m×n weight with m ≤ n projected on its smaller side, GaLore keeps a basis of m·r numbers and two
moments of r·n each: mr + 2nr, against Adam's 2mn and LoRA's 2mr + 2nr (GaLore, Table 1). GaLoreScaled keeps the norm
of its update besides, and with random bases no basis: 2nr + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
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
        if key not in COUNTERS and isinstance(value, Tensor)
    )


def adamw_state_bytes_formula(groups: Iterable[dict[str, Any]]) -> int:
    """Bytes of GaLoreAdamW's state for these groups: 2mn numbers a plain weight, mr + 2nr a projected one."""
    return _state_bytes(groups, bases=True, norms=0)


def scaled_state_bytes_formula(groups: Iterable[dict[str, Any]], method: str = "random") -> int:
    """Bytes of GaLoreScaled's state, bases found by `method`: 2mn numbers a plain weight, 2nr + 1 a projected one, and
    mr more where bases are kept."""
    return _state_bytes(groups, bases=method != "random", norms=4)


def _state_bytes(groups: Iterable[dict[str, Any]], *, bases: bool, norms: int) -> int:
    total = 0
    for group in groups:
        group = {**GALORE_DEFAULTS, **group}
        for p in group["params"]:
            layout, basis, moments = layout_of(p.shape, group), 0, 2 * p.numel()
            if layout is not None:
                basis = sum(math.prod(shape) for shape in layout.basis_shapes.values()) if bases else 0
                moments = 2 * math.prod(layout.compact_shape)
                total += norms
            total += basis * p.element_size() + moments * moment_dtype(p).itemsize
    return total
