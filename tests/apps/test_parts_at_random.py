"""What of a model begins at random is trained whole, whatever a method trains; and running statistics are counted once
where a block's forward pass is run again."""

import copy

import pytest
import torch
from memtrain_apps.compose.axes import Axes
from memtrain_apps.compose.checkpointing import CheckpointBlocks
from memtrain_apps.compose.compose import compose, merged
from memtrain_apps.compose.families import blocks, heads_of
from memtrain_apps.run.config import FinetuneConfig
from memtrain_apps.run.finetune import workload_of
from memtrain_common.models.classifiers import build_classifier
from memtrain_common.training.distributed import World
from torch import nn

WAYS = ("head", "bitfit", "lora", "lora-xs", "lte")


@pytest.fixture(scope="module")
def glue_task(encoder, glue_dir):
    """SST-2 for an encoder whose folder has neither a classifier nor a pooler."""
    config = FinetuneConfig(data="glue:sst2", data_dir=glue_dir, model=encoder, batch_size=8, max_length=16)
    torch.manual_seed(0)
    return workload_of(config, World()).task


@pytest.mark.parametrize("train", WAYS)
def test_a_pooler_that_begins_at_random_is_trained(glue_task, train):
    assert glue_task.fresh == ("classifier", "bert.pooler.dense")
    own = copy.deepcopy(glue_task.model)
    axes = Axes(train, rank=4, heads=2)
    made = compose(
        type(glue_task)(own, glue_task.batches, glue_task.loss, fresh=glue_task.fresh), axes, lr=1e-3, head_lr=2e-3
    )
    optimizer = made.needed_optimizer()
    for i in range(2):
        made.loss(made.model, made.batches(i)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(merged(made.model, axes).named_parameters())
    for name, before in glue_task.model.named_parameters():
        if name.startswith(("bert.pooler.dense.", "classifier.")):
            assert not torch.equal(before, after[name]), name
    if train == "head":  # and nothing else is
        moved = {n for n, p in glue_task.model.named_parameters() if not torch.equal(p, after[n])}
        assert moved == {f"{m}.{x}" for m in glue_task.fresh for x in ("weight", "bias")}
    numbers = {p for group in optimizer.param_groups if group["lr"] == 2e-3 for p in group["params"]}
    assert sum(p.numel() for p in numbers) >= sum(
        p.numel() for n, p in glue_task.model.named_parameters() if n.startswith(("bert.pooler", "classifier"))
    )


def test_what_lies_in_another_part_is_named_once():
    model = nn.Module()
    model.classifier = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert heads_of(model, ("classifier.0", "pooler", "pooler")) == ("classifier", "pooler")


def test_a_pooler_of_pictures_that_begins_at_random_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        vocab_size=7,
    )  # fmt: skip
    transformers.BeitForMaskedImageModeling(config).save_pretrained(tmp_path / "beit")
    found = build_classifier(str(tmp_path / "beit"), 3, image_size=16)
    assert found.fresh == ("beit.pooler.layernorm",)
    assert heads_of(found.model, found.fresh) == ("classifier", "beit.pooler.layernorm")


def network():
    torch.manual_seed(0)

    def block():
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    layers = nn.Sequential(block(), block(), nn.Sequential(norm, nn.BatchNorm2d(4, momentum=None)))
    model = nn.Module()
    model.layers = layers
    model.forward = lambda x: layers(x).mean((2, 3))
    return model


@pytest.mark.parametrize("passes", [1, 2])
def test_running_statistics_are_counted_once(passes):
    """Two passes before the backward one, as of two crops of a picture."""
    plain, again = network(), network()
    found = []
    for model in (plain, again):
        context = CheckpointBlocks(blocks(model).values() if model is again else ())
        x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            with context:
                loss = sum(model.forward(x + i).square().sum() for i in range(passes))
            loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()], dict(model.named_buffers())))
    (loss, grads, buffers), (loss_again, grads_again, buffers_again) = found
    assert loss == loss_again
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert buffers.keys() == buffers_again.keys()
    assert all(torch.equal(value, buffers_again[name]) for name, value in buffers.items())
    assert buffers["layers.0.1.num_batches_tracked"] == 3 * passes


def test_a_graph_that_is_kept_is_run_backward_twice():
    model = network()
    with CheckpointBlocks(blocks(model).values()):
        loss = model.forward(torch.randn(3, 4, 5, 5)).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    assert model.layers[0][1].num_batches_tracked == 1


def test_full_training_at_one_rate_has_the_groups_of_before(glue_task):
    """So that runs of before, which knew no part but the head, go on."""
    own = copy.deepcopy(glue_task.model)
    task = type(glue_task)(own, glue_task.batches, glue_task.loss, fresh=glue_task.fresh)
    groups = compose(task, Axes("full"), lr=1e-3).needed_optimizer().param_groups
    of_head = [g for g in groups if any(p is own.classifier.weight for p in g["params"])]
    assert [len(g["params"]) for g in of_head] == [1]
