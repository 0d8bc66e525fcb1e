"""What a combination will hold, composed from what its forward and backward pass and its optimizer's step use.

A deep model is not counted block by block: between the first block and the last one all are alike, and two shallow
models tell the rest (:mod:`memtrain_apps.plan.depth`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from memtrain_common.errors import UserError

from ..compose.axes import Axes, Optim, refusal
from .depth import Passes
from .uses import OptimizerUse, Step, StepUse

SCALED_LOSS = 4
"""Bytes of the loss divided by the number of micro-batches."""


@dataclass(frozen=True)
class Workplace:
    """What one process of a run has to do, whatever the axes say."""

    step: Step
    rows: int
    """Samples of a micro-batch of one process."""
    micro_batches: int = 1
    """An optimizer step's."""
    processes: int = 1
    parallel: str = "ddp"

    @property
    def shards(self) -> int:
        return self.processes if self.parallel == "fsdp" else 1


@dataclass(frozen=True)
class Forecast:
    """What one device holds, in bytes where nothing else is said."""

    axes: Axes
    rows: int
    """Samples of a micro-batch of one process."""
    micro_batches: int
    ledger: dict[str, int]
    """By category, as ``memtrain_common.measuring.memory`` has them; what is offloaded is in ``host``."""
    host: int
    buckets: int
    """DDP's copy of the gradients, in which they are summed."""
    gathered: int
    """FSDP's whole weights and gradients: the part outside the blocks, two blocks and the buffer of one."""
    peak: int
    """The most that lives at any moment of a training step."""
    flops: int
    """Of the matrix products of an optimizer step, on one device."""
    trained: int
    """Numbers."""
    parameters: int
    """Numbers."""


def compose_forecast(place: Workplace, axes: Axes, step: StepUse, optim: OptimizerUse) -> Forecast:
    """The two sets of moments as one training step.

    The peak is that of the forward and backward pass (the state lies beside it), of the optimizer's step, or of LTE's
    merge. With micro-batches the gradients of the earlier ones lie beside each pass. Under FSDP it is a bound.
    """
    rest = step.left - step.weights - step.buffers - step.gradients  # the batch
    passing = step.peak if place.micro_batches == 1 else max(step.peak, step.beside + step.gradients) + SCALED_LOSS
    weights, gradients, buckets, gathered = step.weights, step.gradients, 0, 0
    if place.shards > 1:
        weights, gradients = step.shard_weights, step.shard_gradients
        gathered = step.rest_weights + 3 * step.block_weights + 2 * (step.rest_gradients + step.block_gradients)
        passing = step.beside - step.weights + weights + gradients + gathered
    elif place.processes > 1:
        buckets = gradients
    standing = weights + step.buffers + rest + optim.state
    return Forecast(
        axes=axes,
        rows=place.rows,
        micro_batches=place.micro_batches,
        ledger={
            "weights": weights,
            "gradients": gradients,
            "optimizer": optim.state,
            "activations": step.activations,
            "buffers": step.buffers,
        },
        host=step.host,
        buckets=buckets,
        gathered=gathered,
        peak=buckets + max(passing + optim.state, standing + gradients + optim.extra, standing + optim.merging),
        flops=step.flops * place.micro_batches,
        trained=step.trained,
        parameters=step.parameters,
    )


# -- counting --------------------------------------------------------------------------------------------------------


class Counts(Protocol):
    """What tells uses: by counting them, or from what was counted before."""

    def step(self, step: Step, axes: Axes, rows: int, shards: int) -> StepUse:
        """A forward and backward pass of the whole model. Raises :class:`UserError` if the combination has no meaning
        for it."""

    def optimizers(
        self, step: Step, axes: Axes, optims: Sequence[Optim], shards: int
    ) -> dict[Optim, OptimizerUse | str]:
        """An optimizer step each, of a model of this depth; or the sentence that refuses it."""


class Counted:
    """Counts anew, each time, and only what is asked."""

    def step(self, step: Step, axes: Axes, rows: int, shards: int) -> StepUse:
        (found,), cut = Passes(step, axes).whole([rows])
        return replace(found.use, **(cut.shares(shards) if shards > 1 else {}))

    def optimizers(
        self, step: Step, axes: Axes, optims: Sequence[Optim], shards: int
    ) -> dict[Optim, OptimizerUse | str]:
        from .step_use import optimizer_use_of

        return optimizer_use_of(step, axes, optims, shards)


def count_step(place: Workplace, axes: Axes, counts: Counts | None = None) -> StepUse:
    """The forward and backward pass of a micro-batch."""
    refuse(place, axes)
    return (counts or Counted()).step(place.step, axes, place.rows, place.shards)


def count_optimizers(
    place: Workplace, axes: Axes, optims: Sequence[Optim], counts: Counts | None = None
) -> dict[Optim, OptimizerUse | str]:
    """The steps of several optimizers, drawn out of one block and of two; or the sentence that refuses one."""
    known = counts or Counted()
    depth = place.step.shape.depth
    at = lambda blocks: replace(place.step, shape=place.step.shape.with_depth(blocks))  # noqa: E731
    if not place.step.shape.uniform or depth <= 2:
        return known.optimizers(place.step, axes, optims, place.shards)
    one, two = (known.optimizers(at(blocks), axes, optims, place.shards) for blocks in (1, 2))
    return {o: found if isinstance(found, str) else _line(one[o], found, 2, depth) for o, found in two.items()}


def predict_arm(place: Workplace, axes: Axes) -> Forecast:
    """One combination by itself.

    Raises:
        UserError: if it has no meaning.
    """
    moments = count_step(place, axes)
    found = count_optimizers(place, axes, (axes.optim,))[axes.optim]
    if isinstance(found, str):
        raise UserError(found)
    return compose_forecast(place, axes, moments, found)


def refuse(place: Workplace, axes: Axes) -> None:
    """Refuse what has no meaning, or none on several processes.

    Raises:
        UserError: with the reason, and what to choose instead.
    """
    why = refusal(axes)
    if why is None and axes.train == "lte":
        if place.rows % axes.heads:
            why = (
                f"train lte gives each of its {axes.heads} heads an equal part of a micro-batch, and {place.rows} "
                "samples cannot be parted so; choose a multiple"
            )
        elif place.shards > 1:
            why = "train lte merges into whole weights, which FSDP does not have; choose ddp"
    if why is not None:
        raise UserError(why)


def _line(shallow: Any, deep: OptimizerUse, blocks: int, depth: int) -> OptimizerUse:
    """Every number on the line through both."""
    names = [f.name for f in fields(deep)]
    more = depth - blocks
    return replace(deep, **{n: getattr(deep, n) + more * (getattr(deep, n) - getattr(shallow, n)) for n in names})


# -- batches ---------------------------------------------------------------------------------------------------------


def between(known: dict[int, int], rows: int) -> int:
    """An upper bound of a peak at ``rows``, from peaks at fewer and at more: it bends upwards only, so that the
    straight line between two of its points is nowhere below it."""
    if rows in known:
        return known[rows]
    low, high = max(r for r in known if r < rows), min(r for r in known if r > rows)
    return known[low] + -(-(known[high] - known[low]) * (rows - low) // (high - low))


def largest(peak: Callable[[int], int], low: int, high: int, usable: int, multiple: int = 1) -> int:
    """The most rows from ``low`` to ``high``, a multiple of ``multiple``, whose peak is surely at most ``usable``; 0 if
    none do. A peak grows with the rows."""
    low, high = -(-low // multiple), high // multiple
    if peak(low * multiple) > usable:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle * multiple) <= usable else (low, middle - 1)
    return low * multiple
