"""Frozen weights in bfloat16 and in 4 bits: merges lose nothing, and the bytes are those that are promised."""

import pytest
import torch
from lte import LTEConfig, LTELinear, Merger, inject, merge, merged_state_dict, param_groups
from lte.bases import NF4, dequantize_4bit, join_float32, quantize_4bit, split_float32
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from torch import nn

BASES = {
    "float32": {},
    "bfloat16": {"base": "bfloat16"},
    "4bit, dense delta": {"base": "4bit", "rank": 24},
    "4bit, dense delta, reset": {"base": "4bit", "reset": "B"},
    "4bit, factors": {"base": "4bit"},
}


def layer_of(n=48, m=40, **config):
    torch.manual_seed(3)
    linear = nn.Linear(n, m)
    return LTELinear(linear, LTEConfig(**{"heads": 2, "rank": 3, "alpha": 6.0, **config}))


@pytest.mark.slow
@pytest.mark.parametrize("config", BASES.values(), ids=BASES)
def test_a_thousand_small_merges_are_within_a_thousandth_of_float64(config):
    """Each merge moves the weights by about 1e-5 of their size; a bfloat16 master loses a tenth of the sum."""
    layer = layer_of(**config)
    start = layer.master().double().clone()
    resets = config.get("reset") == "B"
    B64, total = layer.lora_B.detach().double().clone(), torch.zeros_like(start)
    A64 = layer.lora_A.detach().double()
    drift = torch.randn_like(B64)
    naive = start.bfloat16()
    for _ in range(1000):
        B64 = drift * 2e-6 + 1e-6 * torch.randn_like(B64) + (0 if resets else B64)
        with torch.no_grad():
            layer.lora_B.copy_(B64)
        before = total
        delta = layer.scale / 2 * (B64 @ A64).sum(0)
        total = total + delta if resets else delta
        naive = naive + (total - before).bfloat16()
        layer.merge()
        if resets:
            layer.reset(torch.Generator(), A=False)
    moved = layer.master().double() - start
    assert 1e-3 < total.norm() / start.norm() < 0.1
    assert (moved - total).norm() / total.norm() < 1e-3
    assert (naive.double() - start - total).norm() / total.norm() > 0.05  # what this is about


def test_splitting_float32_is_exact():
    values = torch.cat(
        [torch.randn(1000) * 10.0**e for e in range(-38, 38, 4)] + [torch.tensor([0.0, -0.0, 1.0, -1.5])]
    )
    high, low = split_float32(values.view(-1, 4))
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_float32(high, low), values.view(-1, 4))
    nearest = values.view(-1, 4).bfloat16()
    assert ((high.float() - values.view(-1, 4)).abs() <= (nearest.float() - values.view(-1, 4)).abs()).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (7, 129), (1, 1)])
def test_four_bits_are_the_nearest_level_of_the_block(shape):
    weight = torch.randn(shape)
    codes, absmax = quantize_4bit(weight)
    again = dequantize_4bit(codes, absmax, shape)
    flat, levels = weight.flatten(), torch.tensor(NF4)
    for i, value in enumerate(flat):
        block = flat[i // 64 * 64 : i // 64 * 64 + 64].abs().max()
        nearest = levels[(levels - value / block).abs().argmin()] * block
        assert again.flatten()[i] == pytest.approx(nearest.item(), abs=1e-6)
    assert codes.numel() == -(-weight.numel() // 64) * 32


def test_four_bits_of_nothing_and_of_one_number():
    assert not dequantize_4bit(*quantize_4bit(torch.zeros(4, 4)), (4, 4)).any()
    assert torch.equal(dequantize_4bit(*quantize_4bit(torch.full((4, 4), -3.0)), (4, 4)), torch.full((4, 4), -3.0))


@pytest.mark.parametrize("config", BASES.values(), ids=BASES)
def test_the_bytes_of_a_base_are_those_that_are_promised(config):
    layer = layer_of(256, 256, **{**config, "rank": 64 if config.get("rank") else 3})
    frozen = [layer.weight] if layer.weight is not None else []
    kept = [t for n, t in layer.named_buffers() if n.startswith(("weight_", "all_"))]
    each = sum(t.nbytes for t in (*frozen, *kept)) / 256**2
    f = 2 * layer.rank * 512 / 256**2
    promised = {"float32": 4, "bfloat16": 4}.get(layer.base, 0.5625 + 4 * (min(1, f) if layer.telescopes else 1))
    assert each == pytest.approx(promised, abs=1e-3)
    assert layer.telescopes == (config == {"base": "4bit"})


def small(**config):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=6, vocab_size=11, n_layer=1, n_head=2, n_embd=32))
    return inject(model, LTEConfig(**{"heads": 2, "rank": 2, "alpha": 4.0, **config}))


@pytest.mark.slow
@pytest.mark.parametrize("config", [c for c in BASES.values() if c], ids=[n for n, c in BASES.items() if c])
def test_training_and_merging_on_a_low_precision_base(config):
    """A merge changes no function but for the rounding that the forward pass reads, and gradients are those of the
    weights it stands for."""
    model = small(**config)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.01, rest_lr=0.01, weight_decay=0.1))
    merger, losses = Merger(model, 3, optimizer=optimizer), []
    tokens = torch.randint(0, 11, (4, 7))
    for _ in range(31):
        optimizer.zero_grad()
        loss = next_token_loss(model, (tokens[:, :-1], tokens[:, 1:]))
        loss.backward()
        optimizer.step()
        merger.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    before = model.eval()(tokens[:, :-1])
    plain = GPT(model.config)
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(plain(tokens[:, :-1]), before, rtol=0, atol=1e-5)
    merge(model, optimizer=optimizer)
    torch.testing.assert_close(model(tokens[:, :-1]), before, rtol=0, atol=1e-5)
    rounding = 0.02 if model.transformer.h[0].mlp.c_fc.base == "bfloat16" else 1e-5
    torch.testing.assert_close(model.train()(tokens[:, :-1]), before, rtol=0, atol=rounding)
    again = small(**config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(tokens[:, :-1]), model.eval()(tokens[:, :-1]))


def test_a_four_bit_weight_is_made_again_in_the_backward_pass():
    """Its gradients are those of the weight it stands for, and no weight in full is saved."""
    from memtrain_common.measuring.memory import SavedActivations

    layer = layer_of(64, 64, base="4bit").train()
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.take(layer.mean_delta(), layer.lora_A, layer.lora_B)
        layer.lora_B.normal_()
    plain = LTELinear(nn.Linear(64, 64), LTEConfig(heads=2, rank=3, alpha=6.0))
    with torch.no_grad():
        plain.weight.copy_(layer.master())
        plain.bias.copy_(layer.bias)
        for name, value in zip(("merged_A", "merged_B"), layer.offsets(), strict=True):
            getattr(plain, name).copy_(value)
        plain.lora_A.copy_(layer.lora_A)
        plain.lora_B.copy_(layer.lora_B)
    grads = []
    for l in (layer, plain):
        x = torch.linspace(-1, 1, 4 * 64).view(4, 64).requires_grad_()
        with SavedActivations(l) as saved:
            y = l(x)
        y.square().sum().backward()
        grads.append((y.detach(), x.grad, l.lora_A.grad, l.lora_B.grad))
        assert sum(saved.by_layer().values()) < 64 * 64 * 4
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
