"""Weights of three and more dimensions projected mode by mode: the form that the published repository calls `dim`.

George et al., "Tensor-GaLore: Memory-Efficient Training via Gradient Tensor Decomposition" (2025, arXiv:2501.02379).
For a gradient G (s₁×…×s_d) and a basis Uᵢ (sᵢ×rᵢ, orthonormal columns) of each mode,

    R = G ×₁ U₁ᵀ … ×_d U_dᵀ  (r₁×…×r_d),    W ← W − η·α·ρ(R) ×₁ U₁ … ×_d U_d

The bases are those of a Tucker decomposition of G: each is begun with the leading left singular vectors of its mode's
unfolding (HOSVD), and improved in turn with the other modes projected (HOOI; De Lathauwer et al., 2000). A mode whose
rank is its size has no basis and is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_vit.counters import has_no_numbers

Factors = tuple[Tensor | None, ...]
"""A basis for each mode; None where the mode is whole."""
SWEEPS, TOLERANCE = 100, 1e-4
"""Of HOOI by `svd`: at most so many, until the captured norm grows by less (tensorly's defaults)."""


@dataclass(frozen=True)
class TensorLayout:
    """A weight as the tensor form sees it. Where a matrix's layout is asked, its `k`, `left` and `right` are these."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    k = 1
    left = True
    right = True

    @property
    def keys(self) -> tuple[str, ...]:
        """Where the bases are in the optimizer's state, one a mode."""
        return tuple(f"U{i}" for i in range(len(self.shape)))

    @property
    def compact_shape(self) -> tuple[int, ...]:
        """Shape of R."""
        return self.ranks

    @property
    def basis_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the bases that are kept, by their key."""
        modes = zip(self.keys, self.shape, self.ranks, strict=True)
        return {key: (s, r) for key, s, r in modes if r < s}

    def matrices(self, x: Tensor) -> Tensor:
        """x itself: nothing is made a matrix."""
        return x


def tensor_layout(shape: tuple[int, ...], rank: Any) -> TensorLayout | None:
    """The layout of a weight of this shape; None where no mode would be smaller."""
    ranks = tucker_ranks(shape, rank)
    return TensorLayout(tuple(shape), ranks) if ranks != tuple(shape) else None


def tucker_ranks(shape: tuple[int, ...], rank: float | int | Sequence[int]) -> tuple[int, ...]:
    """The rank of each mode: one for all, one each, or the share of the weight's numbers that the decomposition keeps.

    A share f gives rᵢ = round(c·sᵢ), where c solves c^d Πsᵢ + c Σsᵢ² = f Πsᵢ: core and bases (tensorly's rule).
    """
    if isinstance(rank, Sequence):
        return tuple(min(r, s) for r, s in zip(rank, shape, strict=True))
    if isinstance(rank, int):
        return tuple(min(rank, s) for s in shape)
    numbers, squares = math.prod(shape), sum(s * s for s in shape)
    low, high = 0.0, max(rank, 1.0)
    for _ in range(100):
        middle = (low + high) / 2
        kept = numbers * middle ** len(shape) + squares * middle
        low, high = (middle, high) if kept < rank * numbers else (low, middle)
    return tuple(min(max(round(low * s), 1), s) for s in shape)


def check_rank(rank: Any, dim: int) -> None:
    """Raises ValueError where a rank is none for tensors of `dim` dimensions."""
    if isinstance(rank, tuple | list):
        good = len(rank) == dim and all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in rank)
    elif isinstance(rank, float):
        good = 0.0 < rank <= 1.0
    else:
        good = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not good:
        raise ValueError(
            f"rank of a group with dim {dim} must be a whole number, {dim} of them, or a share in (0, 1], not {rank!r}"
        )


def multiply(X: Tensor, factors: Factors, *, transpose: bool = False, squared: bool = False) -> Tensor:
    """X ×ᵢ Uᵢ over all modes, or ×ᵢ Uᵢᵀ; with the factors' entries squared when asked (for variances)."""
    for i, U in enumerate(factors):
        if U is None:
            continue
        M = (U.mT if transpose else U).to(X.dtype)
        M = M.square() if squared else M
        X = torch.tensordot(M, X, dims=([1], [i])).movedim(0, i)
    return X.contiguous()


def tucker_bases(G: Tensor, layout: TensorLayout, old: Factors | None, *, sweeps: int, tolerance: float) -> Factors:
    """The bases of G, begun from `old` where there are some; each in G's dtype.

    Args:
        sweeps: rounds of HOOI at most.
        tolerance: it ends where a round adds less than this share to the captured norm; 0 runs all of them.
    """
    wide = G if G.dtype == torch.float64 else G.float()
    if not has_no_numbers(wide):
        wide = wide / wide.abs().max().clamp_min(torch.finfo(wide.dtype).tiny)  # products must not overflow
    small = [i for i, (s, r) in enumerate(zip(layout.shape, layout.ranks, strict=True)) if r < s]
    factors: list[Tensor | None] = [None] * len(layout.shape)
    for i in small:
        begun = None if old is None else old[i]
        factors[i] = _leading(wide, i, layout.ranks[i]) if begun is None else begun.to(wide.dtype)
    captured = 0.0
    for _ in range(sweeps):
        for i in small:
            others = tuple(None if j == i else U for j, U in enumerate(factors))
            factors[i] = _leading(multiply(wide, others, transpose=True), i, layout.ranks[i])
        if tolerance and not has_no_numbers(wide):
            norm = float(torch.linalg.vector_norm(multiply(wide, tuple(factors), transpose=True)))
            if norm - captured < tolerance * norm:
                break
            captured = norm
    return tuple(
        None if U is None else _signed(U, None if old is None else old[i]).to(G.dtype) for i, U in enumerate(factors)
    )


def _leading(X: Tensor, mode: int, r: int) -> Tensor:
    """The r leading left singular vectors (s, r) of X's unfolding along a mode, by its Gram matrix (s, s)."""
    unfolded = X.movedim(mode, 0).flatten(1)
    _, vectors = torch.linalg.eigh(unfolded @ unfolded.mT)  # ascending
    return vectors[:, -r:].flip(1)


def _signed(U: Tensor, old: Tensor | None) -> Tensor:
    """A singular vector's sign is arbitrary; the old one's keeps moments meaningful that are not turned."""
    return U if old is None else U * torch.where((U * old.to(U.dtype)).sum(0) < 0, -1.0, 1.0)
