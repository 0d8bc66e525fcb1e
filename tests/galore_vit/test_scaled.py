"""GaLoreScaled against APOLLO's equations written out in float64, and what its `scale` means."""

import math
import statistics
from functools import partial

import problems
import pytest
import torch
from galore_vit import GaLoreAdamW, GaLoreScaled, InBackward, Refresh, projected_all_reduce, state_bytes
from galore_vit.basis import drawn_bases
from galore_vit.projection import Layout
from galore_vit.state_size import scaled_state_bytes_formula
from memtrain_common.files import read_json
from support import ROOT


class Reference:
    """One m×n matrix by the paper's Algorithm 1, a channel at a time; the bases are handed in."""

    def __init__(self, W, *, left, by, lr, scale, decay, limit, betas=(0.9, 0.999), eps=1e-8):
        self.W, self.left, self.by, self.limit = W.double().clone(), left, by, limit
        self.lr, self.scale, self.decay, self.betas, self.eps = lr, scale, decay, betas, eps
        self.M = self.V = torch.zeros(())
        self.t, self.last = 0, 0.0

    def step(self, G, basis):
        G, basis = G.double(), basis.double()
        R = basis.T @ G if self.left else G @ basis.T
        b1, b2 = self.betas
        self.t += 1
        self.M, self.V = b1 * self.M + (1 - b1) * R, b2 * self.V + (1 - b2) * R**2
        N = self.M / (1 - b1**self.t) / ((self.V / (1 - b2**self.t)).sqrt() + self.eps)
        update = torch.empty_like(G)
        if self.by == "tensor":
            update = G * (N.norm() / R.norm())
        else:
            for j in range(R.shape[self.left]):
                channel = (slice(None), j) if self.left else (j, slice(None))
                update[channel] = G[channel] * (N[channel].norm() / R[channel].norm())
        size = float(update.norm())
        if self.limit is not None and 0 < self.limit * self.last < size:
            update *= self.limit * self.last / size
            size = self.limit * self.last
        self.last = size
        self.W = self.W - self.lr * self.decay * self.W - self.lr * self.scale * update


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "svd"])
@pytest.mark.parametrize(
    ("shape", "proj_type", "left"),
    [((13, 29), "std", True), ((29, 13), "std", False), ((13, 29), "reverse_std", False), ((8, 2, 3, 3), "std", True)],
)
@pytest.mark.parametrize(
    ("rank", "scaling", "limit"), [(5, None, 1.01), (5, "tensor", 1.3), (1, None, 1.01), (5, None, None)]
)
def test_it_is_the_papers_algorithm(method, shape, proj_type, left, rank, scaling, limit):
    [W] = problems.weights(shape, dtype=torch.float64)
    by = scaling or ("tensor" if rank == 1 else "channel")
    numbers = {"lr": 3e-2, "eps": 1e-8}
    reference = Reference(W.detach().flatten(1), left=left, by=by, scale=0.7, decay=0.1, limit=limit, **numbers)
    optimizer = GaLoreScaled(
        [{"params": [W], "rank": rank, "update_proj_gap": 7, "scale": 0.7, "proj_type": proj_type}],
        weight_decay=0.1, scaling=scaling, growth_limit=limit, refresh=Refresh(method, rotate=False), **numbers,
    )  # fmt: skip
    bases = []
    for step in range(23):
        problems.set_grads([W], step)
        G = W.grad.flatten(1)
        optimizer.step()
        P, Q = optimizer.bases(W)
        bases.append((P if left else Q).clone())
        reference.step(G, bases[-1])
    error = 1e-10 if limit is None else 1e-6  # the last norm is kept in float32
    torch.testing.assert_close(W.detach().flatten(1), reference.W, rtol=error, atol=error)
    changes = [i for i in range(1, 23) if not torch.equal(bases[i], bases[i - 1])]
    assert changes == [7, 14, 21]


@pytest.mark.parametrize("kind", [GaLoreScaled, partial(GaLoreAdamW, residual=True)])
def test_a_batch_of_few_rows_does_not_hold_an_embedding_back(kind):
    """After one batch of one row the next whole one moves the table as far as if it had not been."""
    norms = {}
    for short in (False, True):
        [table] = problems.weights((60, 12))
        optimizer = kind([{"params": [table], "rank": 4, "scale": 1.0}], lr=1e-3)
        for step in range(8):
            rows = torch.randn(60, 12, generator=torch.Generator().manual_seed(step))
            table.grad = rows.where(torch.arange(60)[:, None] < (1 if short and step == 5 else 60), 0.0)
            before = table.detach().clone()
            optimizer.step()
            norms[short, step] = float((table.detach() - before).norm())
    assert norms[True, 5] < 0.5 * norms[False, 5]
    assert all(norms[True, step] > 0.8 * norms[False, step] for step in (6, 7))


def test_stacked_matrices_are_scaled_apart():
    """Three row blocks in one weight are three weights: bases, channels and factors of their own."""
    [whole] = problems.weights((3 * 16, 24), dtype=torch.float64)
    parts = [torch.nn.Parameter(p.clone()) for p in whole.detach().chunk(3)]
    keys = {"rank": 4, "update_proj_gap": 5, "scale": 1.0}
    more = {"lr": 1e-2, "growth_limit": None, "scaling": "channel", "refresh": Refresh("svd", stagger=False)}
    together = GaLoreScaled([{"params": [whole], "split": 3, **keys}], **more)
    apart = GaLoreScaled([{"params": parts, **keys}], **more)
    for step in range(12):
        draw = torch.Generator().manual_seed(step)
        whole.grad = torch.randn(whole.shape, generator=draw, dtype=torch.float64)
        for part, grad in zip(parts, whole.grad.chunk(3), strict=True):
            part.grad = grad.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("tall", [False, True])
def test_a_scale_of_one_is_about_adamws_step(rank, tall):
    """Gradients of independent entries, channels of very different sizes: each moves as far as AdamW moves it, and at
    rank 1 the matrix."""
    draw = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-4, 0, 192)
    found, wanted = torch.zeros(192), torch.zeros(192)
    scaled, plain = problems.weights(*[(192, 128) if tall else (128, 192)] * 2)
    ours = GaLoreScaled([{"params": [scaled], "rank": rank, "scale": 1.0}], lr=1e-3, growth_limit=None)
    theirs = torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.0)
    for _ in range(30):
        grad = torch.randn(128, 192, generator=draw) * sizes
        for optimizer, p, moved in ((ours, scaled, found), (theirs, plain, wanted)):
            p.grad = grad.T.contiguous() if tall else grad
            before = p.detach().clone()
            optimizer.step()
            moved += (p.detach() - before).square().sum(int(tall))
    assert float((found.sum() / wanted.sum()).sqrt()) == pytest.approx(1.0, abs=0.2)
    if rank > 1:
        ratio = (found / wanted).sqrt()
        assert float(ratio[:64].median()) == pytest.approx(1.0, abs=0.2)  # the smallest channels
        assert float(ratio[-64:].median()) == pytest.approx(1.0, abs=0.2)


def test_state_is_two_rows_a_rank_and_no_basis():
    shapes = ((24, 16), (16, 40), (7,), (48, 40))
    for method, bases in (("random", 0), ("power", 5 * (16 + 16 + 40))):
        params = problems.weights(*shapes)
        groups = [{"params": params, **problems.KEYS}]
        optimizer = GaLoreScaled(groups, refresh=Refresh(method))
        problems.train(optimizer, params, 0, 3)
        by_hand = 4 * (2 * 5 * (24 + 40 + 48) + 3 + 2 * 7 + bases)
        assert state_bytes(optimizer) == scaled_state_bytes_formula(groups, method) == by_hand
    held = {key for state in GaLoreScaled(groups).state.values() for key in state}
    assert not held & {"P", "Q"}


def test_a_rank_at_the_side_is_plain_adamw_with_no_larger_moments():
    params = problems.weights((24, 6), (24, 16))
    with pytest.warns(UserWarning, match="no side above their rank"):
        optimizer = GaLoreScaled([{"params": params, "rank": 8}])
    problems.train(optimizer, params, 0, 1)
    assert optimizer.state[params[0]]["exp_avg"].shape == (24, 6)
    assert optimizer.state[params[1]]["exp_avg"].shape == (24, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_take_float32s_steps(dtype):
    changes = []
    for kind in (torch.float32, dtype):
        W = torch.nn.Parameter(torch.zeros(48, 32, dtype=kind))
        optimizer = GaLoreScaled([{"params": [W], **problems.KEYS, "scale": 1.0}], lr=1e-2)
        draw = torch.Generator().manual_seed(2)
        for _ in range(5):
            W.grad = (1e-5 * torch.randn(48, 32, generator=draw)).to(kind)
            optimizer.step()
        changes.append(float(W.detach().float().abs().mean()))
    assert changes[1] == pytest.approx(changes[0], rel=0.1)


def test_a_channel_without_gradient_rests_and_a_zero_gradient_moves_nothing():
    [W] = problems.weights((16, 24))
    before = W.detach().clone()
    optimizer = GaLoreScaled([{"params": [W], **problems.KEYS, "scale": 1.0}], lr=1e-2)
    W.grad = torch.zeros_like(W)
    optimizer.step()
    assert torch.equal(W.detach(), before)
    W.grad = torch.randn_like(W)
    W.grad[:, 3] = 0
    optimizer.step()
    assert torch.equal(W.detach()[:, 3], before[:, 3])
    assert W.isfinite().all()
    assert not torch.equal(W.detach()[:, 4], before[:, 4])


@pytest.mark.parametrize(("options", "keys", "match"), [
    ({"scaling": "row"}, {}, "'channel', 'tensor' or None"), ({"growth_limit": 1.0}, {}, "growth_limit"),
    ({}, {"proj_type": "full"}, "no channel whole"), ({}, {"residual": True}, "no residual"),
    ({"foreach": True, "fused": True}, {}, "exclude each other"), ({}, {"dim": 3}, "scales matrices"),
])  # fmt: skip
def test_refused_options(options, keys, match):
    with pytest.raises(ValueError, match=match):
        GaLoreScaled([{"params": problems.weights((24, 16, 8)), **problems.KEYS, **keys}], **options)


def test_random_bases_belong_to_it_alone():
    group = [{"params": problems.weights((24, 16)), **problems.KEYS}]
    with pytest.raises(ValueError, match="projects back by them"):
        GaLoreAdamW(group, refresh=Refresh("random"))
    with pytest.raises(ValueError, match="nothing in common"):
        Refresh("random", rotate=True)
    assert Refresh("random").rotate is False
    optimizer = GaLoreScaled(group)
    for what in (InBackward, projected_all_reduce):
        with pytest.raises(ValueError, match="GaLoreScaled moves weights by full gradients"):
            what(optimizer)


def test_drawn_bases_keep_their_share_of_any_gradient():
    """‖Pᵀg‖² is r/d of ‖g‖² on average, from either side, and the seed alone decides the numbers."""
    for left in (True, False):
        layout = Layout(1, 60, 60, 12, left, not left)
        g = torch.randn(60)
        found = []
        for seed in range(200):
            P, Q = drawn_bases(layout, g, seed)
            found.append(float((P.T @ g if left else Q @ g).square().sum() / g.square().sum()))
        assert sum(found) / 200 == pytest.approx(12 / 60, rel=4 * math.sqrt(2 / 12 / 200))
        again, other = (drawn_bases(layout, g, seed)[not left] for seed in (199, 198))
        assert torch.equal(again, (P, Q)[not left])
        assert not torch.equal(other, again)


@pytest.mark.parametrize("build", [GaLoreAdamW, GaLoreScaled])
def test_decay_shrinks_the_first_moment_at_a_refresh_and_not_at_the_first(build):
    """The first moment before a refresh counts a quarter in it; the second stays."""
    kept, decayed = [], []
    for decay, out in ((1.0, kept), (0.25, decayed)):
        [W] = problems.weights((24, 16))
        optimizer = build(
            [{"params": [W], **problems.KEYS, "update_proj_gap": 4}], lr=0.0, refresh=Refresh(rotate=False, decay=decay)
        )
        for step in range(5):
            problems.set_grads([W], step)
            optimizer.step()
            out.append([optimizer.state[W][key].clone() for key in ("exp_avg", "exp_avg_sq")])
    for step in range(4):
        assert all(map(torch.equal, kept[step], decayed[step]))
    new = kept[4][0] - 0.9 * kept[3][0]
    torch.testing.assert_close(decayed[4][0], 0.9 * 0.25 * kept[3][0] + new, rtol=1e-4, atol=1e-6)
    assert torch.equal(kept[4][1], decayed[4][1])
    with pytest.raises(ValueError, match="decay must lie"):
        Refresh(decay=1.5)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("galore_less_state", "AdamW"),
        ("galore_moments", "GaLoreAdamW r = 8, turned"),
        ("galore_less_state_vit", "AdamW"),
    ],
)
def test_the_readme_has_the_losses_that_were_measured(name, base):
    """Each way's mean loss, and its mean, least and most against the base, seed by seed."""
    text = (ROOT / "packages" / "galore_vit" / "README.md").read_text().replace("−", "-")
    rows = [r for r in read_json(ROOT / "benchmarks" / "results" / f"{name}.json")["arms"] if r["use"] == "report"]
    first = {r["seed"]: r["loss"] for r in rows if r["way"] == base}
    assert len(first) == 5
    for way in dict.fromkeys(r["way"] for r in rows):
        mine = [r for r in rows if r["way"] == way]
        gaps = [100 * (r["loss"] / first[r["seed"]] - 1) for r in mine]
        assert len(mine) == 5
        end = f"{statistics.mean(gaps):+.2f} % ({min(gaps):+.2f} to {max(gaps):+.2f}) |" if way != base else ""
        assert f"| {statistics.mean(r['loss'] for r in mine):.3f} | {end}" in text, way
