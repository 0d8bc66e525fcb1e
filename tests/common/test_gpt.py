"""The GPT against an independent, written-out forward pass, and nanoGPT's conventions."""

import math

import pytest
import torch
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from torch.nn import functional as F

CONFIG = GPTConfig(block_size=9, vocab_size=13, n_layer=3, n_head=2, n_embd=8, bias=True)


def slow_forward(model, tokens):
    """Pre-norm GPT-2 from its weights alone: loops over heads and positions, attention by explicit softmax."""
    w = model.state_dict()
    C, H = model.config.n_embd, model.config.n_head
    d = C // H

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    out = []
    for row in tokens:
        x = w["transformer.wte.weight"][row] + w["transformer.wpe.weight"][: len(row)]
        for i in range(model.config.n_layer):
            p = f"transformer.h.{i}."
            q, k, v = linear(norm(x, p + "ln_1"), p + "attn.c_attn").split(C, dim=-1)
            heads = torch.zeros_like(x)
            for h in range(H):
                part = slice(h * d, (h + 1) * d)
                for t in range(len(row)):
                    scores = (k[: t + 1, part] @ q[t, part]) / math.sqrt(d)
                    heads[t, part] = torch.softmax(scores, 0) @ v[: t + 1, part]
            x = x + linear(heads, p + "attn.c_proj")
            hidden = linear(norm(x, p + "ln_2"), p + "mlp.c_fc")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + linear(hidden, p + "mlp.c_proj")
        out.append(norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T)
    return torch.stack(out)


@pytest.mark.parametrize("length", [1, 5, 9])
def test_forward_is_the_written_out_one(length):
    model = GPT(CONFIG).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(0, 13, (2, length))
    torch.testing.assert_close(model(tokens), slow_forward(model, tokens), rtol=0, atol=1e-12)


def test_the_loss_is_the_mean_negative_log_likelihood():
    model = GPT(CONFIG).double()
    x, y = torch.randint(0, 13, (2, 4)), torch.randint(0, 13, (2, 4))
    log_p = F.log_softmax(model(x), -1)
    expected = -torch.stack([log_p[b, t, y[b, t]] for b in range(2) for t in range(4)]).mean()
    torch.testing.assert_close(next_token_loss(model, (x, y)), expected)


def test_names_sizes_and_initialisation_are_nanogpts():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig(bias=True))
    assert sum(p.numel() for p in gpt2.parameters()) == 124_475_904  # 124.44 M and the vocabulary's padding
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=8, n_head=4, n_embd=128))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not any(n.endswith("bias") for n, _ in model.named_parameters())
    stds = {n: p.std().item() for n, p in model.named_parameters() if p.dim() == 2}
    for name, std in stds.items():
        expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 · 8 layers) = 4
        assert std == pytest.approx(expected, rel=0.05), name


def test_no_position_sees_a_later_token():
    model = GPT(CONFIG).eval()
    a = torch.randint(0, 13, (1, 9))
    b = a.clone()
    b[0, 5:] = (b[0, 5:] + 1) % 13
    assert torch.equal(model(a)[:, :5], model(b)[:, :5])
    assert not torch.equal(model(a)[:, 5:], model(b)[:, 5:])


def test_generation_is_reproducible_crops_the_context_and_leaves_the_generator_alone():
    model = GPT(CONFIG).train()
    start = torch.zeros(2, 1, dtype=torch.long)
    state = torch.get_rng_state()
    a = model.generate(start, 20, seed=3)
    assert a.shape == (2, 21)
    assert torch.equal(a, model.generate(start, 20, seed=3))
    assert not torch.equal(a, model.generate(start, 20, seed=4))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    greedy = model.generate(start, 5, top_k=1)
    logits = model.eval()(greedy[:, :-1])
    assert torch.equal(logits.argmax(-1), greedy[:, 1:])


def test_refusals():
    with pytest.raises(ValueError, match="longer than block_size=9"):
        GPT(CONFIG)(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="n_embd=8 must be a multiple of n_head=3"):
        GPTConfig(n_embd=8, n_head=3)
    with pytest.raises(ValueError, match="n_layer must be at least 1"):
        GPTConfig(n_layer=0)
