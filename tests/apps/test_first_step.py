"""Adapters that the first step does not reach end a run of finetune, whichever method's they are."""

import pytest
import torch
from memtrain_apps.compose.axes import Axes
from memtrain_apps.compose.compose import compose
from memtrain_apps.compose.first_step import as_errors
from memtrain_common.errors import UserError
from memtrain_common.training.task import Task
from memtrain_common.training.trained_state import copies
from torch import nn


class Attention(nn.Module):
    """``reads`` takes the weight of its q_proj, as some models do, and never calls it."""

    def __init__(self, reads):
        super().__init__()
        self.q_proj, self.v_proj, self.reads = nn.Linear(8, 8), nn.Linear(8, 8), reads

    def forward(self, x):
        q = nn.functional.linear(x, self.q_proj.weight) if self.reads else self.q_proj(x)
        return x + q.tanh() * self.v_proj(x)


class Classifier(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.layers = nn.ModuleList([Attention(reads) for _ in range(6)])
        self.classifier = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def first_steps(train, reads):
    axes = Axes(train=train, rank=2, heads=2)
    task = compose(Task(Classifier(reads), lambda i: None, lambda m, b: m(b).square().mean()), axes, lr=1e-3)
    after_step = task.called_after_steps()
    with as_errors():
        for _ in range(2):
            task.loss(task.model, torch.randn(4, 3, 8)).backward()
            task.optimizer.step()
            task.optimizer.zero_grad()
            after_step()
    return task


@pytest.mark.parametrize("train", ["lora", "melo", "lora-xs", "lte"])
def test_what_the_first_step_did_not_call_ends_the_run(train):
    with pytest.raises(UserError, match=r"layers\.(0|\*)\.q_proj") as caught:
        first_steps(train, reads=True)
    assert "\n" not in str(caught.value)
    assert "v_proj" not in str(caught.value)


@pytest.mark.parametrize("train", ["lora", "melo", "lora-xs", "lte", "bitfit"])
def test_a_model_whose_layers_are_called_trains(train):
    task = first_steps(train, reads=False)
    # of step 0 a run that keeps the best copies what may change: with adapters not the frozen weights
    kept = set(copies(task))
    frozen = {n for n, p in task.model.named_parameters() if not p.requires_grad}
    assert kept == set(task.model.state_dict()) - (frozen if train != "lte" else set())
    assert frozen


@pytest.mark.parametrize("train", ["lora", "melo"])
def test_a_run_none_of_whose_adapters_was_called_ends(train):
    class Reads(Attention):
        def forward(self, x):
            v = nn.functional.linear(x, self.v_proj.weight)
            return x + nn.functional.linear(x, self.q_proj.weight).tanh() * v

    model = Classifier(True)
    model.layers = nn.ModuleList([Reads(True) for _ in range(6)])
    task = compose(Task(model, lambda i: None, lambda m, b: m(b).square().mean()), Axes(train=train, rank=2), lr=1e-3)
    task.loss(task.model, torch.randn(4, 3, 8)).backward()
    with pytest.raises(UserError, match="did not call"):
        task.called_after_steps()()
