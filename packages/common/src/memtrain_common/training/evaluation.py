"""The evaluation that most trainings need: a mean loss over given batches."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ..data.batches import Batch, to_device


def mean_loss(
    model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor], batches: Iterable[Batch]
) -> dict[str, float]:
    """An ``evaluate`` for :func:`fit`: {"loss": mean of the batches' losses}, batches of equal size."""
    device = next(model.parameters()).device
    losses = [loss_fn(model, to_device(batch, device)).item() for batch in batches]
    return {"loss": sum(losses) / len(losses)}
