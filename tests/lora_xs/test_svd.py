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


def test_without_a_gap_little_of_the_norm_is_lost():
    W = torch.randn(400, 500)  # the hardest case: a flat spectrum
    A, B = svd_bases(W, 8)
    best = float(torch.linalg.svdvals(W)[:8].norm())
    assert float(A.norm()) > 0.99 * best
    torch.testing.assert_close(B.t() @ B, torch.eye(8), rtol=1e-5, atol=1e-5)


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
