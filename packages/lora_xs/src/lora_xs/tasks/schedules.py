"""Learning rates of the official runs, as factors on each group's own rate."""

import math
from collections.abc import Callable
from functools import partial

from memtrain_common.training.schedule import cosine_with_warmup, linear_with_warmup


def schedule(kind: str, warmup_iters: int, decay_iters: int) -> Callable[[int], float]:
    """Of kind "linear" or "cosine", both down to 0."""
    if kind == "linear":
        return partial(linear_with_warmup, warmup_iters=warmup_iters, decay_iters=decay_iters)
    return partial(cosine_with_warmup, warmup_iters=warmup_iters, decay_iters=decay_iters, min_ratio=0.0)


def warmup_steps(ratio: float, steps: int) -> int:
    return math.ceil(ratio * steps)
