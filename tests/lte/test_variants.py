"""Resets, ReLoRA, sequential heads, convolutions, vectors, copies and outer momentum, each against its formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lte import (
    LTEConfig,
    LTEConv2d,
    LTELinear,
    LTENorm,
    Merger,
    Replicas,
    averaged,
    clip_grad_norm_per_head,
    inject,
    merge,
    merged_state_dict,
    param_groups,
)
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.loop import FitConfig, Task, fit
from torch import nn

EXACT = {"rtol": 0, "atol": 1e-12}
EVERYTHING = ("embeddings", "norms", "biases", "skipped")


def small_gpt(**changes):
    config = {"block_size": 6, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8, "bias": True, **changes}
    return GPT(GPTConfig(**config)).double()


def batch(rows=4, vocab=11):
    tokens = torch.randint(0, vocab, (rows, 7))
    return tokens[:, :-1], tokens[:, 1:]


def train(model, optimizer, merger, steps, batches=None):
    for i in range(steps):
        optimizer.zero_grad()
        next_token_loss(model, batches[i] if batches else batch()).backward()
        optimizer.step()
        merger.step()


VARIANTS = {
    "reset B": {"reset": "B"},
    "reset all": {"reset": "all"},
    "sequential": {"mode": "sequential"},
    "sequential, reset all": {"mode": "sequential", "reset": "all"},
    "copies": {"replicas": ("embeddings", "norms", "skipped")},
    "vectors": {"vectors": ("norms", "biases")},
    "vectors and copies": {"vectors": ("norms", "biases"), "replicas": ("embeddings",), "reset": "B"},
    "sequential vectors": {"vectors": ("norms", "biases"), "mode": "sequential"},
    "without momentum": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_merge_preserves_the_function_and_every_head_goes_on_from_it(variant):
    model = inject(small_gpt(), LTEConfig(heads=2, rank=3, alpha=5.0, **variant))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.02, rest_lr=0.02, weight_decay=0.1))
    train(model, optimizer, Merger(model, 3, optimizer=optimizer), 5)
    x = batch()[0]
    before = model.eval()(x)
    plain = small_gpt()
    plain.load_state_dict(merged_state_dict(model))
    assert plain.lm_head.weight is plain.transformer.wte.weight
    torch.testing.assert_close(plain(x), before, **EXACT)
    with averaged(model):
        torch.testing.assert_close(model(x), before, **EXACT)
    merge(model, optimizer=optimizer)
    torch.testing.assert_close(model(x), before, **EXACT)
    torch.testing.assert_close(model.train()(x), before, **EXACT)
    merge(model, optimizer=optimizer)  # twice is once
    torch.testing.assert_close(model.eval()(x), before, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(("reset", "forgotten"), [("none", ()), ("B", ("lora_B",)), ("all", ("lora_A", "lora_B"))])
@pytest.mark.parametrize("reset_optimizer", [True, False])
def test_what_a_reset_does_to_factors_offsets_and_moments(reset, forgotten, reset_optimizer):
    config = LTEConfig(heads=2, rank=3, alpha=5.0, reset=reset, reset_optimizer=reset_optimizer)
    model = inject(small_gpt(), config)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.02, rest_lr=0.02, weight_decay=0.1))
    train(model, optimizer, Merger(model, 0), 3)
    layer = model.transformer.h[0].mlp.c_fc
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    others = {p for p in model.parameters() if p.requires_grad}
    merge(model, optimizer=optimizer, seed=7)
    assert torch.equal(layer.lora_A, A) == (reset != "all")
    assert (layer.lora_B == 0).all() == (reset != "none")
    if reset == "none":
        assert torch.equal(layer.merged_A, A)
        assert torch.equal(layer.merged_B, B)
    else:
        assert layer.offsets() == (None, None)
        assert "merged_A" not in dict(layer.named_buffers())
    for name in ("lora_A", "lora_B"):
        assert (getattr(layer, name) in optimizer.state) == (name not in forgotten or not reset_optimizer)
    others -= {p for n, p in model.named_parameters() if n.rpartition(".")[2] in forgotten}
    assert all(p in optimizer.state for p in others)
    if reset == "all":  # orthogonal again, with the paper's scale, each head its own, the same for the same seed
        gram = layer.lora_A @ layer.lora_A.mT
        torch.testing.assert_close(gram, (32 / 8) * torch.eye(3, dtype=torch.float64).expand(2, 3, 3), **EXACT)
        first = layer.lora_A.detach().clone()
        assert not torch.equal(first[0], first[1])
        merge(model, optimizer=optimizer, seed=7)
        assert torch.equal(layer.lora_A, first)


def test_a_reset_needs_the_optimizer():
    model = inject(small_gpt(), LTEConfig(heads=2, rank=3, reset="B"))
    with pytest.raises(ValueError, match="reset='B' lets the optimizer forget its state: pass optimizer="):
        merge(model)


def test_relora_is_one_head_with_resets():
    """Against ReLoRA written out: plain LoRA, merged every T steps, factors drawn anew, a new AdamW for them."""
    T = 3
    model = inject(small_gpt(), LTEConfig(heads=1, rank=3, alpha=5.0, reset="all", trainable=()))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.02, rest_lr=0.02, weight_decay=0.1))
    merger = Merger(model, T, optimizer=optimizer, seed=5)
    plain = small_gpt()
    plain.load_state_dict(merged_state_dict(model))
    plain.requires_grad_(False)
    weights = dict(plain.named_parameters())
    names = [n for n, m in model.named_modules() if isinstance(m, LTELinear)]

    def drawn():
        return {n: model.get_submodule(n).lora_A[0].detach().clone().requires_grad_() for n in names}

    A, scale = drawn(), 5.0 / 3
    B = {n: torch.zeros(len(weights[f"{n}.weight"]), 3, dtype=torch.float64, requires_grad=True) for n in names}
    theirs = torch.optim.AdamW([*A.values(), *B.values()], lr=0.02, weight_decay=0.0)
    for step in range(1, 3 * T + 1):
        data = batch()
        optimizer.zero_grad()
        loss = next_token_loss(model, data)
        loss.backward()
        optimizer.step()
        lora = {f"{n}.weight": weights[f"{n}.weight"] + scale * B[n] @ A[n] for n in names}
        theirs.zero_grad()
        logits = torch.func.functional_call(plain, {**weights, **lora}, (data[0],))
        other = F.cross_entropy(logits.flatten(0, 1), data[1].flatten())
        other.backward()
        theirs.step()
        torch.testing.assert_close(loss, other, **EXACT)
        merger.step()
        if step % T == 0:
            with torch.no_grad():
                for n in names:
                    weights[f"{n}.weight"] += scale * B[n] @ A[n]
            A = drawn()
            B = {n: torch.zeros_like(b).requires_grad_() for n, b in B.items()}
            theirs = torch.optim.AdamW([*A.values(), *B.values()], lr=0.02, weight_decay=0.0)
    assert merger.merges == 3


@pytest.mark.slow
@pytest.mark.parametrize("reset", ["none", "B"])
def test_sequential_heads_are_parallel_ones_on_repeated_data_merged_every_step(reset):
    """T = 1, SGD, the same learning rate: all heads on one batch, or each on its own copy of it."""
    H = 3
    config = {"heads": H, "rank": 3, "alpha": 5.0, "trainable": (), "reset": reset}
    sequential = inject(small_gpt(), LTEConfig(mode="sequential", **config))
    parallel = inject(small_gpt(), LTEConfig(**config))
    parallel.load_state_dict(sequential.state_dict())
    runs = []
    for model in (sequential, parallel):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        runs.append((model, optimizer, Merger(model, 1, optimizer=optimizer)))
    for _ in range(6):
        x, y = batch(rows=2)
        for (model, optimizer, merger), repeat in zip(runs, (1, H), strict=True):
            optimizer.zero_grad()
            next_token_loss(model, (x.repeat(repeat, 1), y.repeat(repeat, 1))).backward()
            optimizer.step()
            merger.step()
    torch.testing.assert_close(sequential.eval()(x), parallel.eval()(x), **EXACT)
    assert (sequential.state_dict()["transformer.h.0.mlp.c_fc.lora_B"].abs().max() > 0) == (reset == "none")


# -- convolutions


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), ((2, 3), 2, 0), (1, 1, 0), (3, 1, "same")])
def test_a_convolution_is_the_written_out_formula(kernel, stride, padding, mode):
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dtype=torch.float64)
    layer = LTEConv2d(conv, LTEConfig(heads=2, rank=3, alpha=6.0, mode=mode))
    with torch.no_grad():
        for t in (layer.lora_B, layer.merged_A, layer.merged_B):
            t.normal_()
    deltas = layer.lora_B @ layer.lora_A - layer.merged_B @ layer.merged_A  # (H, 5, 3·kh·kw)
    x = torch.randn(4, 3, 7, 8, dtype=torch.float64, requires_grad=True)

    def written_out(x):
        kernels = [layer.weight + 2.0 * d.view_as(layer.weight) for d in deltas]
        if mode == "sequential":
            kernels = [sum(kernels) / 2]
        chunks = x.chunk(len(kernels))
        return torch.cat([F.conv2d(c, k, conv.bias, stride, padding) for c, k in zip(chunks, kernels, strict=True)])

    torch.testing.assert_close(layer(x), written_out(x), **EXACT)
    weights = torch.randn_like(layer(x))
    (got,) = torch.autograd.grad((layer(x) * weights).sum(), layer.lora_B)
    deltas = layer.lora_B @ layer.lora_A - layer.merged_B @ layer.merged_A
    (expected,) = torch.autograd.grad((written_out(x) * weights).sum(), layer.lora_B)
    torch.testing.assert_close(got, 2 * expected, **EXACT)  # each head's own mean loss, not 1/H of it
    before = layer.eval()(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before, **EXACT)
    torch.testing.assert_close(layer.train()(x), before, **EXACT)


def test_a_network_of_convolutions_trains_and_is_plain_again():
    torch.manual_seed(1)
    plain = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.Flatten(), nn.Linear(72, 3)
    ).double()
    model = inject(copy.deepcopy(plain), LTEConfig(heads=2, rank=4, alpha=8.0, vectors=("biases",)))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.01, rest_lr=0.01, weight_decay=0.1))
    x, y = torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (12,))
    merger, losses = Merger(model, 2), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        merger.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(plain(x), model.eval()(x), **EXACT)


# -- the rest of the model, a copy or a vector a head


@pytest.mark.parametrize("norm", [nn.LayerNorm(5), nn.LayerNorm(5, bias=False), nn.RMSNorm(5)])
def test_a_norm_with_heads_is_the_written_out_formula(norm):
    norm = norm.double()
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    layer = LTENorm(copy.deepcopy(norm), LTEConfig(heads=2, rank=3, alpha=6.0))
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), norm(x), **EXACT)
    with torch.no_grad():
        for t in (layer.weight.lora_B, layer.weight.lora_A, layer.weight.merged_B):
            t.normal_()
    delta = (layer.weight.lora_B * layer.weight.lora_A - layer.weight.merged_B)[..., 0]  # (H, 5); merged a is 1
    for h, (chunk, y) in enumerate(zip(x.chunk(2), layer(x).chunk(2), strict=True)):
        own = copy.deepcopy(norm)
        own.weight.data += 2.0 * delta[h]
        torch.testing.assert_close(y, own(chunk), **EXACT)
    own = copy.deepcopy(norm)
    own.weight.data += 2.0 * delta.mean(0)
    torch.testing.assert_close(layer.eval()(x), own(x), **EXACT)


def test_copies_are_separate_models_between_merges_and_one_after():
    """H heads with copies of all the rest are H whole models, each trained by itself; a merge is their mean."""
    H = 2
    config = {"rank": 3, "alpha": 5.0, "trainable": ("embeddings", "norms", "skipped"), "reset": "none"}
    model = inject(small_gpt(bias=False), LTEConfig(heads=H, replicas=("embeddings", "norms"), **config))
    assert isinstance(model.lm_head, Replicas)  # tied to the embedding
    assert model.lm_head.weight is model.transformer.wte.weight
    singles = []
    for h in range(H):
        single = inject(small_gpt(bias=False), LTEConfig(heads=1, **config))
        stacked = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        state = {
            n: t[h] if n in stacked and "lora_" not in n else t[h : h + 1] if "lora_" in n or "merged_" in n else t
            for n, t in model.state_dict().items()
        }
        single.load_state_dict(state)
        singles.append(single)
    runs = [(m, torch.optim.AdamW(param_groups(m, lr=0.05, rest_lr=0.02, weight_decay=0.1))) for m in (model, *singles)]
    for _ in range(4):
        x, y = batch(rows=2 * H)
        for (m, optimizer), part in zip(runs, [(x, y), *zip(x.chunk(H), y.chunk(H), strict=True)], strict=True):
            optimizer.zero_grad()
            next_token_loss(m, part).backward()
            clip_grad_norm_per_head(m, 1e9)
            optimizer.step()
    x = batch(rows=2)[0]
    for h, y in enumerate(model.train()(x.repeat(H, 1)).chunk(H)):
        torch.testing.assert_close(y, singles[h].train()(x), **EXACT)
    merge(model)
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.ln_2.weight"):
        mean = sum(s.state_dict()[name] for s in singles) / H
        torch.testing.assert_close(model.state_dict()[name], mean.expand(H, *mean.shape), **EXACT)


def test_outer_momentum_is_nesterov_over_merges():
    """W and the copies move as torch's SGD with Nesterov momentum moves them on minus the mean delta."""
    outer = {"outer_momentum": 0.9, "outer_lr": 0.7}
    model = inject(small_gpt(), LTEConfig(heads=2, rank=3, alpha=5.0, replicas=("embeddings",), **outer))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.02, rest_lr=0.02, weight_decay=0.1))
    merger = Merger(model, 2)
    watched = {"transformer.h.0.mlp.c_fc.weight": None, "transformer.wte.weight": None}
    start = merged_state_dict(model)
    watched = {name: start[name].clone().requires_grad_() for name in watched}
    sgd = torch.optim.SGD(watched.values(), lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(3):
        for i in range(2):
            optimizer.zero_grad()
            next_token_loss(model, batch()).backward()
            optimizer.step()
            if i == 1:
                reached = merged_state_dict(model)
                for name, value in watched.items():
                    value.grad = value.detach() - reached[name]
            merger.step()
        sgd.step()
        after = merged_state_dict(model)
        for name, value in watched.items():
            torch.testing.assert_close(after[name], value.detach(), **EXACT)
    x = batch()[0]
    torch.testing.assert_close(model.train()(x), model.eval()(x), **EXACT)


# -- torch.compile, gradient accumulation


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [{"replicas": ("embeddings",), "vectors": ("norms",)}, {"base": "4bit"}],
    ids=["copies and vectors", "4bit"],
)
def test_compiles_whole_and_neither_merges_nor_evaluations_compile_again(variant):
    """One graph for training and one for evaluation (eager kernels, for speed), with the eager results."""
    torch._dynamo.reset()
    model = GPT(GPTConfig(block_size=6, vocab_size=11, n_layer=1, n_head=2, n_embd=16))
    inject(model, LTEConfig(heads=2, rank=2, alpha=4.0, **variant))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.01, rest_lr=0.01, weight_decay=0.1))
    merger = Merger(model, 1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        data = batch()
        loss = next_token_loss(compiled.train(), data)
        torch.testing.assert_close(loss, next_token_loss(model, data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        merger.step()
        with torch.no_grad(), averaged(model):
            torch.testing.assert_close(next_token_loss(compiled.eval(), data), next_token_loss(model, data))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_accumulated_gradients_are_one_step_of_the_merge_clock():
    """Two micro-batches a step in the shared loop are one batch whose chunks are twice as long, and T counts steps."""
    x, y = batch(rows=16)
    rows = torch.arange(16).view(2, 2, 4)  # micro-batch, head, rows
    losses = []
    for micro in (1, 2):
        torch.manual_seed(0)
        model = inject(small_gpt(), LTEConfig(heads=2, rank=3, alpha=5.0))
        optimizer = torch.optim.AdamW(param_groups(model, lr=0.02, rest_lr=0.02, weight_decay=0.1))
        merger = Merger(model, 2)
        order = rows.transpose(0, 1).reshape(1, 16) if micro == 1 else rows.reshape(2, 8)
        fit(
            Task(
                model,
                lambda i, order=order: (x[order[i % len(order)]], y[order[i % len(order)]]),
                next_token_loss,
                optimizer,
                after_step=merger.step,
                clip=lambda limit, model=model: clip_grad_norm_per_head(model, limit),
            ),
            FitConfig(max_iters=5, gradient_accumulation_steps=micro, grad_clip=0.5),
        )
        assert (merger.steps, merger.merges) == (5, 2)
        losses.append(next_token_loss(model.eval(), (x, y)))
    torch.testing.assert_close(*losses, **EXACT)


# -- refusals


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mode": "serial"}, "mode must be 'parallel' or 'sequential'"),
        ({"reset": "A"}, "reset must be 'none' or 'B' or 'all'"),
        ({"base": "int4"}, "base must be 'float32' or 'bfloat16' or '4bit'"),
        ({"replicas": ("biases",)}, "replicas takes embeddings, norms, skipped; got biases"),
        ({"vectors": ("embeddings",)}, "vectors takes norms, biases; got embeddings"),
        ({"replicas": ("norms",), "vectors": ("norms",)}, "norms cannot be in vectors and in replicas"),
        ({"trainable": (), "vectors": ("norms",)}, "vectors and replicas take what is trainable: add norms"),
        ({"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\)"),
        ({"outer_lr": 0.0}, "outer_lr must be positive"),
        ({"mode": "sequential", "replicas": ("norms",)}, "sequential heads all see the whole batch"),
    ],
)
def test_refuses_a_wrong_configuration(wrong, words):
    with pytest.raises(ValueError, match=words):
        LTEConfig(**wrong)


def test_refuses_what_cannot_have_heads_or_copies():
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match=r"0: a convolution with groups=2 .* add it to exclude"):
        inject(grouped, LTEConfig(heads=2, rank=2))
    batchnorm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"1: BatchNorm1d has buffers .* leave its kind out of replicas"):
        inject(copy.deepcopy(batchnorm), LTEConfig(heads=2, rank=2, replicas=("norms",)))
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) cannot have heads as vectors: use replicas"):
        inject(batchnorm, LTEConfig(heads=2, rank=2, vectors=("norms",)))
    with pytest.raises(ValueError, match="base 'bfloat16' keeps float32 weights"):
        inject(small_gpt(), LTEConfig(heads=2, rank=2, base="bfloat16"))
    copies = Replicas(nn.Embedding(5, 3), {"weight": nn.Parameter(torch.randn(2, 5, 3))}, LTEConfig(heads=2))
    with pytest.raises(ValueError, match="these have no batch to cut"):
        copies(torch.arange(4))
    with pytest.raises(ValueError, match="a batch of 3 cannot be cut into 2 equal chunks"):
        copies(torch.zeros(3, 1, dtype=torch.long))
