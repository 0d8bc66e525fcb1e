"""The evaluation that most trainings need, a mean loss over given batches; and what any of them must give."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..data.batches import Batch, to_device


def mean_loss(
    model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor], batches: Iterable[Batch]
) -> dict[str, float]:
    """An ``evaluate`` for :func:`fit`: {"loss": mean of the batches' losses}, batches of equal size."""
    device = next(model.parameters()).device
    losses = [loss_fn(model, to_device(batch, device)).item() for batch in batches]
    return {"loss": sum(losses) / len(losses)}


def numbers_of(found: Any, best_metric: str) -> dict[str, float]:
    """What an ``evaluate`` has returned, as plain numbers by name.

    Raises:
        ValueError: if it is no dict, or lacks the number that decides which checkpoint is the best.
    """
    if not isinstance(found, Mapping):
        raise ValueError(
            f"evaluate must return numbers by name, as {{{best_metric!r}: …}}, not a {type(found).__name__}"
        )
    if best_metric not in found:
        raise ValueError(
            f"evaluate returns {', '.join(map(repr, found)) or 'no number'}, and the best checkpoint is chosen by "
            f"{best_metric!r}: return it too, or name another in FitConfig(best_metric=…)"
        )
    return {name: float(value) for name, value in found.items()}
