"""Bytes of state equal the formula, without allocating a model."""

import problems
import pytest
import torch
from galore_vit import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreScaled, param_groups, state_bytes
from galore_vit.state_size import adamw_state_bytes_formula
from torch._subclasses.fake_tensor import FakeTensorMode

VITS = {"Ti": (192, 3, 12), "S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24), "H": (1280, 16, 32)}


def vit(name):
    transformers = pytest.importorskip("transformers")
    width, heads, depth = VITS[name]
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
        patch_size=14 if name == "H" else 16, num_labels=1000,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.ViTForImageClassification(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", VITS)
def test_vit_states_equal_the_formula(name):
    model = vit(name)
    adam = 8 * sum(p.numel() for p in model.parameters())
    for rank in (16, 64, 128):
        optimizer = GaLoreAdamW(param_groups(model, rank))
        optimizer.init_state()
        found = state_bytes(optimizer)
        expected = 0
        for n, p in model.named_parameters():  # mr + 2nr with m ≤ n, apart from the library's own formula
            if p.ndim == 2 and any(f".{i}." in n for i in range(40)):
                m, n_ = sorted(p.shape)
                expected += 4 * (m * rank + 2 * n_ * rank)
            else:
                expected += 8 * p.numel()
        assert found == expected == adamw_state_bytes_formula(param_groups(model, rank))
        if (name, rank) == ("B", 64):
            assert found <= adam / 8


def test_the_formula_is_what_training_allocates():
    for proj_type in ("std", "reverse_std", "full"):
        params = problems.weights((24, 16), (16, 40), (8, 3, 2, 2), (60, 16), (7,))
        groups = [
            {"params": params[3:4], **problems.KEYS, "proj_type": proj_type, "split": 3},
            {"params": [*params[:3], params[4]], **problems.KEYS, "proj_type": proj_type},
        ]
        optimizer = GaLoreAdamW(groups)
        problems.train(optimizer, params, 0, 3)
        assert state_bytes(optimizer) == adamw_state_bytes_formula(groups)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, GaLoreScaled])
def test_a_step_can_be_predicted_with_fake_tensors(kind):
    """Memory is predicted by running a step on tensors that have shapes alone."""
    with FakeTensorMode():
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64))
        optimizer = kind(param_groups(model, 8))
        for _ in range(2):
            model(torch.randn(4, 64)).sum().backward()
            optimizer.step()
        predicted = state_bytes(optimizer)
    real = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64))
    optimizer = kind(param_groups(real, 8))
    real(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    assert predicted == state_bytes(optimizer)
