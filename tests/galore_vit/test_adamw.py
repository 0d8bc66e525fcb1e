"""GaLoreAdamW against a reference from the equations, and in the cases the published code lacks."""

import math
import warnings

import problems
import pytest
import torch
from galore_vit import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreScaled, Refresh, adamw8bit
from torch import nn

EXACT = Refresh(method="svd", stagger=False, rotate=False)


@pytest.mark.parametrize(("proj_type", "shape", "sides"), [
    ("std", (24, 16), "right"), ("std", (16, 40), "left"), ("reverse_std", (24, 16), "left"),
    ("reverse_std", (16, 40), "right"), ("left", (24, 16), "left"), ("right", (16, 40), "right"),
    ("full", (24, 16), "full"),
])  # fmt: skip
def test_equals_the_equations(proj_type, shape, sides):
    [W] = problems.weights(shape, dtype=torch.float64)
    slow = problems.ReferenceGaLore(W.detach(), 5, 10, 0.5, sides, 1e-2, 0.1)
    keys = {"rank": 5, "update_proj_gap": 10, "scale": 0.5, "proj_type": proj_type}
    fast = GaLoreAdamW([{"params": [W], **keys}], lr=1e-2, weight_decay=0.1, refresh=EXACT)
    for step in range(25):
        problems.set_grads([W], step)
        slow.step(W.grad)
        fast.step()
    # U and V of an SVD may differ in sign between two calls; nothing else may
    assert torch.allclose(W, slow.W, rtol=1e-9, atol=1e-11)


def test_conv_is_projected_as_its_matrix():
    [W] = problems.weights((24, 4, 2, 2), dtype=torch.float64)
    slow = problems.ReferenceGaLore(W.detach().reshape(24, 16), 5, 10, 0.25, "right", 1e-2)
    fast = GaLoreAdamW([{"params": [W], **problems.KEYS, "update_proj_gap": 10}], lr=1e-2, refresh=EXACT)
    for step in range(25):
        problems.set_grads([W], step)
        slow.step(W.grad.reshape(24, 16))
        fast.step()
    assert torch.allclose(W.reshape(24, 16), slow.W, rtol=1e-9, atol=1e-11)


def test_conv_in_channels_last_moves_alike():
    [a] = problems.weights((24, 4, 2, 2))
    b = nn.Parameter(a.detach().clone().to(memory_format=torch.channels_last))
    for W in (a, b):
        problems.train(GaLoreAdamW([{"params": [W], **problems.KEYS}], lr=1e-2, refresh=EXACT), [W], 0, 5)
    assert torch.allclose(a, b, atol=1e-6)
    assert b.is_contiguous(memory_format=torch.channels_last)


def test_a_plain_weight_whose_gradient_has_other_strides_moves_alike():
    """The fused kernel would take both in the order of memory."""
    [a] = problems.weights((6, 4, 3, 2))
    b = nn.Parameter(a.detach().clone())
    one, two = GaLoreAdamW([a], lr=1e-2), GaLoreAdamW([b], lr=1e-2)
    for step in range(3):
        problems.set_grads([a], step)
        b.grad = a.grad.clone().to(memory_format=torch.channels_last)
        one.step()
        two.step()
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_fused_qkv_is_three_weights(stacked):
    parts = problems.weights((20, 16), (20, 16), (20, 16))
    joined = torch.stack(parts) if stacked else torch.cat(parts)
    fused = nn.Parameter(joined.detach().clone())
    one = GaLoreAdamW([{"params": [fused], **problems.KEYS, "split": 3}], lr=1e-2, refresh=EXACT)
    three = GaLoreAdamW([{"params": parts, **problems.KEYS}], lr=1e-2, refresh=EXACT)
    for step in range(45):
        problems.set_grads(parts, step)
        grads = [p.grad for p in parts]
        fused.grad = torch.stack(grads) if stacked else torch.cat(grads)
        one.step()
        three.step()
    together = torch.stack(parts) if stacked else torch.cat(parts)
    assert torch.allclose(fused, together, atol=1e-6)
    assert not torch.allclose(fused, joined, atol=1e-2)


def test_plain_parameters_are_adamws_and_a_large_rank_is_said_once():
    shapes = [(24, 16), (7,), (6, 4)]
    ours, theirs = problems.weights(*shapes), problems.weights(*shapes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        a = GaLoreAdamW([{"params": ours, **problems.KEYS, "rank": 16}], lr=1e-2, weight_decay=0.1)
        problems.train(a, ours, 0, 30)
    assert [("without projection" in str(w.message), w.filename) for w in said] == [(True, __file__)]
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    problems.train(b, theirs, 0, 30)
    assert problems.same(ours, theirs, rtol=1e-6)
    assert all("P" not in a.state[p] and "Q" not in a.state[p] for p in ours)


@pytest.mark.slow
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_foreach_fused_and_single_agree(proj_type):
    runs = []
    for options in ({"foreach": True}, {"foreach": False, "fused": False}, {"fused": True}):
        params = problems.weights((24, 16), (16, 40), (7,), (9,))
        groups = [{"params": params[:2], **problems.KEYS, "proj_type": proj_type}, {"params": params[2:]}]
        problems.train(GaLoreAdamW(groups, lr=1e-2, weight_decay=0.01, **options), params, 0, 45)
        runs.append(params)
    assert problems.same(runs[0], runs[1], rtol=1e-6)
    assert problems.same(runs[0], runs[2], rtol=1e-5)


@pytest.mark.parametrize("foreach", [True, False])
def test_without_bias_correction_it_is_the_equation(foreach):
    """N = M / (√V + ε), for a projected weight and a plain one."""
    params = problems.weights((24, 16), (7,), dtype=torch.float64)
    W, b = (p.detach().clone() for p in params)
    groups = [{"params": params[:1], **problems.KEYS}, {"params": params[1:]}]
    fast = GaLoreAdamW(groups, lr=1e-2, correct_bias=False, refresh=EXACT, foreach=foreach)
    moments = [[0.0, 0.0], [0.0, 0.0]]
    for step in range(10):
        problems.set_grads(params, step)
        G, g = (p.grad.clone() for p in params)
        if step == 0:
            Q = torch.linalg.svd(G)[2][:5]
        for x, (W0, back, rate), m in zip((G @ Q.T, g), ((W, Q, 0.25), (b, None, 1.0)), moments, strict=True):
            m[0], m[1] = 0.9 * m[0] + 0.1 * x, 0.999 * m[1] + 0.001 * x**2
            N = m[0] / (m[1].sqrt() + 1e-8)
            W0 -= 1e-2 * rate * (N if back is None else N @ back)
        fast.step()
    assert torch.allclose(params[0], W, rtol=1e-9, atol=1e-11)
    assert torch.allclose(params[1], b, rtol=1e-9, atol=1e-11)


def test_a_state_from_before_correct_bias_is_read():
    params = problems.weights((24, 16))
    optimizer = GaLoreAdamW([{"params": params, **problems.KEYS}], lr=1e-2)
    problems.train(optimizer, params, 0, 2)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["correct_bias"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["correct_bias"] is True
    problems.train(optimizer, params, 2, 3)


def test_maximize_is_descent_of_the_negative():
    down, up = problems.weights((24, 16), (7,)), problems.weights((24, 16), (7,))
    a = GaLoreAdamW([{"params": down, **problems.KEYS}], lr=1e-2)
    b = GaLoreAdamW([{"params": up, **problems.KEYS}], lr=1e-2, maximize=True)
    for step in range(30):
        problems.set_grads(down, step)
        for p, q in zip(down, up, strict=True):
            q.grad = -p.grad
        a.step()
        b.step()
    assert problems.same(down, up)


def test_closure_runs_with_gradients_on():
    model = problems.mlp()
    optimizer = GaLoreAdamW(problems.mlp_groups(model), lr=1e-2)
    x, y = problems.mlp_batch(0)

    def closure():
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 20, 23], ids=["first step", "refresh", "mid-gap"])
def test_a_bad_gradient_changes_nothing(bad, at):
    params = problems.weights((24, 16), (16, 40), (7,))
    refresh = Refresh(stagger=False)
    optimizer = GaLoreAdamW([{"params": params, **problems.KEYS}], lr=1e-2, refresh=refresh)
    problems.train(optimizer, params, 0, at)
    before = problems.copied(params)
    state = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    problems.set_grads(params, at)
    params[1].grad[3, 4] = bad
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert problems.same(params, before)
    after = optimizer.state_dict()["state"]
    for i, saved in state.items():
        assert all(torch.equal(after[i][k], v) for k, v in saved.items())
    straight = problems.copied(before)
    problems.train(optimizer, params, at, at + 25)  # and training goes on
    assert all(p.isfinite().all() for p in params)
    assert not problems.same(params, straight, rtol=1e-3)


@pytest.mark.parametrize("build", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, GaLoreScaled])
def test_without_a_rank_it_says_that_it_is_plain(build):
    with pytest.warns(UserWarning, match=rf"no parameter group has a rank.* this {build.__name__} is plain"):
        optimizer = build(problems.weights((24, 16), (7,)))
    assert "AdamW" in optimizer.inner or "Adafactor" in optimizer.inner
    with pytest.warns(UserWarning, match="nothing is projected now"):
        build([{"params": problems.weights((24, 16)), "rank": 99}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build([{"params": problems.weights((24, 16)), "rank": 4}, {"params": problems.weights((7,))}])


def steps_over_lr(build, dtype, size, options):
    """The mean absolute change of all weights over lr, at steps 1, 2, 10 and 100, of gradients of about `size`.

    Between steps the weights are put back to 0, where every type has its finest numbers.
    """
    params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in ((48, 32), (96, 80), (40,))]
    optimizer = build([{"params": params[:2], **problems.KEYS, "scale": 1.0}, {"params": params[2:]}], **options)
    draw = torch.Generator().manual_seed(3)
    means = [torch.randn(p.shape, generator=draw) for p in params]
    found = {}
    for step in range(1, 101):
        for p, mean in zip(params, means, strict=True):
            p.grad = (size * (mean + torch.randn(p.shape, generator=draw))).to(dtype)
        optimizer.step()
        if step in (1, 2, 10, 100):
            found[step] = float(torch.cat([p.detach().float().flatten() for p in params]).abs().mean()) / 1e-2
        for p in params:
            p.detach().zero_()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-3, 1e-5])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (GaLoreAdamW, {"lr": 1e-2}),
        (GaLoreAdamW, {"lr": 1e-2, "foreach": True}),
        (GaLoreAdamW, {"lr": 1e-2, "residual": True}),
        (GaLoreAdamW, {"lr": 1e-2, "paper": True}),
        (GaLoreAdamW8bit, {"lr": 1e-2}),
        (GaLoreAdamW8bit, {"lr": 1e-2, "residual": True}),
        (GaLoreAdafactor, {"lr": 1e-2, "relative_step": False, "scale_parameter": False}),
    ],
)
def test_float16_weights_take_float32s_steps(build, options, size, monkeypatch):
    """The square of a small gradient is 0 in float16, and a step by 0 + ε is many times lr."""
    monkeypatch.setattr(adamw8bit, "MIN_8BIT_SIZE", 1)  # small moments in 8 bits too
    half, single = (steps_over_lr(build, dtype, size, options) for dtype in (torch.float16, torch.float32))
    for step, expected in single.items():
        assert 0.01 < expected < 5, single
        assert half[step] == pytest.approx(expected, rel=0.1), (step, half, single)


def test_a_zero_first_gradient_fixes_no_basis():
    [W] = problems.weights((24, 16))
    optimizer = GaLoreAdamW([{"params": [W], **problems.KEYS}], lr=1e-2)
    before = W.detach().clone()
    W.grad = torch.zeros_like(W)
    optimizer.step()
    assert torch.equal(W, before)
    assert optimizer.refresh_due(W)
    problems.train(optimizer, [W], 0, 1)
    Q = optimizer.state[W]["Q"]
    assert torch.allclose(Q @ Q.T, torch.eye(5), atol=1e-5)
    assert not torch.equal(W, before)


def test_bfloat16_weights_keep_bfloat16_states_and_learn(plain_bfloat16):
    params = problems.weights((24, 16), (16, 40), dtype=torch.bfloat16)
    optimizer = GaLoreAdamW([{"params": params, **problems.KEYS}], lr=1e-1)
    distance = sum((p - 0.1).norm() for p in params)
    problems.train(optimizer, params, 0, 60)
    assert sum((p - 0.1).norm() for p in params) < 0.9 * distance
    assert {v.dtype for s in optimizer.state.values() for k, v in s.items() if k in "PQ"} == {torch.bfloat16}


def test_residual_is_firas():
    """One step from the equations: G̃ = PNQ + φ(G − PRQ), φ scaling each row by ‖N‖/‖R‖ there."""
    [W] = problems.weights((24, 16), dtype=torch.float64)
    start = W.detach().clone()
    optimizer = GaLoreAdamW([{"params": [W], **problems.KEYS}], lr=1e-2, residual=True, refresh=EXACT)
    problems.set_grads([W], 0)
    G = W.grad.clone()
    optimizer.step()
    Q = torch.linalg.svd(G)[2][:5]
    R = G @ Q.T
    N = R / (R.abs() + 1e-8)
    rest = (G - R @ Q) * (N.norm(dim=1) / (R.norm(dim=1) + 1e-8)).unsqueeze(1)
    assert torch.allclose(W, start - 1e-2 * 0.25 * (N @ Q + rest), rtol=1e-9, atol=1e-12)
    # the limiter: a thousandfold residual may add 1 %
    last = optimizer.state[W]["residual_norm"].clone()
    problems.set_grads([W], 1)
    W.grad.mul_(1000)
    optimizer.step()
    assert optimizer.state[W]["residual_norm"] <= 1.0101 * last


@pytest.mark.parametrize(("options", "match"), [
    ({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": -1.0}, "eps"),
    ({"weight_decay": -1.0}, "weight_decay"), ({"paper": True, "refresh": Refresh()}, "paper"),
    ({"fused": True, "correct_bias": False}, "correct_bias"),
    ({"paper": True, "residual": True}, "residual"), ({"foreach": True, "fused": True}, "exclude"),
])  # fmt: skip
def test_refused_options(options, match):
    with pytest.raises(ValueError, match=match):
        GaLoreAdamW(problems.weights((8, 8)), **options)


@pytest.mark.parametrize(("keys", "match"), [
    ({"rank": 0}, "rank"), ({"rank": 2.5}, "rank"), ({"update_proj_gap": 0}, "update_proj_gap"),
    ({"scale": 0.0}, "scale"), ({"scale": math.nan}, "scale"), ({"proj_type": "up"}, "proj_type"),
    ({"split": 5}, "split"), ({"rank": None}, "rank"),
])  # fmt: skip
def test_refused_groups(keys, match):
    with pytest.raises(ValueError, match=match):
        GaLoreAdamW([{"params": problems.weights((24, 16)), **problems.KEYS, **keys}])


def test_galore_keys_without_rank_are_refused():
    with pytest.raises(ValueError, match="no rank"):
        GaLoreAdamW([{"params": problems.weights((24, 16)), "scale": 0.25}])


@pytest.mark.parametrize("bad", [{"method": "qr"}, {"iterations": 0}, {"lazy": 0.0}, {"lazy": 1.5}, {"oversample": -1}])
def test_refused_refreshes(bad):
    with pytest.raises(ValueError, match="refresh"):
        Refresh(**bad)
