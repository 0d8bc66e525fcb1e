"""What a training step is of, and what its moments use: plain numbers. No torch here."""

from dataclasses import dataclass, fields

from memtrain_common.errors import UserError

from .shapes import Shape


@dataclass(frozen=True)
class Step:
    """What a training step is of, whatever the axes say."""

    shape: Shape
    tokens: int = 0
    """In a row of text."""
    weights: str = "float32"
    """The weights' dtype."""
    autocast: str = "float32"
    """Autocast's dtype; float32 is none."""
    cuda: bool = True
    """Whether operations save what they save on CUDA, or on the CPU."""


@dataclass(frozen=True)
class StepUse:
    """A forward and backward pass, in bytes where nothing else is said. The optimizer's state is not in it."""

    parameters: int
    """Numbers."""
    trained: int
    """Numbers."""
    weights: int
    buffers: int
    gradients: int
    activations: int
    """Saved for the backward pass, on the device."""
    host: int
    """Saved for the backward pass, in host memory."""
    peak: int
    """The most that lives at any moment of the first micro-batch."""
    beside: int
    """The most that lives beside the gradients that are accumulated already."""
    left: int
    """What lives after the backward pass: weights, buffers, gradients, and the batch."""
    flops: int
    """Floating-point operations of the matrix products."""
    shard_weights: int = 0
    """Of one process under FSDP, which cuts each parameter along its first dimension; this and what follows are counted
    where there are several processes."""
    shard_gradients: int = 0
    rest_weights: int = 0
    """Weights outside the blocks."""
    rest_gradients: int = 0
    block_weights: int = 0
    """Weights of the largest block."""
    block_gradients: int = 0


PEAKS = ("peak", "beside")
"""Fields of :class:`StepUse` that are the largest of many sums."""
SHARDS = tuple(f.name for f in fields(StepUse))[-6:]
"""Those that are there under FSDP."""
SUMS = tuple(f.name for f in fields(StepUse) if f.name not in (*PEAKS, *SHARDS))


@dataclass(frozen=True)
class Cut:
    """Parameters as FSDP cuts them, along their first dimension; whatever the number of processes."""

    rows: tuple[tuple[int, int, int, int], ...]
    """(rows, bytes of a row, how many such parameters, how many of them have a gradient); none of a model without
    numbered blocks, which FSDP gathers one after another."""
    rest_weights: int
    rest_gradients: int
    block_weights: int
    block_gradients: int

    def shares(self, shards: int) -> dict[str, int]:
        """The fields :data:`SHARDS` of one of ``shards`` processes; parts are padded to equal ones.

        Raises:
            UserError: if there are no blocks.
        """
        if not self.rows:
            raise UserError("fsdp gathers a model by its numbered blocks, and this one has none: choose ddp")
        weights = gradients = 0
        for rows, row_bytes, n, n_gradients in self.rows:
            part = rows_of(rows, shards) * row_bytes
            weights += n * part
            gradients += n_gradients * part
        whole = (self.rest_weights, self.rest_gradients, self.block_weights, self.block_gradients)
        return dict(zip(SHARDS, (weights, gradients, *whole), strict=True))


def rows_of(rows: int, shards: int) -> int:
    """Rows of a process's part."""
    return -(-rows // shards)


@dataclass(frozen=True)
class OptimizerUse:
    """An optimizer step, in bytes."""

    state: int
    """What stays between steps."""
    extra: int
    """The most that lives beside weights, gradients and state while it steps."""
    merging: int
    """The most that lives besides while LTE merges, when the gradients are gone."""
