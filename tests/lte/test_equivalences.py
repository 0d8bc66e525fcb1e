"""LTE against what it must equal, to 1e-12 in float64: plain LoRA, the sum of heads, its own merges."""

import copy

import pytest
import torch
from lte import LTEConfig, LTELinear, Merger, clip_grad_norm_per_head, inject, merge, merged_state_dict
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from torch import nn

EXACT = {"rtol": 0, "atol": 1e-12}


def small_gpt(**changes):
    config = {"block_size": 6, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8, **changes}
    return GPT(GPTConfig(**config)).double()


def batch(rows=4, vocab=11):
    tokens = torch.randint(0, vocab, (rows, 7))
    return tokens[:, :-1], tokens[:, 1:]


class SumOfHeads(nn.Module):
    """Multi-head LoRA as in the paper's first form: y = W x + (s/N) Σ_h B_h A_h x, every head on all data.

    With one head it is plain LoRA.
    """

    def __init__(self, layer: LTELinear) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = layer.weight.detach().clone(), layer.bias, layer.scale
        self.A = nn.ParameterList(layer.lora_A.detach().clone().unbind(0))
        self.B = nn.ParameterList(layer.lora_B.detach().clone().unbind(0))

    def forward(self, x):
        y = nn.functional.linear(x, self.weight, self.bias)
        for A, B in zip(self.A, self.B, strict=True):
            y = y + self.scale / len(self.A) * ((x @ A.T) @ B.T)
        return y


def twins(heads, rank=3):
    """The same small GPT twice: with LTE, and with the heads summed by hand."""
    model = inject(small_gpt(), LTEConfig(heads=heads, rank=rank, alpha=5.0, trainable=()))
    other = copy.deepcopy(model)
    for name, module in list(other.named_modules()):
        if isinstance(module, LTELinear):
            parent, _, child = name.rpartition(".")
            setattr(other.get_submodule(parent), child, SumOfHeads(module))
    return model, other


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3, 0])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_one_head_is_plain_lora_for_any_merge_interval(every, optimizer):
    model, lora = twins(heads=1)
    merger = Merger(model, every)
    ours, theirs = (optimizer([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (model, lora))
    for _ in range(10):
        data = batch()
        losses = []
        for m, o in ((model, ours), (lora, theirs)):
            o.zero_grad()
            loss = next_token_loss(m, data)
            loss.backward()
            o.step()
            losses.append(loss)
        merger.step()
        torch.testing.assert_close(*losses, **EXACT)
    assert merger.merges == (10 // every if every else 0)
    x = batch()[0]
    torch.testing.assert_close(model.eval()(x), lora.eval()(x), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 3])
def test_merging_every_step_is_the_sum_of_heads_on_the_same_data(heads):
    """Reset-less, T = 1: with the same data for every head, W after each merge is W₀ + (s/H) Σ B_h A_h.

    The sum of heads gives head h 1/H of its own gradient (the loss is shared), so its SGD step is H times as long.
    """
    lr = 0.02
    model, summed = twins(heads)
    for layer in (m for m in model.modules() if isinstance(m, LTELinear)):
        assert not torch.equal(layer.lora_A[0], layer.lora_A[1])  # heads begin apart, or this test would be easy
    merger = Merger(model, 1)
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    theirs = torch.optim.SGD([p for p in summed.parameters() if p.requires_grad], lr=lr * heads)
    for _ in range(8):
        x, y = batch(rows=2)
        for o in (ours, theirs):
            o.zero_grad()
        loss = next_token_loss(model, (x.repeat(heads, 1), y.repeat(heads, 1)))
        other = next_token_loss(summed, (x, y))
        torch.testing.assert_close(loss, other, **EXACT)
        loss.backward()
        other.backward()
        ours.step()
        theirs.step()
        merger.step()
    torch.testing.assert_close(model.eval()(x), summed.eval()(x), **EXACT)


def trained(heads=2, steps=3):
    """A model with unmerged deltas and offsets that are not zero."""
    model = inject(small_gpt(), LTEConfig(heads=heads, rank=3, alpha=5.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    merger = Merger(model, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_loss(model, batch()).backward()
        optimizer.step()
        merger.step()
    return model


def test_a_merge_does_not_change_the_function():
    model = trained().eval()
    x = batch()[0]
    before = model(x)
    weights = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, LTELinear)}
    merge(model)
    torch.testing.assert_close(model(x), before, **EXACT)
    assert all((model.get_submodule(n).weight - w).abs().max() > 1e-4 for n, w in weights.items())  # it did merge


def test_after_a_merge_every_head_trains_on_the_evaluated_function():
    model = trained()
    merge(model)
    x = batch()[0]
    torch.testing.assert_close(model.train()(x), model.eval()(x), **EXACT)


def test_merging_twice_is_merging_once():
    model = trained()
    merge(model)
    once = copy.deepcopy(model.state_dict())
    merge(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, once[name], **EXACT)


def test_merged_state_dict_is_a_plain_model_with_the_evaluated_function():
    model = trained().eval()
    x = batch()[0]
    plain = small_gpt()
    plain.load_state_dict(merged_state_dict(model))  # strict: the names are those of the plain model
    torch.testing.assert_close(plain.eval()(x), model(x), **EXACT)
    assert plain.lm_head.weight is plain.transformer.wte.weight


def assert_sgd(n, layer, ours, lr, merge):
    """With A orthogonal and square, merged every step: W moves by −lr·s²·gain·(mean gradient), data-parallel SGD.

    gain: A Aᵀ = gain · I; the published initial values are not of unit length.
    """
    weight = layer.weight.detach().clone().requires_grad_()
    gain = (layer.lora_A[0] @ layer.lora_A[0].T)[0, 0].item()
    rows = 2 * layer.lora_A.shape[0]
    for _ in range(5):
        x, target = torch.randn(rows, n, dtype=torch.float64), torch.randn(rows, 5, dtype=torch.float64)
        ours.zero_grad()
        nn.functional.mse_loss(layer(x), target).backward()
        ours.step()
        merge()
        (grad,) = torch.autograd.grad(nn.functional.mse_loss(nn.functional.linear(x, weight), target), weight)
        with torch.no_grad():
            weight -= lr * layer.scale**2 * gain * grad
        torch.testing.assert_close(layer.weight, weight.detach(), **EXACT)


def test_full_rank_frozen_orthogonal_A_merged_every_step_is_sgd():
    n, lr = 6, 0.01
    layer = LTELinear(nn.Linear(n, 5, bias=False, dtype=torch.float64), LTEConfig(heads=3, rank=n, alpha=2.0 * n))
    layer.lora_A.requires_grad_(False)
    assert_sgd(n, layer, torch.optim.SGD([layer.lora_B], lr=lr), lr, layer.merge)


def test_full_rank_orthogonal_A_with_B_reset_every_step_is_sgd():
    """With A trained too: at B = 0 its gradient is 0, so resetting B after every merge leaves it where it is."""
    n, lr = 6, 0.01
    linear = nn.Linear(n, 5, bias=False, dtype=torch.float64)
    model = inject(nn.Sequential(linear), LTEConfig(heads=3, rank=n, alpha=2.0 * n, reset="B"))
    ours = torch.optim.SGD([model[0].lora_A, model[0].lora_B], lr=lr)
    assert_sgd(n, model[0], ours, lr, Merger(model, 1, optimizer=ours).step)


def test_heads_on_chunks_are_separate_loras():
    """Between merges H heads on H chunks are H LoRA models that never meet."""
    H = 2
    model, _ = twins(heads=H)
    singles = []
    for h in range(H):
        single = inject(small_gpt(), LTEConfig(heads=1, rank=3, alpha=5.0, trainable=()))
        state = {
            n: t[h : h + 1] if n.rpartition(".")[2] in ("lora_A", "lora_B", "merged_A", "merged_B") else t
            for n, t in model.state_dict().items()
        }
        single.load_state_dict(state)
        singles.append(single)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (model, *singles)]
    for _ in range(5):
        x, y = batch(rows=2 * H)
        parts = [(x, y), *zip(x.chunk(H), y.chunk(H), strict=True)]
        for m, o, part in zip((model, *singles), optimizers, parts, strict=True):
            o.zero_grad()
            next_token_loss(m, part).backward()
            o.step()
    for name, layer in model.named_modules():
        if isinstance(layer, LTELinear):
            for h, single in enumerate(singles):
                torch.testing.assert_close(layer.lora_B[h], single.get_submodule(name).lora_B[0], **EXACT)


def test_a_head_is_clipped_by_the_same_bits_beside_any_number_of_heads():
    """Else a process that holds two of four heads parts from one that holds all."""
    layers = [torch.nn.Linear(16, 16) for _ in range(12)]
    whole, half = (torch.nn.Sequential(*map(copy.deepcopy, layers)) for _ in range(2))
    for model, heads in ((whole, 4), (half, 2)):
        inject(model, LTEConfig(heads=heads, rank=2, alpha=4.0, trainable=()))
    pairs = [(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True) if a.requires_grad]
    for _ in range(20):
        for a, b in pairs:
            a.grad = torch.randn_like(a)
            b.grad = a.grad[2:].clone()
        for model in (whole, half):
            clip_grad_norm_per_head(model, 1.0)
        for a, b in pairs:
            assert torch.equal(a.grad[2:], b.grad)
