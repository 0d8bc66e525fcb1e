"""Batches on their way to the model: asked for by number, prepared ahead by workers, moved to the device."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError

Batch = Any


def numbered(batches: Callable[[int], Batch], numbers: range, workers: int = 0) -> Iterator[Batch]:
    """``batches(i)`` for each i in order; with workers, prepared ahead by that many processes, in the same order."""
    if not workers:
        return map(batches, numbers)
    # A generator of its own: the loader would draw its workers' seed from the global one, and training would notice.
    generator = torch.Generator()
    return _raising(DataLoader(_Numbered(batches, numbers), batch_size=None, num_workers=workers, generator=generator))


def _raising(loader: "DataLoader[Batch]") -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Numbered(Dataset[Batch]):
    """Batches as a map-style data set, for DataLoader's workers."""

    def __init__(self, batches: Callable[[int], Batch], numbers: range) -> None:
        self._batches, self._numbers = batches, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, position: int) -> Batch:
        try:
            return self._batches(self._numbers[position])
        except UserError as error:  # raised here, it would arrive with the worker's traceback as its message
            return error


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it, however nested in tuples, lists and dicts, on the device."""
    if isinstance(batch, Tensor):
        if device.type == "cuda" and batch.device.type == "cpu":
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(v, device) for v in batch)
    return batch
