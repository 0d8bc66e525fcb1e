"""What inject replaces, freezes and refuses; per-head clipping; the merge clock's state."""

import lte
import pytest
import torch
from lte import LTEConfig, LTELinear, Merger, clip_grad_norm_per_head, inject, merge, param_groups
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from torch import nn

SMALL = GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=2, n_embd=8, bias=True)


def data(rows=4):
    tokens = torch.randint(0, 11, (rows, 7))
    return tokens[:, :-1], tokens[:, 1:]


def with_heads(model):
    return {name for name, m in model.named_modules() if isinstance(m, LTELinear)}


def test_every_block_linear_gets_heads_and_the_tied_head_does_not():
    found = with_heads(inject(GPT(SMALL), LTEConfig()))
    leaves = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found == {f"transformer.h.{i}.{leaf}" for i in range(2) for leaf in leaves}


def test_targets_and_exclude_match_at_dots():
    model = inject(GPT(SMALL), LTEConfig(targets=("c_proj",), exclude=("mlp.c_proj",)))
    assert with_heads(model) == {f"transformer.h.{i}.attn.c_proj" for i in range(2)}


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ((), set()),
        (("norms",), {"ln_1", "ln_2", "ln_f"}),
        (("embeddings",), {"wte", "wpe"}),
        (("biases",), {"c_attn", "c_proj", "c_fc"}),
        (("skipped",), {"wte"}),  # the head is the embedding's weight
        (
            ("embeddings", "norms", "biases", "skipped"),
            {"ln_1", "ln_2", "ln_f", "wte", "wpe", "c_attn", "c_proj", "c_fc"},
        ),
    ],
)
def test_only_what_is_listed_is_trained_besides_the_heads(trainable, expected):
    model = inject(GPT(SMALL), LTEConfig(heads=2, rank=2, trainable=trainable))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        next_token_loss(model, data()).backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    heads = {n for n in before if "lora_" in n}
    assert moved >= heads
    assert {n.split(".")[-2] for n in moved - heads} == expected
    assert not any(n.endswith("weight") for n in moved if n.rpartition(".")[0] in with_heads(model))


def test_refusals():
    with pytest.raises(ValueError, match=r"no linear layer or convolution matches.*c_attn, c_fc, c_proj, lm_head"):
        inject(GPT(SMALL), LTEConfig(targets=("q_proj",)))
    with pytest.raises(ValueError, match=r"lm_head shares its weight with transformer\.wte\.weight"):
        inject(GPT(SMALL), LTEConfig(exclude=()))
    with pytest.raises(ValueError, match="heads already"):
        inject(inject(GPT(SMALL), LTEConfig()), LTEConfig())
    with pytest.raises(ValueError, match="no LTE heads to merge"):
        merge(GPT(SMALL))
    with pytest.raises(ValueError, match="every must be"):
        Merger(GPT(SMALL), -1)


def test_groups_cover_every_trained_parameter_once():
    model = inject(GPT(SMALL), LTEConfig())
    groups = param_groups(model, lr=1.0, rest_lr=2.0, weight_decay=0.3)
    listed = [p for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {p for p in model.parameters() if p.requires_grad}
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "heads": (1.0, 0.0),
        "matrices": (2.0, 0.3),
        "vectors": (2.0, 0.0),
    }


def test_clipping_is_each_heads_own():
    model = inject(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double(), LTEConfig(heads=2, rank=2))
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    for layer in model:
        layer.lora_A.grad[0] *= 1e-3
        layer.lora_B.grad[0] *= 1e-3
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    total = torch.sqrt(sum(g.square().sum() for g in before.values()))
    torch.testing.assert_close(clip_grad_norm_per_head(model, 0.5), total)
    for h in range(2):
        parts = [g[h] for layer in model for g in (layer.lora_A.grad, layer.lora_B.grad)]
        norm = float(torch.cat([p.flatten() for p in parts]).norm())
        assert norm < 0.1 if h == 0 else norm == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(model[0].lora_A.grad[0], before["0.lora_A"][0])  # the small head is left alone
    biases = torch.cat([layer.bias.grad for layer in model])
    assert float(biases.norm()) == pytest.approx(0.5, rel=1e-4)


def test_the_merge_clock_survives_a_checkpoint():
    model = inject(GPT(SMALL), LTEConfig())
    clock = Merger(model, 3)
    assert [clock.step() for _ in range(4)] == [False, False, True, False]
    again = Merger(model, 3)
    again.load_state_dict(clock.state_dict())
    assert [again.step(), again.step()] == [False, True]
    assert again.merges == 2


def test_what_the_model_itself_does_not_train_stays_frozen():
    """A router's correction bias is set by the model's own rule; a model that is frozen whole says nothing about it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].correction = nn.Parameter(torch.zeros(3), requires_grad=False)
    model.scale = nn.Parameter(torch.ones(2), requires_grad=False)
    model.shift = nn.Parameter(torch.ones(2))
    plan = LTEConfig(heads=2, rank=2, exclude=("0",))
    inject(model, plan)
    assert not model[0].correction.requires_grad
    assert not model.scale.requires_grad
    assert model.shift.requires_grad
    whole = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).requires_grad_(False)
    assert inject(whole, LTEConfig(heads=2, rank=2))[1].weight.requires_grad


def test_a_merged_state_dict_keeps_the_versions_that_modules_ask_for():
    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state, prefix, metadata, *args):
            assert metadata["version"] == 7
            super()._load_from_state_dict(state, prefix, metadata, *args)

    model = nn.Sequential(nn.Linear(4, 4), Versioned(4, 4))
    inject(model, LTEConfig(heads=2, rank=2))
    nn.Sequential(nn.Linear(4, 4), Versioned(4, 4)).load_state_dict(lte.merged_state_dict(model))


def in_parts(*configs):
    """A layer injected by itself for every configuration, and an optimizer."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6)) for _ in configs))
    for part, config in zip(model, configs, strict=True):
        inject(part, LTEConfig(**{"heads": 2, "rank": 2, "alpha": 4.0, **config}))
    return model, torch.optim.AdamW(param_groups(model, lr=0.05, rest_lr=0.05, weight_decay=0.0))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"reset": "B"}, "reset="),
        ({"merge_density": 0.5}, "merge_density="),
        ({"merge_density": 0.5, "merge_delay": 1}, "merge_density="),
    ],
)
def test_parts_that_are_merged_otherwise_have_no_common_merge(other, said, swapped):
    model, optimizer = in_parts(*(({}, other)[:: -1 if swapped else 1]))
    with pytest.raises(ValueError, match=rf"0\.0 was injected with {said}.* and 1\.0 with .*inject all parts"):
        Merger(model, 1, optimizer=optimizer)
    with pytest.raises(ValueError, match=said):
        merge(model, optimizer=optimizer)
    for layer in (model[0][0], model[1][0]):
        nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 6)
    answer = model.eval()(x)
    for name in ("0.0", "1.0"):  # as the sentence advises
        merge(model, optimizer=optimizer, only=[name])
        torch.testing.assert_close(model(x), answer, rtol=1e-5, atol=1e-5)


def test_parts_of_other_sizes_have_a_common_merge():
    model, optimizer = in_parts({}, {"rank": 3, "base": "bfloat16"})
    merger, x = Merger(model, 1, optimizer=optimizer), torch.randn(4, 6)
    for _ in range(3):
        model.train()(x).square().mean().backward()
        optimizer.step()
        answer = model.eval()(x)
        merger.step()
        torch.testing.assert_close(model(x), answer, rtol=1e-5, atol=1e-5)


def test_a_merge_clock_that_could_never_merge_is_refused_at_once():
    model, optimizer = in_parts({"reset": "all"})
    with pytest.raises(ValueError, match="reset='all' lets the optimizer forget its state: pass optimizer="):
        Merger(model, 2)
    Merger(model, 0)
    Merger(model, 2, optimizer=optimizer)
    Merger(in_parts({"reset": "B", "reset_optimizer": False})[0], 2)
    with pytest.raises(ValueError, match="no LTE heads to merge"):
        Merger(nn.Linear(2, 2), 1)
    Merger(nn.Linear(2, 2), 0)
