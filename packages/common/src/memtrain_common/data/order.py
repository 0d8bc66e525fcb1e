"""Which samples a step sees: a pure function of (seed, step), for any number of processes and workers.

A resumed run therefore needs no data cursor, and a run on two processes sees the same global batches as on one.
The generator is SplitMix64 (Steele, Lea and Flood, 2014) used as a counter-based hash, so the order depends on no
library's version.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(seed: int, *counters: int, size: int) -> npt.NDArray[np.uint64]:
    """``size`` random 64-bit words, a pure function of the seed and the counters."""
    state = np.zeros(1, np.uint64)
    for word in (seed, *counters):
        state = _mix(state ^ np.uint64((word + _GAMMA) % 2**64))
    return _mix(state + np.uint64(_GAMMA) * np.arange(1, size + 1, dtype=np.uint64))


def random_offsets(seed: int, step: int, *, size: int, high: int) -> npt.NDArray[np.int64]:
    """``size`` offsets in [0, high), drawn with replacement: the random crops of language modelling.

    Raises:
        ValueError: if ``high`` is below 1.
    """
    if high < 1:
        raise ValueError(f"offsets need high >= 1, got {high}")
    uniform = (random_bits(seed, step, size=size) >> np.uint64(11)) * 2.0**-53  # (size,) in [0, 1)
    return (uniform * high).astype(np.int64)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """A permutation of ``range(size)``, a pure function of (seed, epoch)."""
    return np.argsort(random_bits(seed, epoch, size=size), kind="stable")


def epoch_batch(seed: int, step: int, *, batch: int, size: int) -> npt.NDArray[np.int64]:
    """The indices of batch number ``step`` when epochs of shuffled data follow one another without a gap.

    Every sample is seen once an epoch; a batch may end one epoch and begin the next.
    """
    if size < 1 or batch < 1:
        raise ValueError(f"a data set of {size} samples cannot be cut into batches of {batch}")
    position = np.arange(step * batch, (step + 1) * batch)  # (batch,)
    out = np.empty(batch, np.int64)
    for epoch in np.unique(position // size):
        here = position // size == epoch
        out[here] = epoch_order(seed, int(epoch), size)[position[here] % size]
    return out


def rank_share(
    rows: npt.NDArray[np.int64], rank: int, world_size: int, *, contiguous: bool = False
) -> npt.NDArray[np.int64]:
    """This process's rows of a global batch: every ``world_size``-th one, or the ``rank``-th of equal chunks.

    Strided, so that the h-th of H equal chunks of every share comes from the h-th chunk of the global batch, and
    LTE's heads see the same rows on any number of processes that each hold them all. Contiguous where each process
    holds its own heads.

    Raises:
        ValueError: if the batch cannot be shared equally.
    """
    if len(rows) % world_size:
        raise ValueError(f"a batch of {len(rows)} cannot be shared equally by {world_size} processes")
    return rows.reshape(world_size, -1)[rank] if contiguous else rows[rank::world_size]


def stratified(labels: npt.NDArray[np.int64], parts: int, seed: int) -> npt.NDArray[np.int64]:
    """Which of ``parts`` parts each sample falls into, (N,): every class is spread evenly, shuffled by the seed.

    Of a multi-label set every combination of labels counts as a class.
    """
    keys = labels if labels.ndim == 1 else np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    order = epoch_order(seed, 0, len(keys))
    by_class = order[np.argsort(keys[order], kind="stable")]
    out = np.empty(len(keys), np.int64)
    out[by_class] = np.arange(len(keys)) % parts
    return out
