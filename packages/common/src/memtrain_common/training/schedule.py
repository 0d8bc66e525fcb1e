"""Learning-rate schedules: pure functions of the step, so that a checkpoint needs to hold none of their state."""

import math
from collections.abc import Callable
from functools import partial


def cosine_with_warmup(step: int, *, warmup_iters: int, decay_iters: int, min_ratio: float) -> float:
    """nanoGPT's schedule as a factor on the base learning rate: linear warm-up, then half a cosine.

    factor(t) = (t+1)/(w+1) for t < w;  m + (1−m)·(1 + cos(π·(t−w)/(d−w)))/2 up to d;  m afterwards.
    """
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return min_ratio
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_with_warmup(step: int, *, warmup_iters: int, decay_iters: int) -> float:
    """transformers' schedule as a factor: (t+1)/(w+1) for t < w, then (d−t)/(d−w) down to 0."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    return max(0.0, (decay_iters - step) / max(1, decay_iters - warmup_iters))


def schedule(kind: str, warmup_iters: int, decay_iters: int) -> Callable[[int], float]:
    """Of kind "linear" or "cosine", both down to 0 after the warm-up, or "constant" after it."""
    if kind == "constant":
        return lambda step: min(1.0, (step + 1) / (warmup_iters + 1))
    if kind == "linear":
        return partial(linear_with_warmup, warmup_iters=warmup_iters, decay_iters=decay_iters)
    return partial(cosine_with_warmup, warmup_iters=warmup_iters, decay_iters=decay_iters, min_ratio=0.0)


def warmup_steps(ratio: float, steps: int) -> int:
    """transformers' rounding of a part of the steps."""
    return math.ceil(ratio * steps)
