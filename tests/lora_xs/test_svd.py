"""The bases against LAPACK and against scikit-learn, which the official code uses."""

import copy

import pytest
import torch
from lora_xs import LoRAXSConfig, LoRAXSError, inject
from lora_xs.svd import STEPS, random_bases, svd_bases
from torch import nn


def planted(out, width, gap_at, gap=3.0, dtype=torch.float64):
    """A matrix whose singular values decay, with one gap."""
    n = min(out, width)
    s = 5 * torch.arange(1, n + 1, dtype=dtype) ** -0.5
    s[gap_at:] /= gap
    U = torch.linalg.qr(torch.randn(out, n, dtype=dtype)).Q
    V = torch.linalg.qr(torch.randn(width, n, dtype=dtype)).Q
    return (U * s) @ V.t()


def sine(B, reference):
    """Sine of the largest principal angle between two subspaces given by orthonormal columns."""
    B, reference = B.double(), reference.double()
    return float(torch.linalg.matrix_norm(B - reference @ (reference.t() @ B), 2))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(300, 401), (401, 300), (64, 777), (7, 5)])
@pytest.mark.parametrize("exact", [False, True])
def test_bases_are_those_of_lapack(shape, exact):
    rank = min(4, min(shape))
    W = planted(*shape, gap_at=rank)
    A, B = svd_bases(W, rank, exact=exact)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(B.abs(), U[:, :rank].abs(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(A.abs(), (S[:rank, None] * Vh[:rank]).abs(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B @ A, (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(A, B.t() @ W, rtol=1e-12, atol=1e-12)
    largest = B.gather(0, B.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


def test_the_randomised_path_is_taken_and_agrees_in_float32():
    W = planted(500, 600, gap_at=16).float()
    assert 8 * STEPS < 500
    _, fast = svd_bases(W, 16)
    _, exact = svd_bases(W, 16, exact=True)
    assert not torch.equal(fast, exact)
    assert sine(fast, exact) < 1e-3


def decaying(out, width, power):
    """σ_k = k^−power: no gap anywhere."""
    n = min(out, width)
    U, V = (torch.linalg.qr(torch.randn(size, n)).Q for size in (out, width))
    return (U * torch.arange(1, n + 1) ** -power) @ V.t()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 16, 33])
@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (torch.randn, 0.10),  # the hardest case: noise
        (lambda out, width: decaying(out, width, 0.25), 0.06),
        (lambda out, width: decaying(out, width, 0.5), 0.03),
    ],
    ids=["noise", "k^-1/4", "k^-1/2"],
)
@pytest.mark.parametrize("shape", [(430, 520), (520, 430)])
def test_what_holds_without_a_gap(make, lost, rank, shape):
    """What the docstring promises: vectors at the edge may be turned, but each carries nearly what the best would."""
    W = make(*shape)
    A, B = svd_bases(W, rank)
    best = torch.linalg.svdvals(W)[:rank]
    torch.testing.assert_close(B.t() @ B, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(A, B.t() @ W, rtol=0, atol=2e-6 * float(best[0]))
    carried = torch.linalg.vector_norm(A, dim=1)
    assert bool((carried > (1 - lost) * best).all())
    assert bool((carried < best * (1 + 1e-5)).all())
    assert float(A.norm()) > (1 - lost / 2) * float(best.norm())


def test_deficient_matrices_give_orthonormal_bases():
    W = torch.outer(torch.randn(300), torch.randn(200))
    for matrix in (W, torch.zeros(300, 200)):
        A, B = svd_bases(matrix, 5)
        assert bool(torch.isfinite(A).all())
        torch.testing.assert_close(B.t() @ B, torch.eye(5), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(B @ A, matrix, rtol=1e-4, atol=1e-4)


def test_same_leading_subspace_as_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    W = planted(256, 700, gap_at=16).float()
    _, B = svd_bases(W, 16)
    reference = decomposition.TruncatedSVD(16, n_iter=10, random_state=42).fit(W.t().numpy())
    assert sine(B, torch.from_numpy(reference.components_.copy()).t()) < 1e-3


def test_not_moved_by_autocast_or_the_global_seed():
    W = torch.randn(300, 310)
    want = svd_bases(W, 4)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        got = svd_bases(W, 4)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_random_bases_have_the_official_bounds():
    A, B = random_bases((300, 200), 9, seed=1, name="x")
    assert A.shape == (9, 200)
    assert B.shape == (300, 9)
    assert 0.99 / 3 < float(A.abs().max()) <= 1 / 3
    assert 0.99 / 300**0.5 < float(B.abs().max()) <= 1 / 300**0.5
    again = random_bases((300, 200), 9, seed=1, name="x")
    other = random_bases((300, 200), 9, seed=1, name="y")
    assert torch.equal(A, again[0])
    assert not torch.equal(A, other[0])


def test_weights_that_are_not_finite_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight.data[2, 3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LoRAXSError, match=r"^1 has weights that are not finite"):
        inject(model, LoRAXSConfig(rank=2))
    assert list(model.state_dict()) == list(before)


def test_rank_larger_than_the_matrix():
    with pytest.raises(LoRAXSError, match=r"rank 9 is larger than 1, a 7×20 matrix; use at most 7"):
        inject(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 7)), LoRAXSConfig(rank=9))
