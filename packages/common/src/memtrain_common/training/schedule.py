"""Learning-rate schedules: pure functions of the step, so that a checkpoint needs to hold none of their state."""

import math


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
