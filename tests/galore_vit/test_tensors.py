"""The tensor form: bases by mode, against the definitions written out, and the update against its equation."""

import itertools
import math

import problems
import pytest
import torch
from galore_vit import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, InBackward, Refresh, state_bytes
from galore_vit.state_size import adamw_state_bytes_formula
from galore_vit.tensors import TensorLayout, multiply, tucker_bases, tucker_ranks

EXACT = Refresh(method="svd", stagger=False, rotate=False)
KEYS = {"rank": (3, 2, 4), "update_proj_gap": 10, "scale": 0.5, "dim": 3}
LETTERS = "abcdefg"


def unfolded(X, mode):
    return X.movedim(mode, 0).flatten(1)


def written_out(X, factors):
    """X ×ᵢ Uᵢ by one einsum."""
    inside, outside = LETTERS[: X.ndim], LETTERS[: X.ndim].upper()
    modes = ",".join(f"{o}{i}" for i, o in zip(inside, outside, strict=True))
    return torch.einsum(f"{inside},{modes}->{outside}", X, *factors)


@pytest.mark.parametrize("shape", [(5, 4, 6), (3, 5, 2, 4), (2, 3, 2, 3, 4)])
def test_mode_products_are_the_einsum(shape):
    X = torch.randn(shape, dtype=torch.float64)
    factors = [torch.randn(s + 1, s, dtype=torch.float64) for s in shape]
    torch.testing.assert_close(multiply(X, tuple(factors)), written_out(X, factors))
    torch.testing.assert_close(multiply(X, tuple(f.mT for f in factors), transpose=True), written_out(X, factors))
    whole = [
        torch.eye(s, dtype=torch.float64) if i == 1 else f for i, (s, f) in enumerate(zip(shape, factors, strict=True))
    ]
    left_out = tuple(None if i == 1 else f for i, f in enumerate(factors))
    torch.testing.assert_close(multiply(X, left_out), written_out(X, whole))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("shape", "ranks"), [((9, 7, 8), (3, 2, 4)), ((6, 7, 5, 4), (2, 7, 3, 2))])
def test_bases_of_a_tensor_that_has_these_ranks_find_all_of_it(shape, ranks, old):
    core = torch.randn(ranks, dtype=torch.float64)
    G = written_out(core, [torch.randn(s, r, dtype=torch.float64) for s, r in zip(shape, ranks, strict=True)])
    layout = TensorLayout(shape, ranks)
    begun = (
        tucker_bases(torch.randn(shape, dtype=torch.float64), layout, None, sweeps=1, tolerance=0.0) if old else None
    )
    bases = tucker_bases(G, layout, begun, sweeps=3, tolerance=0.0)
    assert [b is None for b in bases] == [r == s for r, s in zip(ranks, shape, strict=True)]
    for b in bases:
        assert b is None or torch.allclose(b.mT @ b, torch.eye(b.shape[1], dtype=b.dtype), atol=1e-10)
    R = multiply(G, bases, transpose=True)
    torch.testing.assert_close(multiply(R, bases), G, rtol=1e-8, atol=1e-8)


def test_rounds_reach_a_point_where_each_basis_is_the_best_for_the_others():
    G = torch.randn(8, 7, 9, dtype=torch.float64)
    layout = TensorLayout((8, 7, 9), (3, 3, 3))
    first = tucker_bases(G, layout, None, sweeps=0, tolerance=0.0)
    for i, U in enumerate(first):  # HOSVD: leading singular vectors of each unfolding
        best = torch.linalg.svd(unfolded(G, i)).U[:, :3]
        assert torch.linalg.matrix_norm(best.mT @ U).square() == pytest.approx(3, abs=1e-8)
    bases = tucker_bases(G, layout, None, sweeps=300, tolerance=0.0)
    captured = [multiply(G, b, transpose=True).norm() for b in (first, bases)]
    assert captured[1] >= captured[0]
    for i, U in enumerate(bases):
        others = tuple(None if j == i else b for j, b in enumerate(bases))
        best = torch.linalg.svd(unfolded(multiply(G, others, transpose=True), i)).U[:, :3]
        assert torch.linalg.matrix_norm(best.mT @ U).square() == pytest.approx(3, abs=1e-6)


def test_the_update_is_the_equation():
    """Adam on R, put back by the bases of the last refresh, in float64."""
    [W] = problems.weights((6, 5, 7), dtype=torch.float64)
    slow, M, V = W.detach().clone(), 0.0, 0.0
    fast = GaLoreAdamW([{"params": [W], **KEYS}], lr=1e-2, weight_decay=0.1, refresh=EXACT)
    layout = TensorLayout((6, 5, 7), (3, 2, 4))
    for t in range(1, 26):
        problems.set_grads([W], t)
        G = W.grad.clone()
        if t % 10 == 1:
            U = tucker_bases(G, layout, None, sweeps=100, tolerance=1e-4)
        R = written_out(G, [u.mT for u in U])
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = M / (1 - 0.9**t) / ((V / (1 - 0.999**t)).sqrt() + 1e-8)
        slow = slow - 1e-2 * 0.1 * slow - 1e-2 * 0.5 * written_out(N, U)
        fast.step()
    torch.testing.assert_close(W.detach(), slow, rtol=1e-9, atol=1e-11)


def test_ranks_by_share_keep_that_share_of_the_numbers():
    """The published test's rank is 0.2 of a tensor of five dimensions."""
    assert tucker_ranks((6, 5, 7), 3) == (3, 3, 3)
    assert tucker_ranks((6, 2, 7), 3) == (3, 2, 3)
    assert tucker_ranks((6, 5, 7), [2, 9, 4]) == (2, 5, 4)
    for shape, share in itertools.product([(64, 64, 20, 11, 2), (30, 40, 50)], [0.1, 0.2, 0.5, 0.75]):
        ranks = tucker_ranks(shape, share)
        kept = math.prod(ranks) + sum(s * r for s, r in zip(shape, ranks, strict=True))
        assert kept / math.prod(shape) == pytest.approx(share, rel=0.35)
    assert tucker_ranks((4, 4, 4), 1.0) == (3, 3, 3)  # bases count too


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda g: GaLoreAdamW(g, lr=1e-1),
        lambda g: GaLoreAdamW(g, lr=1e-1, paper=True),
        lambda g: GaLoreAdamW(g, lr=1e-1, refresh=Refresh(lazy=0.5)),
        lambda g: GaLoreAdamW8bit(g, lr=1e-1, weight_decay=0.0),
        lambda g: GaLoreAdafactor(g, lr=1e-1, relative_step=False, scale_parameter=False, beta1=0.9),
    ],
)
def test_it_learns_resumes_and_keeps_less(build):
    params = problems.weights((12, 10, 14), (9, 8, 3, 3), (7,))

    def groups(ps):
        return [
            {"params": ps[:1], **KEYS, "scale": 1.0, "rank": 0.4},
            {"params": ps[1:2], **KEYS, "scale": 1.0, "rank": 4, "dim": 4},
            {"params": ps[2:], "dim": 2},  # the published code puts dim in every group
        ]

    start, again = problems.copied(params), problems.copied(params)
    optimizer = build(groups(params))
    problems.train(optimizer, params, 0, 40)
    target = [torch.full_like(p, 0.1 * (i + 1)) for i, p in enumerate(params)]
    for before, after, goal in zip(start, params, target, strict=True):
        assert (after - goal).norm() < 0.95 * (before - goal).norm()
    half = build(groups(again))
    problems.train(half, again, 0, 23)
    other = problems.copied(again)
    resumed = build(groups(other))
    resumed.load_state_dict(half.state_dict())
    problems.train(resumed, other, 23, 40)
    assert problems.same(params, other)
    if type(optimizer) is GaLoreAdamW:
        assert state_bytes(optimizer) < 0.7 * 8 * sum(p.numel() for p in params)


def test_the_states_size_is_the_formula():
    params = problems.weights((12, 10, 14))
    groups = [{"params": params, **KEYS}]
    optimizer = GaLoreAdamW(groups)
    optimizer.init_state()
    assert state_bytes(optimizer) == adamw_state_bytes_formula(groups) == 4 * (12 * 3 + 10 * 2 + 14 * 4 + 2 * 24)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"rank": 0.0}, "share in"),
        ({"rank": 1.5}, "share in"),
        ({"rank": (3, 2)}, "3 of them"),
        ({"rank": True}, "share in"),
        ({"split": 2}, "neither split nor residual"),
        ({"dim": 4, "rank": 3}, "dim 4 has a weight of 3 dimensions"),
        ({"dim": 2.5, "rank": 3}, "dim must be"),
    ],
)
def test_refused_groups(keys, match):
    with pytest.raises(ValueError, match=match):
        GaLoreAdamW([{"params": problems.weights((6, 5, 7)), **KEYS, **keys}])


def test_what_the_tensor_form_is_not_for_is_refused():
    optimizer = GaLoreAdamW([{"params": problems.weights((6, 5, 7)), **KEYS}])
    with pytest.raises(ValueError, match="InBackward projects matrices"):
        InBackward(optimizer)
    with pytest.raises(ValueError, match="residual"):
        GaLoreAdamW([{"params": problems.weights((6, 5, 7)), **KEYS}], residual=True)
    with pytest.warns(UserWarning, match="nothing is projected now"):
        GaLoreAdamW([{"params": problems.weights((3, 2, 4)), **KEYS}])
