"""The counters in a weight's state: 0-dimensional tensors on the CPU, as torch.optim keeps its own."""

from __future__ import annotations

from torch import Tensor

COUNTERS = ("step", "refresh_at", "gap", "drawn_at")


def count(counter: Tensor) -> int:
    """The counter's value; 1 of a fake or meta tensor, so that a prediction of memory sees a refresh."""
    return 1 if has_no_numbers(counter) else int(counter)


def counts(counters: list[Tensor]) -> list[int]:
    """The values of many counters, all of them real or none."""
    if not counters or has_no_numbers(counters[0]):
        return [1] * len(counters)
    return [int(c.item()) for c in counters]


def has_no_numbers(x: Tensor) -> bool:
    """Whether x is a FakeTensor or on the meta device: a shape without contents."""
    return x.device.type == "meta" or type(x).__name__ == "FakeTensor"
