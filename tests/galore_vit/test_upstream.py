"""Parity with the published package, step for step over 60 steps and three bases."""

import warnings

import problems
import pytest
from galore_vit import GaLoreAdafactor, GaLoreAdamW

SHAPES = [(24, 16), (16, 40), (20, 20), (7,)]


def groups(params, **keys):
    return [{"params": params[3:]}, {"params": params[:3], **problems.KEYS, **keys}]


@pytest.fixture(scope="module")
def upstream():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("galore_torch", reason="the published package is not installed")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
def test_adamw_equals_upstream(upstream, proj_type):
    ours, theirs = problems.weights(*SHAPES), problems.weights(*SHAPES)
    a = GaLoreAdamW(groups(ours, proj_type=proj_type), lr=1e-2, weight_decay=0.1, paper=True)
    b = upstream.GaLoreAdamW(groups(theirs, proj_type=proj_type), lr=1e-2, weight_decay=0.1)
    before = problems.copied(theirs)
    for step in range(60):
        problems.train(a, ours, step, step + 1)
        problems.train(b, theirs, step, step + 1)
        assert problems.same(ours, theirs, rtol=1e-6), f"step {step}"
    assert not problems.same(theirs, before, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "beta1": 0.9, "weight_decay": 0.1}],
)
def test_adafactor_equals_upstream(upstream, options):
    ours, theirs = problems.weights(*SHAPES), problems.weights(*SHAPES)
    a = GaLoreAdafactor(groups(ours), **options, paper=True)
    b = upstream.GaLoreAdafactor(groups(theirs), **options)
    for step in range(60):
        problems.train(a, ours, step, step + 1)
        problems.train(b, theirs, step, step + 1)
        assert problems.same(ours, theirs, rtol=1e-6), f"step {step}"
