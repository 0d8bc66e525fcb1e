"""Where a gradient is projected, and the two products that do it.

GaLore (Zhao et al., 2024, arXiv:2403.03507, Definition 3.6): for a gradient G (m×n) and orthonormal bases,

    R = Pᵀ G Qᵀ,    G̃ = P N Q,    P (m×r),  Q (r×n, orthonormal rows: the transpose of the paper's Q)

with one of P, Q left out (taken as the identity) for every projection type but `full`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_vit.tensors import TensorLayout, multiply, tensor_layout

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")

Bases = tuple[Tensor | None, ...]
"""(P, Q) of a matrix, (U₁, …, U_d) of a tensor with d > 2; None where that side or mode is not projected."""


@dataclass(frozen=True)
class Layout:
    """A weight as GaLore sees it: `k` matrices of m×n, each projected to rank r."""

    k: int
    """Number of equal row blocks that are projected apart; 3 for a fused qkv weight."""
    m: int
    """Rows of each block."""
    n: int
    """Columns; of a convolution: in-channels × kernel positions."""
    rank: int
    """r, smaller than m and n; equal to the smaller where `paper` rotates a whole weight."""
    left: bool
    """Whether P is used: R = Pᵀ G."""
    right: bool
    """Whether Q is used: R = G Qᵀ."""

    keys = ("P", "Q")
    """Where the bases are in the optimizer's state."""

    def stacked(self, *shape: int) -> tuple[int, ...]:
        """`shape` with the block dimension before it when there is more than one block."""
        return shape if self.k == 1 else (self.k, *shape)

    @property
    def compact_shape(self) -> tuple[int, ...]:
        """Shape of R: m×r, r×n or r×r."""
        return self.stacked(self.rank if self.left else self.m, self.rank if self.right else self.n)

    @property
    def basis_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the bases that are kept, by their key in the optimizer's state."""
        shapes = {}
        if self.left:
            shapes["P"] = self.stacked(self.m, self.rank)
        if self.right:
            shapes["Q"] = self.stacked(self.rank, self.n)
        return shapes

    def matrices(self, x: Tensor) -> Tensor:
        """x, shaped like the weight, as (m, n) or (k, m, n); a view where x is contiguous."""
        if self.k == 1 and x.ndim == 2:
            return x
        return x.reshape(self.stacked(self.m, self.n))


def sides(shape: tuple[int, ...], split: int) -> tuple[int, int, int]:
    """(k, m, n): how many matrices a weight of two dimensions and more is, and of which size.

    Weights of more than two dimensions are matricised, out × (in · kernel); three-dimensional ones whose first
    dimension is `split` are a stack of matrices.
    """
    if len(shape) == 3 and shape[0] == split:
        return shape
    if shape[0] % split:
        raise ValueError(
            f"a weight of shape {tuple(shape)} has no {split} equal row blocks: split must divide {shape[0]}"
        )
    return split, shape[0] // split, math.prod(shape[1:])


def layout_of(shape: tuple[int, ...], group: Mapping[str, Any]) -> Layout | TensorLayout | None:
    """The layout of a weight of this shape in this parameter group; None where the weight is not projected.

    Not projected: weights of a group without `rank`, vectors, and weights whose smaller side is not above
    the rank. With `paper` in the group the last are rotated whole by all their singular vectors, as the published
    code does, but for a wide weight with `reverse_std`, where it stops with an error.
    """
    if "rank" not in group or len(shape) < 2:
        return None
    if group.get("dim", 2) > 2:
        return tensor_layout(shape, group["rank"])
    r, kind = group["rank"], group["proj_type"]
    k, m, n = sides(shape, group["split"])
    if r >= min(m, n):
        if not group.get("paper") or (kind == "reverse_std" and m < n):
            return None
        r = min(m, n)
    left = kind in ("left", "full") or (kind == "std" and m < n) or (kind == "reverse_std" and m >= n)
    right = kind == "full" or not left
    return Layout(k, m, n, r, left, right)


def project(G: Tensor, bases: Bases) -> Tensor:
    """R = Pᵀ G Qᵀ; G (…, m, n) → R (…, m or r, n or r)."""
    if len(bases) > 2:
        return multiply(G, bases, transpose=True)
    P, Q = bases
    if P is not None:
        G = torch.matmul(P.mT, G)
    return G if Q is None else torch.matmul(G, Q.mT)


def project_back(N: Tensor, bases: Bases) -> Tensor:
    """G̃ = P N Q; N (…, m or r, n or r) → G̃ (…, m, n)."""
    if len(bases) > 2:
        return multiply(N, bases)
    P, Q = bases
    if P is not None:
        N = torch.matmul(P, N)
    return N if Q is None else torch.matmul(N, Q)


def add_projected_back(W: Tensor, N: Tensor, bases: Bases, *, beta: float, alpha: float) -> None:
    """W ← beta·W + alpha·P N Q in place, without building the full-size update; W (…, m, n)."""
    if len(bases) > 2:
        W.mul_(beta).add_(multiply(N, bases), alpha=alpha)
        return
    P, Q = bases
    if P is not None and Q is not None:
        N, P = torch.matmul(P, N), None
    a, b = (N, Q) if P is None else (P, N)
    assert b is not None
    (W.addmm_ if W.ndim == 2 else W.baddbmm_)(a, b, beta=beta, alpha=alpha)


def rotation(old: Bases, new: Bases) -> Bases:
    """(P_newᵀ P_old, Q_old Q_newᵀ): what carries R from the old bases into the new; each (…, r, r). Of a tensor
    U_newᵀ U_old for each mode."""
    if len(old) > 2:
        return tuple(b.mT @ a if a is not None and b is not None else None for a, b in zip(old, new, strict=True))
    left = right = None
    if old[0] is not None and new[0] is not None:
        left = torch.matmul(new[0].mT, old[0])
    if old[1] is not None and new[1] is not None:
        right = torch.matmul(old[1], new[1].mT)
    return left, right


def apply_rotation(X: Tensor, C: Bases, *, squared: bool = False) -> Tensor:
    """C_left X C_right, with the rotations' entries squared when asked (for variances); X like R."""
    if len(C) > 2:
        return multiply(X, C, squared=squared)
    left, right = ((c if c is None or not squared else c.square()) for c in C)
    if left is not None:
        X = torch.matmul(left, X)
    return X if right is None else torch.matmul(X, right)
