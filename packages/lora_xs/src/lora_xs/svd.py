"""The bases of LoRA-XS: B = U_r and A = S_r V_rᵀ of W = U S Vᵀ, with canonical signs (arXiv 2405.17604,
section 3).

A holds the singular values: A = Bᵀ W exactly. The official code calls scikit-learn's TruncatedSVD on the
CPU (21 products with W, on blocks of r + 10 columns). Here every power iterate is kept (randomised block
Krylov iteration, Musco and Musco 2015), so that each product raises the degree of a Chebyshev polynomial
instead of a monomial, and the blocks are only r/2 wide: 12 products with half the columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import LoRAXSError

STEPS = 6
"""Blocks of the Krylov space, r/2 columns (at least 8) each; 2·STEPS products with W in all."""

METHOD_VERSION = 1
"""Part of the cache key: raised whenever the computed bases change."""


def svd_bases(W: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Leading singular bases of W, a pure function of its values: every machine draws the same start.

    Guaranteed to rounding, whatever the spectrum: B is orthonormal and A = BᵀW. Behind a gap of the spectrum the bases
    span LAPACK's subspace (to 1e-3 behind a gap of 1.5). Without one the last vectors may be turned within a subspace
    that serves as well: none carries (by ‖A_i‖) more than 10 % less than σ_i on pure noise, the worst there is, and 3 %
    less where σ_k falls as k^-½. `exact=True` has no such edge.

    Args:
        W: (out×in), float32 or float64, on any device.
        rank: r ≤ min(out, in).
        exact: LAPACK's full SVD instead of the randomised one.

    Returns:
        A = S_r V_rᵀ (r×in) and B = U_r (out×r); the entry of largest magnitude of each column of B is
        positive.
    """
    block = max(8, (rank + 1) // 2)
    with torch.no_grad(), full_precision(W.device):
        # A Krylov space as large as the matrix would cost more than the whole decomposition.
        if exact or block * STEPS >= min(W.shape):
            B = torch.linalg.svd(W, full_matrices=False).U[:, :rank]  # out×r
            A = B.t() @ W
        else:
            A, B = _krylov_bases(W, rank, block)
        return with_canonical_signs(A, B)


def official_bases(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The bases of the official code, up to sign: scikit-learn's TruncatedSVD of Wᵀ on the CPU, 10 power iterations,
    seed 42. They belong to checkpoints that it wrote; where the spectrum has no gap they are others than `svd_bases`'.

    Args, Returns: as of :func:`svd_bases`.
    """
    try:
        from sklearn.decomposition import TruncatedSVD
    except ImportError as error:
        raise LoRAXSError('svd="official" is scikit-learn\'s algorithm: pip install scikit-learn') from error
    decomposition = TruncatedSVD(rank, n_iter=10, random_state=42)
    A = torch.from_numpy(decomposition.fit_transform(W.t().cpu().numpy())).to(W).t()  # r×in, = BᵀW
    B = torch.from_numpy(decomposition.components_).to(W).t()  # out×r
    return with_canonical_signs(A, B)


def random_bases(shape: tuple[int, int], rank: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """The paper's ablation: A ~ U(±1/√r) (r×in) and B ~ U(±1/√out) (out×r), as the official code draws
    them."""
    out, width = shape
    draw = generator(seed, "bases", name)
    A = (torch.rand(rank, width, generator=draw, dtype=torch.float32) * 2 - 1) / math.sqrt(rank)
    B = (torch.rand(out, rank, generator=draw, dtype=torch.float32) * 2 - 1) / math.sqrt(out)
    return A, B


def with_canonical_signs(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product; the entry of largest magnitude of each column of B is positive."""
    largest = B.gather(0, B.abs().argmax(0, keepdim=True))  # 1×r
    sign = torch.where(largest < 0, -1.0, 1.0).to(B.dtype)
    return A * sign.t(), B * sign


def generator(seed: int, *labels: str) -> torch.Generator:
    """A CPU generator of its own for (seed, labels): the order of modules and the device play no part."""
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _krylov_bases(W: Tensor, rank: int, block: int) -> tuple[Tensor, Tensor]:
    """A = Bᵀ W (r×in) and the leading left singular vectors B (out×r) of W (out×in), best first."""
    M = W if W.shape[0] <= W.shape[1] else W.t()  # s×l, s ≤ l: only the short side is kept orthogonal
    short, long = M.shape
    start = torch.randn(long, block, generator=generator(0, "krylov")).to(M)  # drawn on the CPU: same everywhere
    L = M.new_empty(short, 0)  # orthonormal basis of the Krylov space of M Mᵀ
    blocks = []  # of Z = MᵀL
    Y = M @ start
    for step in range(STEPS):
        L = torch.cat([L, _orthonormal(Y, L)], dim=1)  # s×(step+1)·block
        # Written so that M is read along its rows: M.t() @ L takes 1.6 times as long on a CPU.
        blocks.append((L[:, -block:].t() @ M).t())  # l×block
        if step + 1 < STEPS:
            Y = M @ blocks[-1]
    Z = torch.cat(blocks, dim=1)  # l×k, k = STEPS·block
    if M is W:
        # Rayleigh-Ritz: LᵀW = Zᵀ is at hand, and the left singular vectors of Zᵀ are the eigenvectors of ZᵀZ.
        # Squaring the singular values would cost half the digits, so the product is in float64.
        ZZ = Z.double()
        vectors = torch.linalg.eigh(ZZ.t() @ ZZ).eigenvectors.flip(1)[:, :rank].to(W)  # k×r, largest first
        return vectors.t() @ Z.t(), L @ vectors
    # W ≈ Z Lᵀ: the left singular vectors of Z = Q T, made orthonormal even where singular values vanish.
    Q, T = torch.linalg.qr(Z)
    B = Q @ torch.linalg.svd(T).U[:, :rank]
    return B.t() @ W, B


def _orthonormal(Y: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of Y (s×b) made orthogonal to `basis` (s×k). Twice is enough (Kahan, Parlett)."""
    for _ in range(2):
        Y = torch.linalg.qr(Y - basis @ (basis.t() @ Y)).Q
    return Y


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: both would round the bases to three digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
