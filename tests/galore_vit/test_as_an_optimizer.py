"""A GaLore optimizer where others handle it as any optimizer: parameters replaced, hooks, defaults of torch, refusals
after which it is as it was."""

import copy
import math
import warnings

import problems
import pytest
import torch
from galore_vit import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreScaled,
    InBackward,
    Refresh,
    param_groups,
    projected_all_reduce,
    state_bytes,
)
from galore_vit.melo import MeLo
from galore_vit.metrics import auc, calibration_error
from torch import nn

ALL = (GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, GaLoreScaled)


def build(kind, params, **settings):
    if kind is GaLoreAdafactor:
        settings |= {"relative_step": False, "lr": settings.get("lr", 1e-2)}
    return kind([{"params": params, "rank": 4, "update_proj_gap": 3}], **settings)


@pytest.mark.parametrize("kind", ALL)
def test_parameters_that_are_replaced_in_the_groups_are_trained(kind):
    """accelerate does so for FSDP2: it shards the model, and puts the new parameters in the old ones' places."""
    old, twins = problems.weights((16, 12), (7,)), problems.weights((16, 12), (7,))
    optimizer, other = build(kind, old), build(kind, twins)
    new = [nn.Parameter(p.detach().clone()) for p in old]
    optimizer.param_groups[0]["params"] = new
    problems.train(optimizer, new, 0, 5)
    problems.train(other, twins, 0, 5)
    assert problems.same(new, twins)
    assert problems.same(old, problems.weights((16, 12), (7,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_counters_count_whatever_torchs_default_dtype(dtype):
    before = torch.get_default_dtype()
    weight = problems.weights((8, 8))
    try:
        torch.set_default_dtype(dtype)
        optimizer = build(GaLoreAdamW, weight)
        weight[0].grad = torch.zeros_like(weight[0])
        for _ in range(300):
            optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert optimizer.state[weight[0]]["step"] == 300
    assert optimizer.state[weight[0]]["step"].dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "shapes"),
    [
        (lambda p: build(GaLoreAdamW8bit, p, lr=5.0), [(64, 128), (5000,)]),
        (lambda p: build(GaLoreAdamW, p, lr=5.0), [(64, 96), (5000,)]),
        (lambda p: build(GaLoreScaled, p, lr=5.0), [(64, 128), (5000,)]),
    ],
)
def test_a_refused_state_changes_nothing(other, shapes):
    own, theirs = problems.weights((64, 128), (5000,)), problems.weights(*shapes)
    optimizer, foreign = build(GaLoreAdamW, own, lr=1e-3), other(theirs)
    problems.train(optimizer, own, 0, 2)
    problems.train(foreign, theirs, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"another optimizer|random bases"):
        optimizer.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for i, state in before["state"].items():
        assert all(torch.equal(value, after["state"][i][key]) for key, value in state.items())
    problems.train(optimizer, own, 2, 5)


def test_load_hooks_of_others_are_heard():
    weights = problems.weights((16, 12))
    optimizer = build(GaLoreAdamW, weights)
    problems.train(optimizer, weights, 0, 2)
    saved = optimizer.state_dict()

    def without_first_moment(_, given):
        changed = copy.deepcopy(given)
        changed["state"][0]["exp_avg"].zero_()
        return changed

    fresh = build(GaLoreAdamW, problems.weights((16, 12)))
    handle = fresh.register_load_state_dict_pre_hook(without_first_moment)
    fresh.load_state_dict(saved)
    (state,) = fresh.state.values()
    assert not state["exp_avg"].any()
    assert state["exp_avg_sq"].any()
    handle.remove()
    double = build(GaLoreAdamW, problems.weights((16, 12), dtype=torch.float64))
    double.register_load_state_dict_post_hook(lambda o: [s["exp_avg"].zero_() for s in o.state.values()] and None)
    double.load_state_dict(saved)
    (state,) = double.state.values()
    assert not state["exp_avg"].any()
    assert saved["state"][0]["exp_avg"].any()


def test_adafactor_keeps_doubles():
    (weight,) = problems.weights((8, 8), dtype=torch.float64)
    before = weight.detach().clone()
    optimizer = build(GaLoreAdafactor, [weight], lr=0.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def test_step_hooks_are_called_inside_the_backward_pass_too():
    model, calls = problems.mlp(), []
    optimizer = GaLoreAdamW(problems.mlp_groups(model))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    in_backward = InBackward(optimizer)
    problems.backward(model, 0)
    in_backward.step()
    assert calls == ["before", "after"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x, which):
        for i in which:
            x = self.parts[i](x)
        return x


@pytest.mark.parametrize("first", [(0,), (0, 1)])
def test_a_layer_may_be_left_out_of_a_micro_batch(first):
    torch.manual_seed(0)
    model = Experts()
    twin = copy.deepcopy(model)
    plain, inner = (build(GaLoreAdamW, list(m.parameters())) for m in (twin, model))
    in_backward = InBackward(inner, micro_batches=2)
    for step in range(4):
        x = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(step))
        which = (first, (0, 1)) if step else ((0, 1), (0, 1))  # bases are found from the first of them
        for m in (model, twin):
            for part, layers in zip(x, which, strict=True):
                m(part, layers).square().mean().div(2).backward()
        if step == 0:  # from the same micro-batch
            plain.zero_grad()
            in_backward.zero_grad()
            continue
        in_backward.step()
        in_backward.zero_grad()
        plain.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    model(x[0], (1,)).sum().backward()
    with pytest.raises(RuntimeError, match="1 backward passes"):
        in_backward.step()


def test_over_several_processes_every_weight_is_in_every_micro_batch(tmp_path):
    """Their sums would not belong together: refused as soon as what is held is asked for."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = Experts()
        inner = build(GaLoreAdamW, list(model.parameters()))
        in_backward = InBackward(inner, micro_batches=2, process_group=torch.distributed.group.WORLD)
        for which in ((0,), (0, 1)):
            model(torch.randn(20, 12), which).square().mean().backward()
        with pytest.raises(RuntimeError, match="1 backward passes"):
            list(in_backward.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_first_micro_batch_without_a_gradient_gives_no_basis_and_the_second_does():
    (weight,) = problems.weights((16, 12))
    in_backward = InBackward(build(GaLoreAdamW, [weight]), micro_batches=2)
    before = weight.detach().clone()
    (weight * 0).sum().backward()
    weight.square().sum().backward()
    in_backward.step()
    assert not torch.equal(weight, before)


def test_a_refused_group_is_not_left_behind():
    a, b = problems.weights((8, 8), (12, 12))
    optimizer = build(GaLoreAdamW, [a])
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": [b], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b], "rank": 4})
    before = b.detach().clone()
    b.grad = torch.randn_like(b)
    optimizer.step()
    assert not torch.equal(b, before)


def test_a_group_that_is_added_later_says_what_is_too_small():
    optimizer = build(GaLoreAdamW, problems.weights((8, 8)))
    with pytest.warns(UserWarning, match="6×6"):
        optimizer.add_param_group({"params": problems.weights((6, 6)), "rank": 6})


def test_a_groups_own_refresh():
    own = {"params": problems.weights((8, 8)), "rank": 4, "refresh": Refresh(method="svd")}
    optimizer = GaLoreAdamW([own])
    assert optimizer.param_groups[0]["refresh"]["method"] == "svd"
    problems.train(optimizer, own["params"], 0, 2)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda w, m: build(GaLoreAdamW, w, refresh="svd"), ValueError, "refresh must be a Refresh"),
        (lambda w, m: GaLoreAdamW([{"params": w, "rank": 4, "refresh": "svd"}]), ValueError, "refresh must be"),
        (
            lambda w, m: GaLoreAdamW([{"params": w, "rank": 4, "refresh": Refresh(method="random")}]),
            ValueError,
            "random bases",
        ),
        (lambda w, m: Refresh(iterations=1.5), ValueError, "whole numbers"),
        (lambda w, m: build(GaLoreAdamW, w, lr="1e-3"), ValueError, "lr must be a finite number"),
        (lambda w, m: build(GaLoreAdamW, w, weight_decay=None), ValueError, "weight_decay must be a number"),
        (lambda w, m: build(GaLoreAdamW, w, lr=math.inf), ValueError, "lr must be a finite number"),
        (lambda w, m: build(GaLoreAdamW, w, weight_decay=math.inf), ValueError, "weight_decay must be finite"),
        (lambda w, m: build(GaLoreAdamW, w, betas=(0.9,)), ValueError, "betas must be two numbers"),
        (lambda w, m: build(GaLoreScaled, w, growth_limit="1.1"), ValueError, "growth_limit must be a number"),
        (lambda w, m: build(GaLoreAdafactor, w, decay_rate=None), ValueError, "decay_rate one below 0"),
        (lambda w, m: build(GaLoreAdafactor, w, clip_threshold="x"), ValueError, "clip_threshold must be a number"),
        (lambda w, m: build(GaLoreAdafactor, w, beta1="x"), ValueError, "beta1 must lie"),
        (lambda w, m: MeLo(alpha="4"), ValueError, "alpha must be a finite number"),
        (lambda w, m: GaLoreAdamW([{"params": w, "rank": 4, "gap": 9}]), ValueError, "which is update_proj_gap"),
        (lambda w, m: GaLoreScaled([{"params": w, "rank": 4, "proj": "svd"}]), ValueError, "which is refresh="),
        (lambda w, m: build(GaLoreAdamW, w, betas=0.9), ValueError, "betas must be two numbers"),
        (lambda w, m: build(GaLoreAdafactor, w, eps=1e-8), ValueError, "eps must be two numbers"),
        (lambda w, m: build(GaLoreAdafactor, w, eps=(0.0, 1e-3)), ValueError, "the first above 0"),
        (lambda w, m: InBackward(torch.optim.AdamW(w)), TypeError, "feeds a GaLore optimizer, not AdamW"),
        (lambda w, m: InBackward(build(GaLoreAdamW, w), 2.5), ValueError, "micro_batches must be a whole number"),
        (lambda w, m: projected_all_reduce(torch.optim.AdamW(w)), TypeError, "is for a GaLore optimizer"),
        (lambda w, m: projected_all_reduce(build(GaLoreAdamW, w)), RuntimeError, "init_process_group first"),
        (lambda w, m: param_groups(m, 4, targets="("), ValueError, "targets is no regular expression"),
        (lambda w, m: param_groups(m.parameters(), 4), TypeError, "takes the model"),
        (lambda w, m: auc([0.0, float("nan")], [0.1, 0.2], "binary-class"), ValueError, "a label is NaN"),
        (lambda w, m: calibration_error([0, 1], [0.1, 0.2], "binary-class", 0), ValueError, "bins must be"),
    ],
)
def test_refused_in_a_sentence(call, error, said):
    with pytest.raises(error, match=said):
        call(problems.weights((8, 8)), problems.mlp())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("key", "value"), [("rank", 5), ("proj_type", "left")])
def test_what_decides_the_states_shapes_cannot_be_changed(kind, key, value):
    weights = problems.weights((16, 12), (7,))
    optimizer = build(kind, weights)
    problems.train(optimizer, weights, 0, 2)
    optimizer.param_groups[0]["lr"] = 1e-3
    old, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
    before = [w.detach().clone() for w in weights]
    for use in (lambda: problems.train(optimizer, weights, 2, 3), optimizer.state_dict):
        with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{key}'\] was changed from {old} to {value}"):
            use()
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    optimizer.param_groups[0][key] = old
    problems.train(optimizer, weights, 2, 3)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", ALL)
def test_steps_do_not_depend_on_torchs_defaults(kind):
    one, two = problems.weights((16, 12), (7,)), problems.weights((16, 12), (7,))
    optimizers = build(kind, one), build(kind, two)
    for step in range(5):
        problems.set_grads(one, step)
        problems.set_grads(two, step)
        optimizers[0].step()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):  # what is drawn without a device would be lost there
                optimizers[1].step()
        finally:
            torch.set_default_dtype(torch.float32)
    assert problems.same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_a_compiled_step_is_the_step(kind, whole):
    """Traced, its counters would hold no numbers: every basis would be taken for due, or none."""
    torch._dynamo.reset()
    ours, twins = (problems.weights((48, 64), (20, 12), (7,)) for _ in range(2))
    optimizer, plain = build(kind, ours), build(kind, twins)

    def around():
        for p in ours:
            p.grad.mul_(1.0)
        optimizer.step()

    compiled = torch.compile(around if whole else optimizer.step, backend="eager")
    for step in range(7):
        problems.set_grads(ours, step)
        compiled()
    problems.train(plain, twins, 0, 7)
    assert problems.same(ours, twins)


def test_a_compiled_step_of_what_the_backward_pass_took_is_the_step():
    torch._dynamo.reset()
    models = problems.mlp(), problems.mlp()
    one, two = (InBackward(GaLoreAdamW(problems.mlp_groups(m, update_proj_gap=2))) for m in models)
    compiled = torch.compile(one.step, backend="eager")
    for step in range(5):
        for model in models:
            problems.backward(model, step)
        compiled(), two.step()
        one.zero_grad(), two.zero_grad()
    assert problems.same(*models)


@pytest.mark.parametrize("kind", ALL)
def test_a_rate_in_a_tensor_is_that_rate(kind):
    """As torch.optim takes it: schedulers, and whoever holds the tensor, change it in place."""
    ours, twins = (problems.weights((48, 64), (20, 12), (7,)) for _ in range(2))
    lr = torch.tensor(2**-6)
    optimizer, plain = build(kind, ours, lr=lr, weight_decay=0.1), build(kind, twins, lr=2**-6, weight_decay=0.1)
    problems.train(optimizer, ours, 0, 3)
    problems.train(plain, twins, 0, 3)
    lr.fill_(2**-7)
    plain.param_groups[0]["lr"] = 2**-7
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    problems.train(optimizer, ours, 3, 6)
    problems.train(plain, twins, 3, 6)
    assert problems.same(ours, twins)
    optimizer.load_state_dict(optimizer.state_dict())
    for wrong in (torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor([0.1]), torch.tensor(True)):
        with pytest.raises(ValueError, match="lr must be a finite number of at least 0, or a tensor of one"):
            build(kind, ours, lr=wrong)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rnak", "rank"),
        ("ranks", "rank"),
        ("Sclae", "scale"),
        ("update_proj_gpa", "update_proj_gap"),
        ("dmi", "dim"),
        ("proj_typ", "proj_type"),
        ("weightdecay", "weight_decay"),
        ("refersh", "refresh"),
        ("rl", "lr"),
    ],
)
def test_a_misspelt_key_of_a_group_is_warned_of_by_the_one_that_is_meant(kind, wrong, right):
    one, two, three = problems.weights((8, 8), (12, 12), (9, 9))
    lr = {"relative_step": False, "lr": 1e-2} if kind is GaLoreAdafactor else {}
    groups = [{"params": [one], wrong: 4}, {"params": [two], "rank": 4}]
    with pytest.warns(
        UserWarning, match=f"a parameter group has '{wrong}', which nothing reads.* mean '{right}'"
    ) as said:
        optimizer = kind(groups, **lr)
    assert [w.filename for w in said] == [__file__]
    optimizer = copy.deepcopy(optimizer)
    with pytest.warns(UserWarning, match=f"mean '{right}'") as said:
        optimizer.add_param_group({"params": [three], wrong: 4})
    assert [w.filename for w in said] == [__file__]


@pytest.mark.parametrize("kind", ALL)
def test_keys_of_others_are_let_be(kind):
    """torch.optim takes them; timm's, schedulers' and other optimizers' keys are like none of ours."""
    keys = ("lr_scale", "initial_lr", "max_lr", "min_lr", "swa_lr", "param_names", "name", "amsgrad", "capturable")
    keys += (
        "differentiable",
        "decoupled_weight_decay",
        "momentum",
        "max_momentum",
        "base_momentum",
        "nesterov",
        "steps",
    )
    (weight,) = problems.weights((8, 8))
    settings = {"relative_step": False, "lr": 1e-2} if kind is GaLoreAdafactor else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind([{"params": [weight], "rank": 4, **dict.fromkeys(keys, 1)}], **settings)


def test_bytes_of_an_optimizer_that_keeps_numbers_and_lists():
    weights = problems.weights((8, 8))
    optimizer = torch.optim.LBFGS(weights)
    optimizer.step(lambda: (optimizer.zero_grad(), (loss := weights[0].square().sum()).backward(), loss)[2])
    assert state_bytes(optimizer) > 0
