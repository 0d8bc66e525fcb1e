"""Sums over heads, always in the same order, and the step that outer momentum makes of one."""

from collections.abc import Callable

import torch
from torch import Tensor


def sum_of_products(A: Tensor, B: Tensor, also: Tensor | None = None) -> Tensor:
    """Σ_h B_h A_h (m, n) for A (h, ρ, n), B (h, m, ρ), one head a leaf of the tree; with ``also`` (h, m, n) added."""
    with torch.autocast(A.device.type, enabled=False):  # the difference of two products needs all digits
        return tree_sum(lambda h: B[h] @ A[h] if also is None else torch.addmm(also[h], B[h], A[h]), 0, len(A))


def tree_sum(leaf: Callable[[int], Tensor], first: int, last: int) -> Tensor:
    """leaf(first) + … + leaf(last − 1), halves before wholes: where a power of two of processes each sum an equal
    part, and the parts are summed so, every addition is the same as in one process."""
    if last - first == 1:
        return leaf(first)
    middle = (first + last) // 2
    return tree_sum(leaf, first, middle).add_(tree_sum(leaf, middle, last))


def outer_step(delta: Tensor, velocity: Tensor | None, momentum: float, lr: float) -> Tensor:
    """Nesterov's step of DiLoCo (arXiv:2311.08105) for a mean delta: v ← μ v + Δ; -> η (Δ + μ v)."""
    if velocity is None:
        return delta * lr
    velocity.mul_(momentum).add_(delta)
    return (delta + momentum * velocity).mul_(lr)
