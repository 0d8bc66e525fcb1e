"""Fewer directions after some steps: what is left is the nearest update of that rank, and is trained on."""

import copy

import pytest
import torch
from lora_xs import LoRAXSConfig, LoRAXSError, add, inject, load_adapter, merge, narrow, param_groups, save_adapter
from lora_xs.layer import layers
from torch import nn


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.words = nn.Embedding(23, 12, dtype=dtype)
        self.first = nn.Linear(12, 17, dtype=dtype)
        self.conv = nn.Conv2d(1, 9, 3, dtype=dtype)
        self.out = nn.Linear(9, 11, dtype=dtype)
        self.last = nn.Linear(11, 4, dtype=dtype)

    def forward(self, x):
        h = self.first(self.words(x))
        return self.last(self.out(self.conv(h[:, None]).relu().mean((2, 3))))


def trained(config, seed=0, dtype=torch.float32, steps=3):
    torch.manual_seed(seed)
    model = inject(Net(dtype), config)
    return model, train(model, steps)


def train(model, steps):
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randint(23, (8, 7), generator=generator)
        loss = nn.functional.cross_entropy(model(x).float(), x[:, 0] % 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


TARGETS = ("words", "first", "conv", "out")


@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize(("alpha", "alpha_pattern"), [(None, {}), (3.0, {}), (3.0, {"first": 7.0})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_left_is_the_nearest_update_of_that_rank(init, alpha, alpha_pattern, dtype):
    config = LoRAXSConfig(4, alpha, TARGETS, init=init, alpha_pattern=alpha_pattern, rank_pattern={"conv": 2})
    model, _ = trained(config, dtype=dtype)
    before = [layer.delta("default") for _, layer in layers(model)]
    scales = [layer.scale("default") for _, layer in layers(model)]
    same = copy.deepcopy([(layer.A, layer.B, layer.R["default"]) for _, layer in layers(model)][2])
    narrow(model, 2)
    assert [layer.scale("default") for _, layer in layers(model)] == pytest.approx(scales, rel=1e-12)
    wide = torch.promote_types(dtype, torch.float32)
    for (_, layer), delta in zip(layers(model), before, strict=True):
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        nearest = (U[:, :2] * S[:2]) @ Vh[:2]
        error = (layer.delta("default").double() - nearest).norm() / nearest.norm()
        assert error < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.02)
        assert (layer.rank, layer.A.dtype, layer.R["default"].dtype) == (2, dtype, wide)
        assert (layer.R["default"].requires_grad, layer.A.requires_grad) == (True, False)
        assert layer.regenerable == (layer.name == "conv")
    assert all(torch.equal(a, b) for a, b in zip(same, layer_parts(model)[2], strict=True))  # its rank was 2


def layer_parts(model):
    return [(layer.A, layer.B, layer.R["default"]) for _, layer in layers(model)]


def test_it_is_trained_on_and_its_file_holds_the_bases(tmp_path):
    model, losses = trained(LoRAXSConfig(6, targets=TARGETS[1:], head=("last",), rank_pattern={"out": 3}))
    narrow(model, 2)
    more = train(model, 12)
    assert more[-1] < losses[0]
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    again = load_adapter(Net(), tmp_path / "adapter")
    x = torch.randint(23, (5, 7))
    assert torch.equal(again.eval()(x), model.eval()(x))
    merged = merge(copy.deepcopy(model), keep=False)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)
    narrow(again, 1)  # once more, of what was loaded
    assert {layer.rank for _, layer in layers(again)} == {1}


def test_stacks_are_narrowed_matrix_by_matrix():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 10, 8))

        def forward(self, x):
            return torch.einsum("bi,noi->bno", x, self.weight)

    model = inject(nn.Sequential(Experts()), LoRAXSConfig(4, targets=("0.weight",)))
    (_, layer), *_ = layers(model)
    with torch.no_grad():
        layer.R["default"].copy_(torch.randn(3, 4, 4))
    before = layer.delta("default")
    narrow(model, 2)
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    nearest = (U[..., :2] * S[..., None, :2]) @ Vh[..., :2, :]
    torch.testing.assert_close(layer.delta("default"), nearest, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_narrowed_is_refused_in_a_sentence_and_left_as_it_was():
    model, _ = trained(LoRAXSConfig(4, targets=TARGETS))
    before = copy.deepcopy(layer_parts(model))
    untrained = inject(Net(), LoRAXSConfig(4, targets=TARGETS))
    two = copy.deepcopy(model)
    add(two, "other")
    merged = merge(copy.deepcopy(model))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        layers(broken)[1][1].R["default"][0, 0] = float("nan")
    for what, rank, said in (
        (model, 4, "below 4"),
        (model, 0, "whole number"),
        (model, True, "whole number"),
        (model, 2.0, "whole number"),
        (untrained, 2, "untrained"),
        (two, 2, "'other' shares the bases"),
        (merged, 2, "call unmerge before narrow"),
        (broken, 2, "R of first is not finite"),
        (Net(), 2, "no LoRA-XS adapters"),
    ):
        with pytest.raises(LoRAXSError, match=said):
            narrow(what, rank)
    assert all(
        torch.equal(a, b) for x, y in zip(before, layer_parts(model), strict=True) for a, b in zip(x, y, strict=True)
    )
