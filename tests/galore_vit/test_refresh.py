"""Bases: how near the optimum, when replaced, and what becomes of the moments."""

import problems
import pytest
import torch
from galore_vit import GaLoreAdamW, Refresh
from galore_vit.basis import captured_energy, exact_bases, iterated_bases, overlap
from galore_vit.projection import Layout, apply_rotation, project, rotation
from torch import nn


def decaying(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """A gradient whose singular values fall like 1/i."""
    draw = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=draw)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=draw)).Q
    return (U / torch.arange(1, k + 1)) @ V.T


@pytest.mark.parametrize(("left", "right"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_iterated_bases_capture_the_optimum(left, right, shape):
    layout = Layout(1, *shape, 8, left, right)
    G = decaying(*shape)
    best = captured_energy(G, exact_bases(G, layout))
    found = iterated_bases(G, layout, None, iterations=2, oversample=16, seed=3)
    assert captured_energy(G, found) >= 0.99 * best
    for basis in (found[0], None if found[1] is None else found[1].T):
        if basis is not None:
            assert torch.allclose(basis.T @ basis, torch.eye(8), atol=1e-5)


def test_warm_start_beats_cold_start():
    layout = Layout(1, 96, 64, 8, False, True)
    flat = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))  # the hardest spectrum
    best = captured_energy(flat, exact_bases(flat, layout))
    near = exact_bases(flat + 0.1 * torch.randn(96, 64, generator=torch.Generator().manual_seed(1)), layout)
    options = {"iterations": 1, "oversample": 4, "seed": 0}
    cold = captured_energy(flat, iterated_bases(flat, layout, None, **options))
    warm = captured_energy(flat, iterated_bases(flat, layout, near, **options))
    assert cold < 0.9 * best
    assert warm > 0.99 * best


def test_bases_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    [W] = problems.weights((24, 16))
    problems.train(GaLoreAdamW([{"params": [W], **problems.KEYS}]), [W], 0, 21)
    assert torch.equal(torch.get_rng_state(), before)


def test_refreshes_are_staggered(monkeypatch):
    params = problems.weights(*[(24, 16)] * 10)
    optimizer = GaLoreAdamW([{"params": params, **problems.KEYS}], lr=1e-3)
    counts = []
    for step in range(60):
        counts.append(sum(optimizer.refresh_due(p) for p in params))
        problems.train(optimizer, params, step, step + 1)
    assert counts[0] == 10  # every weight needs a first basis
    assert max(counts[1:]) == 1
    assert sum(counts[21:41]) == 10  # each once a gap


def test_without_stagger_all_refresh_together():
    params = problems.weights(*[(24, 16)] * 3)
    optimizer = GaLoreAdamW([{"params": params, **problems.KEYS}], refresh=Refresh(stagger=False))
    due = []
    for step in range(45):
        due += [step] * all(optimizer.refresh_due(p) for p in params)
        problems.train(optimizer, params, step, step + 1)
    assert due == [0, 20, 40]


def test_lazy_gap_grows_while_the_subspace_stays_and_falls_back():
    [W] = problems.weights((24, 16))
    refresh = Refresh(stagger=False, lazy=0.9)
    optimizer = GaLoreAdamW([{"params": [W], **problems.KEYS, "update_proj_gap": 4}], refresh=refresh)
    steady = decaying(24, 16)
    due = []
    for step in range(40):
        due += [step] * optimizer.refresh_due(W)
        W.grad = steady.clone()
        optimizer.step()
    assert due == [0, 4, 12, 28]  # gaps 4, 8, 16, and 32 to come
    gaps = []
    for _ in range(30):
        W.grad = decaying(24, 16, seed=9)
        optimizer.step()
        gaps.append(int(optimizer.state[W]["gap"]))
    assert gaps[0] == 32
    assert 4 in gaps


def test_overlap_is_one_for_the_same_space_and_chance_for_another():
    G, H = decaying(200, 100), decaying(200, 100, seed=5)
    layout = Layout(1, 200, 100, 10, False, True)
    a, b = exact_bases(G, layout), exact_bases(H, layout)
    assert overlap(a, a) == pytest.approx(1.0, abs=1e-5)
    assert overlap(a, b) == pytest.approx(0.1, abs=0.06)


def test_rotation_turns_a_compact_gradient_into_the_new_basis():
    """Within one subspace a rotation loses nothing: R in the new basis is what projecting anew gives."""
    G = decaying(24, 16)
    for left, right in ((False, True), (True, False), (True, True)):
        layout = Layout(1, 24, 16, 5, left, right)
        old = exact_bases(G, layout)
        turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2))).Q
        new = (None if old[0] is None else old[0] @ turn, None if old[1] is None else turn.T @ old[1])
        moved = apply_rotation(project(G, old), rotation(old, new))
        assert torch.allclose(moved, project(G, new), atol=1e-6)


def test_moments_follow_the_basis():
    """After a refresh in the same subspace, a rotated first moment projects back to the same matrix."""
    [W] = problems.weights((24, 16))
    moved = {}
    for rotate in (True, False):
        optimizer = GaLoreAdamW(
            [{"params": [W], **problems.KEYS}],
            lr=0.0,
            betas=(0.9, 0.99),
            refresh=Refresh(stagger=False, rotate=rotate),
        )
        low = decaying(24, 16)
        U, S, Vh = torch.linalg.svd(low, full_matrices=False)
        S[5:] = 0  # of rank 5: every refresh finds the same space
        first, second = (
            (U * S) @ Vh,
            (U * S[[4, 3, 2, 1, 0, *range(5, 16)]]) @ Vh,
        )  # but another order of vectors
        for _ in range(20):
            W.grad = first.clone()
            optimizer.step()
        before = optimizer.state[W]["exp_avg"] @ optimizer.state[W]["Q"]
        W.grad = second.clone()
        optimizer.step()
        after = optimizer.state[W]["exp_avg"] @ optimizer.state[W]["Q"]
        moved[rotate] = (after - (0.9 * before + 0.1 * second)).norm() / before.norm()
        assert (optimizer.state[W]["exp_avg_sq"] >= 0).all()
    assert moved[True] < 1e-4
    assert moved[False] > 0.1


def gradients_of_experts(step, k=3, m=16, n=24, rank=3):
    """Of k matrices, each within a subspace of its own."""
    right = [torch.randn(rank, n, generator=torch.Generator().manual_seed(90 + i)) for i in range(k)]
    draw = torch.Generator().manual_seed(step)
    return torch.stack([torch.randn(m, rank, generator=draw) @ Q for Q in right])


@pytest.mark.parametrize("method", ["power", "svd"])
@pytest.mark.parametrize("fed_until", [0, 12])
def test_an_expert_that_is_idle_when_bases_are_due_keeps_its_own(method, fed_until):
    """Without tokens from step `fed_until` on to step 17: a refresh at 15 must not replace what it has, and where it
    has nothing its first gradients are not left to a basis that knows nothing of them until the next."""
    W = nn.Parameter(torch.zeros(3, 16, 24))
    group = {"params": [W], "rank": 3, "update_proj_gap": 15, "scale": 1.0, "split": 3, "proj_type": "right"}
    optimizer = GaLoreAdamW([group], lr=1e-3, refresh=Refresh(method, stagger=False))
    shares = {}
    for step in range(40):
        W.grad = gradients_of_experts(step)
        if fed_until <= step < 17:
            W.grad[1] = 0
        whole = W.grad.clone()
        optimizer.step()
        R = project(whole, optimizer.bases(W))
        shares[step] = (R.square().sum((-2, -1)) / whole.square().sum((-2, -1)).clamp_min(1e-9)).tolist()
    assert all(share > 0.99 for step in range(40) for share in (shares[step][0], shares[step][2]))
    seen = [step for step in range(40) if not fed_until <= step < 17]
    late = 17 if fed_until else 18  # asked for at 0, 1, … 8, 10, 12, 15 and 18 where there is nothing yet
    assert all(shares[step][1] > 0.99 for step in seen if step < fed_until or step >= late)
    assert bool(W.isfinite().all())


def test_a_stack_without_an_idle_matrix_is_its_matrices_apart():
    keys = {"rank": 3, "update_proj_gap": 4, "scale": 1.0}
    refresh = Refresh("svd", stagger=False)
    W, alone = nn.Parameter(torch.zeros(3, 16, 24)), [nn.Parameter(torch.zeros(16, 24)) for _ in range(3)]
    stack = GaLoreAdamW([{"params": [W], "split": 3, **keys}], lr=1e-2, refresh=refresh)
    apart = GaLoreAdamW([{"params": alone, **keys}], lr=1e-2, refresh=refresh)
    for step in range(9):
        G = gradients_of_experts(step)
        W.grad = G.clone()
        for p, g in zip(alone, G, strict=True):
            p.grad = g.clone()
        stack.step()
        apart.step()
    torch.testing.assert_close(W.detach(), torch.stack([p.detach() for p in alone]), rtol=1e-4, atol=1e-6)
