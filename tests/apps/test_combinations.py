"""All 7 × 4 × 7 combinations: each one trains, changes what it should and nothing else, and resumes to the bit; or it
is refused in one sentence. None is skipped."""

import copy
import shutil

import lora_xs
import pytest
import torch
from memtrain_apps.compose.axes import Axes, combinations, refusal
from memtrain_apps.compose.compose import compose
from memtrain_apps.compose.families import head_name, matrices
from memtrain_common.errors import UserError
from memtrain_common.models.vit import _vit
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.loop import FitConfig, Task, fit
from memtrain_common.training.rng import seed_all
from support import newest_checkpoint
from torch import nn

STEPS = 6  # with a merge and a refresh of GaLore in either half
REFUSED_ON_THE_CPU = {"offload"}
ADAM8 = ("full",)  # the only choice whose matrices are large enough here


def tiny_vit(blocks):
    return _vit(width=64, blocks=blocks, heads=2, mlp=96, image=8, patch=4, classes=4)


def batch(i):
    """Four patterns that a linear layer can tell apart, with noise; the same for the same number."""
    generator = torch.Generator().manual_seed(i)
    labels = torch.arange(16) % 4
    pixels = 0.3 * torch.randn(16, 3, 8, 8, generator=generator)
    pixels[torch.arange(16), labels % 3, labels * 2] += 2.0
    return pixels, labels


def loss(model, data):
    return nn.functional.cross_entropy(model(data[0]).logits, data[1])


def settings(axes):
    rank, galore = (8, 4) if axes.train != "full" else (8, 8)
    return Axes(
        axes.train, axes.save, axes.optim, rank=rank, galore_rank=galore, merge_steps=2, heads=4, keep=0.3, gap=2
    )


def rate(axes):
    adam = {"full": 2e-3, "head": 2e-2, "bitfit": 1e-2, "lora": 1e-2, "melo": 1e-2, "lora-xs": 3e-2, "lte": 5e-3}
    return 5e-2 if axes.optim == "sgd" else adam[axes.train]


def train(plain, axes, folder, resume=False):
    """A run of ``STEPS`` with checkpoints of its middle and its end, or the second half of it again."""
    seed_all(0)
    composed = compose(Task(copy.deepcopy(plain), batch, loss), settings(axes), lr=rate(axes))
    run = RunFolder.open(folder) if resume else RunFolder.create(folder)
    if not resume:
        run.write_config(settings(axes), prog="test", argv=[])
    before = {n: p.detach().clone() for n, p in composed.model.named_parameters()}
    seed_all(1)
    fit(
        composed,
        FitConfig(max_iters=STEPS, log_interval=1, grad_clip=1.0, checkpoint_interval=STEPS // 2),
        run=run,
        resume=resume,
    )
    losses = [row["loss"] for row in run.metrics() if row["split"] == "train"]
    return composed, before, losses


def intended(train, name, head):
    """Whether a choice of ``train`` may change the parameter."""
    if train == "full" or name.split(".")[0] == head or f".{head}." in name:
        return True
    return {
        "head": False,
        "bitfit": name.endswith("bias"),
        "lora": ".lora_" in name,
        "melo": ".lora_" in name and (".q_proj." in name or ".v_proj." in name),
        "lora-xs": ".lora_xs." in name,
        "lte": ".lora_" in name or ".merged_" in name,
    }[train]


@pytest.fixture(scope="module")
def plains():
    """A model of one block, and one of two: what is checkpointed are blocks among others."""
    torch.manual_seed(0)
    return {blocks: tiny_vit(blocks) for blocks in (1, 2)}


def the_same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(the_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(the_same, a, b))
    if hasattr(a, "dequantize") and hasattr(a, "codes"):
        return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_lora_xs_takes_bases_from_the_first_batches(plains):
    """Those that the library makes of the same losses, whatever batches follow."""
    model, axes = copy.deepcopy(plains[1]), Axes("lora-xs", rank=4, init="gradient", init_batches=2, first_step=1e-3)
    composed = compose(Task(model, batch, loss), axes, lr=1e-3)
    own = copy.deepcopy(plains[1])
    config = lora_xs.LoRAXSConfig(
        4, targets=tuple(matrices(own, "all")), init="gradient", first_step=1e-3, head=("classifier",)
    )
    lora_xs.inject(own, config, losses=lambda: [loss(own, batch(0)), loss(own, batch(1))])
    assert all(map(torch.equal, composed.model.state_dict().values(), own.state_dict().values()))
    assert composed.model.state_dict().keys() == own.state_dict().keys()


def test_lte_trains_the_rest_of_a_model_with_a_head_only_where_asked(plains):
    def trained(rest):
        made = compose(Task(copy.deepcopy(plains[1]), batch, loss), Axes("lte", rank=4, lte_rest=rest), lr=1e-3)
        return {n for n, p in made.model.named_parameters() if p.requires_grad}

    frozen = trained("frozen")
    assert frozen == trained("auto")
    assert all(".lora_" in n or n.startswith("classifier.") for n in frozen)
    assert {n.partition(".")[0] for n in frozen} == {"vit", "classifier"}
    more = trained("trained") - frozen
    assert trained("trained") >= frozen
    assert any("position" in n for n in more)
    assert any("norm" in n for n in more)
    assert all("norm" in n or n.endswith("bias") or "embeddings" in n for n in more)


@pytest.mark.slow
@pytest.mark.parametrize("axes", list(combinations()), ids=lambda axes: axes.name)
def test_every_combination_trains_or_is_refused(axes, plains, tmp_path):
    plain = plains[2 if axes.save == "checkpoint" else 1]
    why = refusal(settings(axes))
    if why is None and axes.save in REFUSED_ON_THE_CPU:
        why = "the CPU"
    if why is None and axes.optim == "adamw8bit" and axes.train not in ADAM8:
        why = "8 bits"
    if why is not None:
        with pytest.raises(UserError) as error:
            compose(Task(copy.deepcopy(plain), batch, loss), settings(axes), lr=1e-3)
        assert axes.save in str(error.value) or axes.optim in str(error.value)
        assert "choose" in str(error.value)
        assert "\n" not in str(error.value)
        return

    whole, before, losses = train(plain, axes, tmp_path / "run")
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
    head = head_name(plain)
    changed = {n for n, p in whole.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    merges = {n for n in changed if axes.train == "lte" and n.endswith("weight") and not intended("lte", n, head)}
    for name in merges:  # LTE's merges go into the weights of layers with heads
        assert whole.model.get_parameter(name.replace("weight", "lora_A")) is not None
    assert all(intended(axes.train, n, head) for n in changed - merges), changed
    trained = {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert changed - merges == trained

    shutil.rmtree(newest_checkpoint(tmp_path / "run"))
    parts, _, again = train(plain, axes, tmp_path / "run", resume=True)
    assert again == losses
    assert the_same(dict(parts.model.state_dict()), dict(whole.model.state_dict()))
    assert the_same(parts.optimizer.state_dict(), whole.optimizer.state_dict())
