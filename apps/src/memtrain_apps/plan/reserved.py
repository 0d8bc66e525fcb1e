"""What CUDA's caching allocator would reserve for a step: fake allocations replayed through the allocator's rules."""

from dataclasses import dataclass
from typing import Any

import torch
from memtrain_common.console import format_bytes, format_table
from memtrain_common.errors import UserError
from memtrain_common.measuring.caching_allocator import Block, CachingAllocator
from memtrain_common.measuring.prediction import LiveBytes

from ..compose.axes import Axes
from ..compose.compose import load_libraries
from .arms import Plan
from .forecast import Workplace
from .shape_models import loss_of, make_batch
from .step_bytes import HostMemory
from .step_use import composed_step, faked


class Replay(LiveBytes):
    """Live bytes, each storage allocated and freed by several allocators too."""

    def __init__(self, *allocators: CachingAllocator) -> None:
        super().__init__()
        self.allocators = allocators
        self._blocks: dict[int, list[Block]] = {}

    def _note(self, storage: torch.UntypedStorage) -> None:
        before = self.bytes
        super()._note(storage)
        if self.bytes > before:
            self._blocks[storage._cdata] = [a.allocate(storage.nbytes()) for a in self.allocators]

    def _forget(self, key: int) -> None:
        super()._forget(key)
        for allocator, block in zip(self.allocators, self._blocks.pop(key), strict=True):
            allocator.free(block)

    def restart(self) -> None:
        super().restart()
        for allocator in self.allocators:
            allocator.restart()


@dataclass(frozen=True)
class Reserved:
    """Peaks of two training steps, in bytes."""

    live: int
    """Of tensors, as they are."""
    allocated: int
    """Of tensors, rounded up by the allocator."""
    reserved: int
    expandable: int
    """Reserved with ``expandable_segments``."""

    @property
    def margin(self) -> float:
        """What the default allocator adds, as part of the peak."""
        return self.reserved / self.live - 1


def replay(place: Workplace, axes: Axes) -> Reserved:
    """Two optimizer steps on fake tensors, at the model's whole depth, on one device."""
    load_libraries(axes.train, axes.optim)
    plain, expandable = CachingAllocator(), CachingAllocator(expandable_segments=True)
    live = Replay(plain, expandable)
    with faked(live, place.step.cuda):
        model, composed = composed_step(place.step, axes)
        optimizer = composed.needed_optimizer()
        if place.step.cuda and isinstance(optimizer, torch.optim.SGD | torch.optim.AdamW):
            for group in optimizer.param_groups:
                group["foreach"] = True
        live.restart()
        engine: Any = torch.autograd.Variable._execution_engine
        for _ in range(2):
            for _ in range(place.micro_batches):
                batch = make_batch(place.step, place.rows)
                with HostMemory() if axes.save == "offload" else composed.saving():
                    value = loss_of(place.step, model, batch) / place.micro_batches
                engine.run_backward(
                    (value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
                del value
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if composed.after_step is not None:
                composed.after_step()
        return Reserved(live.peak_bytes, plain.peak_allocated, plain.peak_reserved, expandable.peak_reserved)


def reserved_table(plan: Plan) -> str:
    """The best that fits, replayed: what is reserved beside what tensors hold.

    Raises:
        UserError: if nothing fits.
    """
    if not plan.fitting:
        raise UserError("--reserved has nothing to replay: no combination fits the budget as it is")
    arm = plan.fitting[0]
    found = replay(plan.place, arm.axes)
    rows = [("", "bytes", "above the peak of tensors")]
    for name, value in (
        ("tensors", found.live), ("allocated, in units of 512 bytes", found.allocated), ("reserved", found.reserved),
        ("reserved with expandable_segments", found.expandable),
    ):  # fmt: skip
        rows.append((name, format_bytes(value), f"{value / found.live - 1:+.2%}"))
    return (
        f"\n{arm.axes.name}, two steps through the caching allocator's rules; not measured on a GPU\n"
        f"{format_table(rows)}\n--margin {found.margin:.3f} stands for this step, {plan.config.margin} was assumed"
    )
