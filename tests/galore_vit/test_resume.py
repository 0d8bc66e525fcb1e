"""A run that was saved and loaded gives the same bits as one that never stopped."""

import copy
import io

import problems
import pytest
import torch
from galore_vit import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreScaled, Refresh

SHAPES = [(24, 16), (16, 40), (96, 80), (7,)]
BUILDERS = {
    "adamw": lambda g: GaLoreAdamW(g, lr=1e-2),
    "adamw lazy residual": lambda g: GaLoreAdamW(g, lr=1e-2, refresh=Refresh(lazy=0.5), residual=True),
    "adamw svd paper": lambda g: GaLoreAdamW(g, lr=1e-2, paper=True),
    "adamw8bit": lambda g: GaLoreAdamW8bit(g, lr=1e-2),
    "adamw8bit decayed": lambda g: GaLoreAdamW8bit(g, lr=1e-2, refresh=Refresh(decay=0.5)),
    "scaled": lambda g: GaLoreScaled(g, lr=1e-2, scaling="tensor"),
    "scaled by the gradient": lambda g: GaLoreScaled(g, lr=1e-2, scaling="tensor", refresh=Refresh(lazy=0.5)),
    "adafactor": lambda g: GaLoreAdafactor(g, beta1=0.9),
}


def build(name, params, **keys):
    return BUILDERS[name]([{"params": params[3:]}, {"params": params[:3], **problems.KEYS, **keys}])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("stop", [7, 20, 33])
def test_resume_is_exact(name, proj_type, stop):
    straight = problems.weights(*SHAPES)
    problems.train(build(name, straight, proj_type=proj_type), straight, 0, 50)
    halves = problems.weights(*SHAPES)
    first = build(name, halves, proj_type=proj_type)
    problems.train(first, halves, 0, stop)
    again = problems.copied(halves)
    second = build(name, again, proj_type=proj_type)
    second.load_state_dict(through_a_file(first.state_dict()))
    problems.train(second, again, stop, 50)
    assert problems.same(straight, again)


def test_loaded_state_is_not_shared():
    params = problems.weights(*SHAPES)
    first = build("adamw", params)
    problems.train(first, params, 0, 5)
    saved = first.state_dict()
    kept = saved["state"][1]["Q"].clone()
    others = problems.copied(params)
    second = build("adamw", others)
    second.load_state_dict(saved)
    problems.train(second, others, 5, 45)
    assert torch.equal(saved["state"][1]["Q"], kept)


def test_state_is_cast_with_the_weights(plain_bfloat16):
    params = problems.weights(*SHAPES)
    first = build("adamw8bit", params)
    problems.train(first, params, 0, 5)
    half = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    second = build("adamw8bit", half)
    second.load_state_dict(first.state_dict())
    big = second.state[half[2]]
    assert big["Q"].dtype == torch.bfloat16
    problems.train(second, half, 5, 8)  # and the dtypes meet in no product


def test_codes_survive_loading():
    params = problems.weights((400, 80))
    first = GaLoreAdamW8bit([{"params": params, **problems.KEYS, "rank": 16}], lr=1e-2)
    problems.train(first, params, 0, 5)
    second = GaLoreAdamW8bit([{"params": problems.copied(params), **problems.KEYS, "rank": 16}], lr=1e-2)
    second.load_state_dict(through_a_file(first.state_dict()))
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert a["exp_avg_codes"].dtype == torch.uint8
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_state_of_another_optimizer_is_refused():
    params = problems.weights(*SHAPES)
    adam = torch.optim.AdamW([{"params": params[3:]}, {"params": params[:3]}])
    problems.train(adam, params, 0, 1)
    with pytest.raises(ValueError, match="another optimizer"):
        build("adamw", params).load_state_dict(adam.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_a_state_is_loaded_again_and_again(name):
    """torch adds a key to an optimizer's defaults at its first load; what a state must hold stays the same."""
    straight, loaded = problems.weights(*SHAPES), problems.weights(*SHAPES)
    one, two = build(name, straight), build(name, loaded)
    untouched = through_a_file(two.state_dict())
    for step in range(4):
        two.load_state_dict(untouched if step == 0 else through_a_file(two.state_dict()))
        problems.train(one, straight, step, step + 1)
        problems.train(two, loaded, step, step + 1)
    two.load_state_dict(untouched)  # an older state, which lacks what torch has added since
    assert problems.same(straight, loaded)
    assert not two.state_dict()["state"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_a_copied_optimizer_goes_on_alone(name):
    params = problems.weights(*SHAPES)
    optimizer = build(name, params)
    problems.train(optimizer, params, 0, 3)
    twin, theirs = copy.deepcopy((optimizer, params))
    assert twin.skipped_steps == 0
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    problems.train(optimizer, params, 3, 25)
    problems.train(twin, theirs, 3, 25)
    assert problems.same(params, theirs)
