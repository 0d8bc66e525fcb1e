"""Merging: the mean of the heads' deltas goes into the frozen weights, and training continues from there."""

from typing import Any

from torch import nn

from .injection import lte_layers


def merge(model: nn.Module) -> None:
    """Merge every layer with heads (:meth:`LTELinear.merge`): A, B and the optimizer's state stay as they are.

    Raises:
        ValueError: if the model has no heads.
    """
    layers = lte_layers(model)
    if not layers:
        raise ValueError("the model has no LTE heads to merge: call lte.inject first")
    for layer in layers.values():
        layer.merge()


class Merger:
    """The merge clock: ``step()`` after each optimizer step merges every T-th time.

    Args:
        model: with heads.
        every: T, in optimizer steps (not micro-batches); 0 never merges.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        if every < 0:
            raise ValueError(f"every must be 0 (never) or a number of optimizer steps, got {every}")
        self._model, self.every = model, every
        self.steps = 0
        self.merges = 0

    def step(self) -> bool:
        """Count an optimizer step; -> whether it merged."""
        self.steps += 1
        due = self.every > 0 and self.steps % self.every == 0
        if due:
            merge(self._model)
            self.merges += 1
        return due

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "merges": self.merges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.merges = state["steps"], state["merges"]
