"""One weight on its way through a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from galore_vit.projection import Bases, Layout
from galore_vit.tensors import TensorLayout


@dataclass(frozen=True)
class Record:
    """What is fixed about a parameter for as long as the groups are."""

    param: Tensor
    group: int
    """Its group's place in `param_groups`."""
    layout: Layout | TensorLayout | None
    """None: not projected."""
    order: int
    """How many projected weights come before it."""
    sharded: bool
    """Whether it is a DTensor (FSDP2)."""


@dataclass
class Item:
    """One weight's gradient, and all that its update needs."""

    record: Record
    group: dict[str, Any]
    state: dict[str, Tensor]
    grad: Tensor
    """R of a projected weight, the gradient itself of a plain one."""
    new_bases: Bases | None = None
    """Put in place only when the whole step is found finite."""
    full: Tensor | None = None
    """G (m×n), kept only where the residual is used."""
    step: int = 0
    """Steps taken, this one included; known once the step is found finite."""

    @property
    def param(self) -> Tensor:
        return self.record.param

    @property
    def layout(self) -> Layout | TensorLayout | None:
        return self.record.layout
