"""A model changed after `inject`: rounded, moved, loaded anew; and weights that are computed from others."""

import copy
from collections import OrderedDict

import pytest
import torch
from lora_xs import LoRAXSConfig, LoRAXSError, describe_adapter, inject, load_adapter, param_groups, save_adapter
from lora_xs.layer import layers
from torch import nn

TARGETS = ("embed", "conv", "up", "down")
CONFIG = LoRAXSConfig(rank=3, targets=TARGETS)


@pytest.mark.parametrize("change", ["bfloat16", "float16", "half", "bfloat16()"])
def test_r_stays_in_float32_and_learns(mixed, inputs, change):
    model = inject(mixed, CONFIG)
    before = [p.detach().clone() for p in param_groups(model)[0]["params"]]
    if change.endswith("()") or change == "half":
        model = getattr(model, change.removesuffix("()"))()
    else:
        model = model.to(getattr(torch, change))
    Rs = param_groups(model)[0]["params"]
    assert [p.dtype for p in Rs] == [torch.float32] * 4
    assert all(torch.equal(p, b) for p, b in zip(Rs, before, strict=True))  # not rounded on the way either
    assert model.down.lora_xs.A.dtype == model.down.weight.dtype
    optimizer = torch.optim.SGD(Rs, lr=1e-6)
    model(inputs[0], inputs[1].to(model.conv.weight.dtype)).float().pow(2).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(Rs, before, strict=True))


def test_to_float64_and_meta_as_ever(mixed):
    model = inject(mixed, CONFIG).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("back", [False, True])
def test_an_adapter_loads_onto_the_base_that_it_was_saved_from(train_r, tmp_path, back):
    """Weights without a gap in their spectrum: rounding them turns their bases."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 96))
    model = train_r(inject(copy.deepcopy(base), LoRAXSConfig(8))).to(torch.bfloat16)
    base.to(torch.bfloat16)
    if back:
        model.float(), base.float()
    save_adapter(model, tmp_path)
    assert describe_adapter(tmp_path).stored_bases
    x = torch.randn(4, 96, dtype=model[0].weight.dtype)
    assert torch.equal(load_adapter(base, tmp_path)(x), model(x))


def test_weights_loaded_after_inject_are_noticed(mixed, inputs, train_r, tmp_path):
    model, other = inject(copy.deepcopy(mixed), CONFIG), type(mixed)()
    state = {**model.state_dict(), **other.state_dict()}
    model.load_state_dict(state)
    train_r(model)
    save_adapter(model, tmp_path)
    assert describe_adapter(tmp_path).stored_bases
    torch.testing.assert_close(load_adapter(other, tmp_path)(*inputs), model(*inputs))


def test_unchanged_weights_store_no_bases(mixed, tmp_path):
    save_adapter(inject(mixed.to(torch.bfloat16), CONFIG), tmp_path)
    assert not describe_adapter(tmp_path).stored_bases


def computed():
    yield "weight_norm", nn.utils.weight_norm(nn.Linear(6, 5)), "remove_weight_norm"
    yield "spectral_norm", nn.utils.spectral_norm(nn.Linear(6, 5)), "remove_spectral_norm"
    yield "a parametrization", nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), "remove_parametrizations"
    yield "another", nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 5, 2)), "remove_parametrizations"
    yield "a third", nn.utils.parametrizations.orthogonal(nn.Embedding(6, 5)), "remove_parametrizations"


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_computed_from_others_are_refused_by_name_at_injection():
    for what, module, remedy in computed():
        model = nn.Sequential(OrderedDict(first=nn.Linear(6, 6), second=module))
        with pytest.raises(LoRAXSError, match=rf"^second has no weight of its own.*{remedy}") as caught:
            inject(model, LoRAXSConfig(2, targets=("first", "second")))
        assert not any("lora_xs" in n for n, _ in model.named_parameters()), what
        assert "\n" not in str(caught.value)
        assert layers(inject(model, LoRAXSConfig(2, targets=("first", "second"), exclude=("second",))))


def test_what_the_refusal_advises_works(train_r):
    module = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    model = nn.Sequential(module)
    x = torch.randn(2, 6)
    want = model(x)
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    torch.testing.assert_close(model(x), want)
    inject(model, LoRAXSConfig(2))
