"""Parity with the published package, step for step over 60 steps and three bases."""

import warnings

import problems
import pytest
from galore_vit import GaLoreAdafactor, GaLoreAdamW, param_groups
from torch import nn

SHAPES = [(24, 16), (16, 40), (20, 20), (7,)]


def groups(params, **keys):
    return [{"params": params[3:]}, {"params": params[:3], **problems.KEYS, **keys}]


@pytest.fixture(scope="module")
def upstream():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("galore_torch", reason="the published package is not installed")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("rank", [15, 16, 40])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
def test_a_rank_at_or_above_the_smaller_side_equals_upstream(upstream, proj_type, rank, correct_bias):
    """There the published code turns the whole gradient; with one type and wide weights it stops, and we are plain."""
    shapes = [(24, 16), (16, 16), (16, 40)]
    stops = proj_type == "reverse_std" and rank >= 16
    if stops:
        [wide] = problems.weights(shapes[2])
        with pytest.warns(UserWarning, match=r"1 weights \(16×40\) .* the published code stops with an error"):
            plain = GaLoreAdamW([{"params": [wide], **problems.KEYS, "proj_type": proj_type, "rank": rank}], paper=True)
        assert plain.layout(wide) is None
        theirs = upstream.GaLoreAdamW([{"params": [wide], **problems.KEYS, "proj_type": proj_type, "rank": rank}])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            problems.train(theirs, [wide], 0, 1)
    ours, theirs = (problems.weights(*shapes[: 2 if stops else 3]) for _ in range(2))
    keys = {**problems.KEYS, "proj_type": proj_type, "rank": rank}
    options = {"lr": 1e-2, "weight_decay": 0.1, "correct_bias": correct_bias}
    a = GaLoreAdamW([{"params": ours, **keys}], paper=True, **options)
    b = upstream.GaLoreAdamW([{"params": theirs, **keys}], **options)
    for step in range(45):
        problems.train(a, ours, step, step + 1)
        problems.train(b, theirs, step, step + 1)
        assert problems.same(ours, theirs, rtol=1e-6), f"step {step}"


def test_a_rank_above_everything_makes_groups_for_the_paper_alone(upstream):
    """MeLo's factors of rank 8 under GaLore of rank 512, as in the source project."""
    model = nn.Sequential()
    model.blocks = nn.ModuleList([nn.Linear(24, 8, bias=False), nn.Linear(8, 24, bias=False)])
    with pytest.raises(ValueError, match="would project nothing"):
        param_groups(model, 512)
    [group] = param_groups(model, 512, paper=True)
    assert all(layout.rank == 8 for layout in map(GaLoreAdamW([group], paper=True).layout, group["params"]))


@pytest.mark.slow
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
