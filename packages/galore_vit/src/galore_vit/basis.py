"""The bases: the leading singular vectors of a gradient, exactly or by a warm-started randomised iteration.

Exact (GaLore, Equation 12): U S V = SVD(G), P = U[:, :r], Q = V[:r].

Iterated: with A = G (or Gᵀ for a left basis) and X (n×(r+p)) the old basis beside p random columns,

    X T ← QR(Aᵀ A X)   (once, or a few times),      U S V = SVD(T),      Q = (X U[:, :r])ᵀ

which is subspace iteration (Halko, Martinsson and Tropp, 2011, arXiv:0909.4061, Algorithm 4.4) cut to the
leading left singular vectors of Aᵀ A X. It costs two products of the gradient with a thin matrix each time,
and never a full SVD.

Drawn: independent Gaussian numbers, which no gradient decides, so that a seed stands for them (APOLLO, Zhu et al.,
2024, arXiv:2412.05270).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_vit.counters import has_no_numbers
from galore_vit.projection import Bases, Layout
from galore_vit.tensors import SWEEPS, TOLERANCE, TensorLayout, tucker_bases


def found_bases(
    G: Tensor, layout: Layout | TensorLayout, old: Bases | None, refresh: Mapping[str, Any], seed: int
) -> Bases | None:
    """Bases of G (…, m, n) by `refresh`'s method; None where G is zero or not finite and has none to give.

    Of a stack each matrix has bases of its own. One whose gradient is 0, as an expert's without a token, keeps its
    `old` ones; without them they are 0, so that it does not move until :func:`without_basis` has it asked again.

    Args:
        old: the bases until now, if there are some.
        refresh: settings of :class:`galore_vit.Refresh`.
        seed: of the random columns.
    """
    cold = old is None or without_basis(old)
    if refresh["method"] == "svd":
        largest = 1.0 if has_no_numbers(G) else float(G.abs().max())
        new: Bases | None = exact_bases(G, layout) if largest != 0.0 and math.isfinite(largest) else None
    else:
        iterations = refresh["iterations"] + cold
        new = iterated_bases(G, layout, old, iterations=iterations, oversample=refresh["oversample"], seed=seed)
    if new is None or isinstance(layout, TensorLayout) or layout.k == 1 or has_no_numbers(G):
        return new
    idle = (G.abs().amax((-2, -1)) == 0)[..., None, None]  # (k, 1, 1)
    if not bool(idle.any()):
        return new
    kept = (None, None) if old is None else old
    return tuple(
        None if b is None else torch.where(idle, torch.zeros_like(b) if was is None else was.to(b.dtype), b)
        for b, was in zip(new, kept, strict=True)
    )


def without_basis(bases: Bases) -> bool:
    """Whether a matrix of a stack has no basis yet, since its gradient was 0 whenever one was due."""
    stacks = [b for b in bases if b is not None and b.ndim == 3 and not has_no_numbers(b)]
    return any(not bool(b.any(-1).any(-1).all()) for b in stacks)


def exact_bases(G: Tensor, layout: Layout | TensorLayout) -> Bases:
    """Leading singular vectors of G (…, m, n) by a full SVD in at least fp32, in G's dtype; of a tensor Tucker's."""
    if isinstance(layout, TensorLayout):
        return tucker_bases(G, layout, None, sweeps=SWEEPS, tolerance=TOLERANCE)
    U, _, Vh = torch.linalg.svd(_wide(G), full_matrices=False)
    r = layout.rank
    P = U[..., :, :r].to(G.dtype) if layout.left else None
    Q = Vh[..., :r, :].to(G.dtype) if layout.right else None
    return P, Q


def iterated_bases(
    G: Tensor, layout: Layout | TensorLayout, old: Bases | None, *, iterations: int, oversample: int, seed: int
) -> Bases | None:
    """Approximate leading singular vectors of G (…, m, n), started from `old` where there is one.

    None where G is zero or not finite, and has none to give.

    The random columns depend on `seed` alone: neither the global generator nor the rank of the process
    enters, so that a resumed run and every process of a parallel one find the same basis.
    """
    if isinstance(layout, TensorLayout):  # one round for an old basis's new one; nothing is drawn at random
        largest = 1.0 if has_no_numbers(G) else float(G.abs().max())
        if not 0.0 < largest < math.inf:
            return None
        return tucker_bases(G, layout, old, sweeps=iterations, tolerance=0.0)
    wide = _wide(G)
    P, Q = (None, None) if old is None else old
    if layout.right:
        X = _leading(wide, None if Q is None else Q.mT, layout.rank, iterations, oversample, seed)
        if X is None:
            return None
        right = X.mT.contiguous()  # (…, r, n)
        left = torch.linalg.qr(wide @ X).Q if layout.left else None  # (…, m, r)
    else:
        right = None
        left = _leading(wide.mT, P, layout.rank, iterations, oversample, seed)
        if left is None:
            return None
    return (None if left is None else left.to(G.dtype), None if right is None else right.to(G.dtype))


def _leading(A: Tensor, start: Tensor | None, r: int, iterations: int, oversample: int, seed: int) -> Tensor | None:
    """Orthonormal columns (…, n, r) spanning nearly the leading right singular space of A (…, m, n)."""
    n = A.shape[-1]
    width = min(r + oversample, *A.shape[-2:])
    columns = width if start is None else width - r
    draw = torch.Generator().manual_seed(seed)
    X = _drawn(n, columns, draw).to(A).expand(*A.shape[:-2], n, columns)
    if start is not None:
        if without_basis((start,)):
            empty = ~start.any(-1, keepdim=True).any(-2, keepdim=True)
            start = torch.where(empty, _drawn(n, r, draw).to(start), start)
        X = torch.cat([start.to(A.dtype), X / n**0.5], dim=-1)
    for i in range(iterations):
        AX = A @ X  # (…, m, width)
        largest = AX.abs().amax((-2, -1), keepdim=True)
        if i == 0 and not has_no_numbers(AX) and not 0.0 < float(largest.max()) < math.inf:
            return None
        # divided, so that products with AᵀA neither overflow nor vanish
        AAX = A.mT @ (AX / largest.where(largest > 0, 1.0))  # (…, n, width)
        largest = AAX.abs().amax((-2, -1), keepdim=True)
        X, T = torch.linalg.qr(AAX / largest.where(largest > 0, 1.0))  # (…, n, width), (…, width, width)
    X = X @ torch.linalg.svd(T).U[..., :r]
    if start is not None:
        # A singular vector's sign is arbitrary; the old one's keeps moments meaningful that are not rotated.
        X = X * torch.where((X * start.to(X.dtype)).sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return X


def _drawn(n: int, columns: int, draw: torch.Generator) -> Tensor:
    """Normal numbers (n, columns) on the CPU in float32, whatever torch's defaults are."""
    return torch.randn(n, columns, generator=draw, device="cpu", dtype=torch.float32)


def drawn_bases(layout: Layout, like: Tensor, seed: int) -> Bases:
    """Bases of independent N(0, 1/d) numbers for a side of d: ‖Pᵀg‖² is r/d of ‖g‖² on average, as for orthonormal
    columns in a random direction. In the dtype of the weight `like` and on its device; `seed` alone decides them."""
    draw = None if has_no_numbers(like) else torch.Generator(like.device).manual_seed(seed)

    def drawn(shape: tuple[int, ...], side: int) -> Tensor:
        return (
            torch.randn(shape, generator=draw, device=like.device, dtype=torch.float32).mul_(side**-0.5).to(like.dtype)
        )

    P, Q = (layout.basis_shapes.get(key) for key in layout.keys)
    return None if P is None else drawn(P, layout.m), None if Q is None else drawn(Q, layout.n)


def overlap(old: Bases, new: Bases) -> Tensor:
    """‖Q_old Q_newᵀ‖²_F / r, the share of the old subspace that the new one keeps: 1 is all, r/n chance."""
    shares = []
    if len(old) == 2:  # Q has its vectors as rows
        old, new = ((x[0], None if x[1] is None else x[1].mT) for x in (old, new))
    for a, b in zip(old, new, strict=True):
        if a is not None and b is not None:  # (…, d, r) each
            shares.append(torch.matmul(a.mT, b).float().square().sum((-2, -1)).mean() / a.shape[-1])
    return torch.stack(shares).mean()


def captured_energy(G: Tensor, bases: Bases) -> Tensor:
    """‖R‖²_F / ‖G‖²_F: the share of the gradient's energy inside the subspace; G (…, m, n)."""
    from galore_vit.projection import project

    return project(G, bases).square().sum() / G.square().sum()


def _wide(G: Tensor) -> Tensor:
    return G if G.dtype in (torch.float32, torch.float64) else G.float()
