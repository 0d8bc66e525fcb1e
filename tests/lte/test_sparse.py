"""Sparse merges: the message against a slow reading of its format, and what error feedback keeps."""

import copy
import math
import statistics

import pytest
import torch
from lte import HeadShards, LTEConfig, Merger, averaged, inject, merge, merged_state_dict, param_groups, unload
from lte.injection import headed, replicas
from lte.sparse import Sparse
from memtrain_common.files import read_json
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from support import ROOT
from torch import nn
from transformers.pytorch_utils import Conv1D

REST = ("embeddings", "norms", "biases", "skipped")
SPARSE = {"merge_density": 0.03, "merge_bits": 3}
POLICIES = {
    "frozen": {"trainable": ()},
    "copies": {"trainable": REST, "replicas": ("embeddings", "norms"), "vectors": ("biases",)},
    "vectors and momentum": {
        "trainable": ("norms", "biases"), "vectors": ("norms", "biases"), "outer_momentum": 0.5, "outer_lr": 0.7,
    },
    "copies with momentum": {"trainable": REST, "replicas": ("embeddings", "norms", "skipped"), "outer_momentum": 0.5},
    "in 4 bits": {"trainable": (), "base": "4bit"},
    "reset": {"trainable": (), "reset": "all"},
}  # fmt: skip


def said(x, kept, bits, chunk=256):
    """What a message of x says, number by number: plain Python over the format's description."""
    flat = [float(v) for v in x.flatten().float()]
    flat += [0.0] * (-len(flat) % chunk)
    chunks = [flat[i : i + chunk] for i in range(0, len(flat), chunk)]
    out = [[0.0] * chunk for _ in chunks]
    for first in range(0, len(chunks), 16):
        chosen = {}
        for c in range(first, min(first + 16, len(chunks))):
            for i in sorted(range(chunk), key=lambda i, c=c: -abs(chunks[c][i]))[:kept]:
                chosen[c, i] = chunks[c][i]
        sizes = [abs(v) for v in chosen.values()]
        ends = (statistics.mean(sizes),) * 2 if bits == 1 else (min(sizes), max(sizes))
        lo, hi = (float(torch.tensor(end).bfloat16()) for end in ends)
        steps = 2 ** (bits - 1)
        for (c, i), value in chosen.items():
            step = math.floor((abs(value) - lo) / (hi - lo) * steps) if hi > lo else 0
            size = lo + (min(max(step, 0), steps - 1) + 0.5) / steps * (hi - lo)
            out[c][i] = math.copysign(size, value)
    return torch.tensor([v for chunk in out for v in chunk][: x.numel()]).view(x.shape)


FORMS = [(1, 2, 256), (3, 4, 256), (10, 1, 256), (14, 3, 128), (1, 1, 64), (33, 2, 64), (63, 8, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7,), (256,), (3, 100), (64, 80), (130, 257)])
@pytest.mark.parametrize(("kept", "bits", "chunk"), FORMS)
def test_a_message_says_the_largest_numbers_in_few_bits(shape, kept, bits, chunk):
    sparse, x = Sparse(kept, bits, chunk), torch.randn(shape) * 1e-4
    message = sparse.pack(x)
    assert message.dtype == torch.uint8
    assert len(message) == sparse.size(x.numel())
    torch.testing.assert_close(sparse.unpack(message, x), said(x, kept, bits, chunk), rtol=1e-5, atol=1e-12)
    assert sparse.unpack(message, x.double()).dtype == torch.float64


@pytest.mark.parametrize(("kept", "bits", "chunk"), FORMS)
def test_places_are_one_number(kept, bits, chunk):
    """The choice's number, read off the message's bits and taken apart in whole numbers of Python."""
    x, sparse = torch.randn(3, chunk), Sparse(kept, bits, chunk)
    wanted = [sorted(row.abs().topk(kept).indices.tolist()) for row in x]
    first = 2 if bits == 1 else 4  # the bounds of the only block
    stream = int.from_bytes(sparse.pack(x)[first:].numpy().tobytes(), "little")
    P = (math.comb(chunk, kept) - 1).bit_length()
    for row, places in enumerate(wanted):
        number = stream >> row * P & 2**P - 1
        assert number == sum(math.comb(p, i) for i, p in enumerate(places, 1)) < math.comb(chunk, kept)
        taken = []
        for i in range(kept, 0, -1):
            taken.append(max(p for p in range(chunk) if math.comb(p, i) <= number))
            number -= math.comb(taken[-1], i)
        assert sorted(taken) == places


def test_the_size_of_a_message():
    """A layer of 128 × 512 in the largest 1.2 %, 2 bits: 22 + 6 bits a chunk, 32 a block."""
    assert Sparse(3, 2).size(128 * 512) == 256 * 22 // 8 + 256 * 3 * 2 // 8 + 16 * 4
    assert Sparse(3, 1).size(128 * 512) == 256 * 22 // 8 + 256 * 3 // 8 + 16 * 2
    assert Sparse.of(LTEConfig()) is None
    assert Sparse.of(LTEConfig(merge_density=0.001)).kept == 1
    assert Sparse.of(LTEConfig(merge_density=0.02, merge_bits=2)) == Sparse(5, 2)
    copies = LTEConfig(merge_density=0.02, merge_density_replicas=0.08, replicas=("norms",))
    assert (Sparse.of(copies), Sparse.of(copies, copies=True)) == (Sparse(5, 4), Sparse(10, 4, 128))
    for density in torch.linspace(0.002, 0.99, 250).tolist():
        sparse = Sparse.of(LTEConfig(merge_density=density))
        assert abs(sparse.kept / sparse.chunk - density) <= max(0.5, sparse.kept == 1) / sparse.chunk
        assert all(math.comb(sparse.chunk - 1, i) < 2**63 for i in range(sparse.kept + 1))  # what its table holds


def test_zeros_stay_zeros():
    sparse, x = Sparse(4, 3), torch.zeros(40, 30)
    assert not sparse.unpack(sparse.pack(x), x).any()


def small(policy, *, heads=4, dtype=torch.float64, **more):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=2, n_embd=16, bias=True)).to(dtype)
    base = {"base": policy.get("base", "float32")}
    if base["base"] != "float32":
        model.float()
    inject(model, LTEConfig(heads=heads, rank=2, alpha=8.0, **{**policy, **SPARSE, **more, **base}))
    return model


def move(model, step, scale=0.02):
    """Something that training might do to all trained numbers."""
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in dict.fromkeys(p for p in model.parameters() if p.requires_grad):
            p.add_(scale * torch.randn(p.shape, generator=draw, dtype=p.dtype))


def deltas(layer):
    """D_h of every head: what it has learned since its factors were last merged or owed."""
    A, B = layer.factors()
    return torch.stack([b @ a for a, b in zip(A, B, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "copies", "reset"])
def test_nothing_is_lost_only_late(name):
    """What merges have added to a weight, with what is owed, is the sum of all that heads have learned; copies too."""
    model = small(POLICIES[name])
    layers, copies = headed(model), replicas(model)
    before = {n: layer.master().clone() for n, layer in layers.items()}
    start = {(n, k): c.get_parameter(k).detach().mean(0) for n, c in copies.items() for k in c.own_names()}
    sums = {n: 0 for n in layers} | {key: 0 for key in start}
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0.0))
    for step in range(5):
        held = {(n, k): copies[n].get_parameter(k).detach().clone() for n, k in start}
        move(model, step)
        for n, layer in layers.items():
            sums[n] = sums[n] + layer.scale * deltas(layer).mean(0)
        for n, k in start:
            sums[n, k] = sums[n, k] + (copies[n].get_parameter(k).detach() - held[n, k]).mean(0)
        merge(model, optimizer=optimizer, seed=step)
    for n, layer in layers.items():
        owed = layer.scale * layer.feedback.mean(0)
        assert owed.norm() > 0.1 * sums[n].norm()
        torch.testing.assert_close(layer.master() - before[n] + owed, sums[n], rtol=0, atol=1e-12)
    for (n, k), first in start.items():
        stack, anchor = copies[n].get_parameter(k).detach(), copies[n].get_buffer(f"anchor_{k}")
        torch.testing.assert_close(stack.mean(0) - first, sums[n, k], rtol=0, atol=1e-12)
        assert 0.1 < (stack.mean(0) - anchor).norm() / sums[n, k].norm() < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copies", "copies with momentum"])
def test_copies_move_by_what_the_others_say_beyond_their_own(name):
    """Against the definition, number by number: a ← a + step(mean c), p_h ← p_h + step(mean c) − c_h."""
    model = small(POLICIES[name], dtype=torch.float32)
    stacks = {(n, k): c.get_parameter(k).detach().clone() for n, c in replicas(model).items() for k in c.own_names()}
    anchors = {key: stack[0].clone() for key, stack in stacks.items()}
    velocity = {key: torch.zeros_like(a) for key, a in anchors.items()}
    mu = POLICIES[name].get("outer_momentum", 0.0)
    for step in range(4):
        move(model, step)
        for n, k in stacks:
            p, a = replicas(model)[n].get_parameter(k).detach().clone(), anchors[n, k]
            told = torch.stack([said(row - a, 8, 3) for row in p])
            velocity[n, k] = mu * velocity[n, k] + told.mean(0)
            by = told.mean(0) + mu * velocity[n, k] if mu else told.mean(0)
            stacks[n, k], anchors[n, k] = p + by - told, a + by
        merge(model)
        for n, k in stacks:
            found = replicas(model)[n]
            torch.testing.assert_close(found.get_parameter(k).detach(), stacks[n, k], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.get_buffer(f"anchor_{k}"), anchors[n, k], rtol=1e-5, atol=1e-6)
            assert not torch.equal(found.get_parameter(k)[0], found.get_parameter(k)[1])


KINDS = {
    "linear": (lambda: nn.Linear(7, 5), (8, 3, 7), {}),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (4, 7), {}),
    "sequential": (lambda: nn.Linear(7, 5), (6, 7), {"mode": "sequential"}),
    "reset": (lambda: nn.Linear(7, 5), (8, 7), {"reset": "B"}),
    "biases have heads": (lambda: nn.Linear(7, 5), (8, 3, 7), {"trainable": ("biases",), "vectors": ("biases",)}),
    "convolution": (lambda: nn.Conv2d(3, 5, 3, padding=1, stride=2), (8, 3, 6, 7), {}),
    "convolution, sequential": (lambda: nn.Conv2d(3, 5, 3, bias=False), (6, 3, 6, 7), {"mode": "sequential"}),
    "GPT-2's": (lambda: Conv1D(5, 7), (8, 3, 7), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_computes_with_what_it_owes(kind):
    """Chunk h meets W + s·(D_h + e_h), as one layer with that weight would; and so do the gradients."""
    make, shape, options = KINDS[kind]
    torch.manual_seed(1)
    plain = make().double()
    bias = None if plain.bias is None else plain.bias.detach().clone()
    model = inject(nn.Sequential(copy.deepcopy(plain)), LTEConfig(4, 2, 4.0, **{"trainable": (), **SPARSE, **options}))
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0.0))
    for step in range(2):
        move(model, step, scale=0.5)
        merge(model, optimizer=optimizer)
    move(model, 3, scale=0.5)
    layer = model[0]
    assert float(layer.feedback.abs().max()) > 0.01
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parts = [t.detach().requires_grad_() for t in (layer.lora_A, layer.lora_B)]
    A0, B0 = layer.offsets()
    products = parts[1] @ parts[0] - (0 if A0 is None else B0 @ A0)
    own = layer.master() + layer.scale * (products + layer.feedback)  # (H, m, n)
    chunks = x.chunk(4)
    if "sequential" in kind:
        own, chunks = own.mean(0, keepdim=True), [x]
    elif kind == "biases have heads":
        heads = model[0].bias
        biases = heads.weight + heads.scale * (heads.lora_B @ heads.lora_A - heads.offsets()[1] @ heads.offsets()[0]
                                               + heads.feedback)[..., 0]  # fmt: skip
    expected = []
    for h, chunk in enumerate(chunks):
        b = biases[h].detach() if kind == "biases have heads" else bias
        if isinstance(plain, nn.Conv2d):
            W = own[h].view_as(plain.weight)
            expected.append(torch.nn.functional.conv2d(chunk, W, b, plain.stride, plain.padding))
        else:
            expected.append(torch.nn.functional.linear(chunk, own[h], b))
    y, reference = model.train()(x), torch.cat(expected)
    torch.testing.assert_close(y, reference, rtol=0, atol=1e-12)
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), [x, layer.lora_A, layer.lora_B])
    dx, dA, dB = torch.autograd.grad((reference * weights).sum(), [x, *parts])
    torch.testing.assert_close(found[0], dx, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], layer.heads * dA, rtol=0, atol=1e-11)
    torch.testing.assert_close(found[2], layer.heads * dB, rtol=0, atol=1e-11)
    whole = (layer.master() + layer.scale * (products + layer.feedback).mean(0)).detach()
    torch.testing.assert_close(layer.effective_weight(), layer.in_own_shape(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "4bit"])
def test_what_is_owed_is_not_rounded_away(base):
    """A thousandth of W, under autocast: W and what is owed are added before either is rounded to bfloat16."""
    torch.manual_seed(0)
    model = inject(
        nn.Sequential(nn.Linear(64, 96, bias=False)), LTEConfig(4, 2, 4.0, trainable=(), base=base, **SPARSE)
    )
    layer, x = model[0], torch.eye(64).repeat(4, 1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        without = model(x).float()
        layer.feedback.normal_(std=1e-3 * float(layer.master().std()) / layer.scale)
        apart = (model(x).float() - without).view(4, 64, 96).mT
    owed = layer.scale * layer.feedback
    assert float((apart * owed).sum() / owed.square().sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["linear", "sequential", "convolution", "convolution, sequential", "GPT-2's"])
def test_nothing_more_is_saved_for_the_backward_pass(kind):
    """The weights that heads compute with are made again; the model's own tensors are no matter."""
    make, shape, options = KINDS[kind]
    plain, x, saved = make(), torch.randn(shape, requires_grad=True), []
    for more in ({}, SPARSE):
        model = inject(
            nn.Sequential(copy.deepcopy(plain)), LTEConfig(4, 2, 4.0, **{"trainable": (), **options, **more})
        )
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
        kept = {}

        def keep(t, own=own, kept=kept):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(x)
        y.sum().backward()
        saved.append(sum(n for n, _ in kept.values()))
    assert saved[1] <= saved[0]


@pytest.mark.slow
@pytest.mark.parametrize("later", [{}, {"merge_delay": 2}])
@pytest.mark.parametrize("name", ["frozen", "copies", "in 4 bits"])
def test_a_sparse_merge_changes_no_evaluated_function(name, later):
    model = small(POLICIES[name], **later)
    merger = Merger(model, 3)
    x = torch.randint(0, 40, (4, 9))
    for step in range(10):
        move(model, step, scale=0.1)
        before = model.eval()(x[:, :-1])
        merger.step()
        exact = before.dtype == torch.float64
        torch.testing.assert_close(model(x[:, :-1]), before, rtol=0, atol=1e-12 if exact else 1e-4)
        with averaged(model):
            torch.testing.assert_close(model(x[:, :-1]), before, rtol=0, atol=1e-12 if exact else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_a_merge_adds_what_the_messages_say_and_training_goes_on_from_there(name):
    """Against the definition, layer by layer: W + step(s·mean_h C(e_h + D_h)), and what was not said is owed."""
    model = small(POLICIES[name], dtype=torch.float32)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0.0))
    merge(model, optimizer=optimizer)
    velocity = {n: torch.zeros(layer.matrix_shape) for n, layer in headed(model).items()}
    for step in range(3):
        move(model, step)
        expected, rest = {}, {}
        for n, layer in headed(model).items():
            owed = layer.feedback + deltas(layer)
            told = torch.stack([said(x, 8, 3) for x in owed])
            delta, rest[n] = layer.scale * told.mean(0), owed - told
            if layer.config.outer:
                mu, eta = layer.config.outer_momentum, layer.config.outer_lr
                velocity[n] = mu * velocity[n] + delta
                delta = eta * (delta + mu * velocity[n])
            expected[n] = layer.master() + delta
        merge(model, optimizer=optimizer, seed=step)
        for n, layer in headed(model).items():
            torch.testing.assert_close(layer.master(), expected[n], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.feedback, rest[n], rtol=1e-5, atol=1e-6)
            assert float(deltas(layer).abs().max()) < 1e-6


def test_averaged_and_the_plain_model_have_what_is_owed():
    model = small(POLICIES["copies"])
    move(model, 1)
    merge(model)
    with averaged(model):
        plain = merged_state_dict(model)
    assert not any("feedback" in n or "anchor" in n for n in plain)
    name = "transformer.h.0.mlp.c_fc"
    layer, wte = model.get_submodule(name), model.transformer.wte
    torch.testing.assert_close(plain[f"{name}.weight"], layer.master() + layer.scale * layer.feedback.mean(0))
    torch.testing.assert_close(plain["transformer.wte.weight"], wte.weight.detach().mean(0))
    assert not torch.allclose(plain[f"{name}.weight"], layer.master())
    assert not torch.allclose(plain["transformer.wte.weight"], wte.anchor_weight)
    assert plain["lm_head.weight"] is plain["transformer.wte.weight"]
    unload(model)
    for n, value in model.state_dict().items():
        torch.testing.assert_close(value, plain[n], rtol=0, atol=1e-12)


def test_a_layers_own_merge_leaves_nothing_owed():
    layer = headed(small(POLICIES["frozen"]))["transformer.h.0.mlp.c_fc"]
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.feedback.normal_()
    before = layer.effective_weight()
    layer.merge()
    torch.testing.assert_close(layer.effective_weight(), before, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.master(), before, rtol=0, atol=1e-12)
    assert float(layer.owed().abs().max()) < 1e-12


def test_a_state_with_feedback_is_cut_put_together_and_grows_with_its_heads():
    model = small(POLICIES["copies"])
    move(model, 1)
    merge(model)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0.0))
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    larger = small(POLICIES["copies"], heads=8)
    grown = HeadShards(larger, torch.optim.AdamW(param_groups(larger, lr=1, rest_lr=1, weight_decay=0)))
    larger.load_state_dict(grown.scatter(state)["model"])
    for n, layer in headed(model).items():
        assert torch.equal(larger.get_submodule(n).feedback[2:4], layer.feedback[1:2].expand(2, -1, -1))
    assert torch.equal(larger.transformer.wte.weight[6], model.transformer.wte.weight[3])


def test_a_process_alone_saves_what_its_own_heads_owe():
    """As if it held the heads 2 and 3 of four: all that these have learned, nothing of the lost, the merged W."""
    model = small(POLICIES["copies"])
    move(model, 1)
    merge(model)
    own = small(POLICIES["copies"], heads=4)
    own.load_state_dict(model.state_dict())
    for m in own.modules():
        if hasattr(m, "first_head"):
            m.first_head, m.heads = 2, 2
            for key, tensor in [*m._parameters.items(), *m._buffers.items()]:
                per_head = key.startswith(("lora_", "merged_", "feedback")) or (
                    m in replicas(own).values() and key in m.names()
                )
                if tensor is not None and per_head:
                    tensor.data = tensor.data[2:4].clone() if len(tensor) == 4 else tensor.data
    move(own, 5)
    shards = HeadShards(own, torch.optim.AdamW(param_groups(own, lr=1, rest_lr=1, weight_decay=0)))
    saved = shards.alone({"model": dict(own.state_dict()), "optimizer": {"state": {}, "param_groups": []}})["model"]
    for n, layer in headed(model).items():
        now = own.get_submodule(n)
        A0, B0 = now.offsets()
        learned = now.lora_B.detach() @ now.lora_A.detach() - B0 @ A0
        torch.testing.assert_close(saved[f"{n}.feedback"][2:], layer.feedback[2:] + learned, rtol=0, atol=1e-12)
        assert not saved[f"{n}.feedback"][:2].any()
        assert not saved[f"{n}.lora_B"].any()
        assert torch.equal(saved[f"{n}.merged_A"], saved[f"{n}.lora_A"])
    wte = own.transformer.wte
    for tied in ("transformer.wte", "lm_head"):
        assert all(torch.equal(row, wte.anchor_weight) for row in saved[f"{tied}.weight"][:2])
        assert torch.equal(saved[f"{tied}.weight"][2:], wte.weight)
    merges, rows = shards.own_rows({"others": {"merger": {"merges": 7}}})
    assert merges == 7
    assert {n for n in saved if "feedback" in n} | {"transformer.wte.weight", "lm_head.weight"} <= rows.keys()
    for n, (first, part) in rows.items():
        assert first == 2
        assert torch.equal(saved[n][2:], part)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "turns"), [(2, 2), (5, 5), (40, 13)])
def test_layers_in_turn_are_merged_once_in_every_interval(every, turns):
    """Thirteen: four linear layers and their biases, three norms and two embeddings with copies; lm_head is tied."""
    model = small(POLICIES["copies"], merge_density=1.0)
    merger, times = Merger(model, every, in_turn=True), {}
    for name, m in [*headed(model).items(), *replicas(model).items()]:

        def count(*args, name=name, take=m.take, **more):  # fmt: skip
            times.setdefault(name, []).append(merger.steps)
            return take(*args, **more)

        m.take = count
    said_so = [merger.step() for _ in range(3 * every)]
    assert len(times) == 13
    assert "lm_head" not in times
    assert all(len(t) == 3 and t[1] - t[0] == t[2] - t[1] == every for t in times.values()), times
    assert len({t[0] for t in times.values()}) == turns == sum(said_so) / 3
    assert max(t[0] for t in times.values()) == every


def test_in_turn_every_layers_function_stays_and_the_model_of_all_is_the_same():
    """Exact merges change no evaluated function, however they are spread."""
    model = small(POLICIES["frozen"], merge_density=1.0)
    twin = copy.deepcopy(model)
    one, other = Merger(model, 4, in_turn=True), Merger(twin, 4)
    x = torch.randint(0, 40, (4, 9))
    for step in range(8):
        for m, merger in ((model, one), (twin, other)):
            move(m, step)
            merger.step()
        losses = [next_token_loss(m.eval(), (x[:, :-1], x[:, 1:])).item() for m in (model, twin)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)


# -- merges that take place later


@pytest.mark.slow
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("delay", [1, 3, 4])
@pytest.mark.parametrize("name", ["frozen", "copies"])
def test_at_every_step_of_a_late_merge_nothing_is_lost(name, delay, in_turn):
    """W with what is owed and learned is the sum of all that heads and copies did, messages under way or not."""
    model = small(POLICIES[name], merge_delay=delay)
    merger = Merger(model, 4, in_turn=in_turn)
    layers, copies = headed(model), replicas(model)
    first = {n: layer.master().clone() for n, layer in layers.items()}
    moved = {(n, k): c.get_parameter(k).detach().mean(0) for n, c in copies.items() for k in c.own_names()}
    under_way = []
    for step in range(13):
        before = {(n, k): copies[n].get_parameter(k).detach().clone() for n, k in moved}
        move(model, step)
        for n, k in moved:
            moved[n, k] = moved[n, k] + (copies[n].get_parameter(k).detach() - before[n, k]).mean(0)
        merger.step()
        for n, layer in layers.items():
            under_way.append(layer.under_way)
            whole = layer.scale * (layer.lora_B.detach() @ layer.lora_A.detach()).mean(0)
            owed = layer.scale * layer.owed().mean(0)
            torch.testing.assert_close(layer.master() - first[n] + owed, whole, rtol=0, atol=1e-12)
        for n, k in moved:
            torch.testing.assert_close(copies[n].get_parameter(k).detach().mean(0), moved[n, k], rtol=0, atol=1e-12)
    assert any(under_way)
    assert (delay == 4 and not in_turn) or not all(under_way)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "vectors and momentum", "in 4 bits", "copies"])
def test_a_late_merge_adds_what_was_said_and_until_then_all_is_owed(name):
    """Against the definition: at step t a head says c = C(e + BA − B'A'); at t + d W takes it, and e is less by c."""
    model = small(POLICIES[name], merge_delay=2, dtype=torch.float32)
    merger = Merger(model, 5)
    layers, copies = headed(model), replicas(model)
    W = {n: layer.master().clone() for n, layer in layers.items()}
    offset = {n: layer.offsets()[1] @ layer.offsets()[0] for n, layer in layers.items()}
    e = {n: torch.zeros_like(layer.feedback) for n, layer in layers.items()}
    anchors = {(n, k): c.get_buffer(f"anchor_{k}").clone() for n, c in copies.items() for k in c.own_names()}
    velocity, message = {n: torch.zeros_like(w) for n, w in W.items()}, {}
    for step in range(1, 18):
        move(model, step)
        stacks = {(n, k): copies[n].get_parameter(k).detach().clone() for n, k in anchors}
        for n, layer in layers.items():
            if step > 5 and step % 5 == 2:
                delta = layer.scale * message[n].mean(0)
                if layer.config.outer:
                    mu, eta = layer.config.outer_momentum, layer.config.outer_lr
                    velocity[n] = mu * velocity[n] + delta
                    delta = eta * (delta + mu * velocity[n])
                W[n], e[n] = W[n] + delta, e[n] - message[n]
            if step % 5 == 0:
                product = layer.lora_B.detach() @ layer.lora_A.detach()
                e[n], offset[n] = e[n] + product - offset[n], product
                message[n] = torch.stack([said(x, 8, 3) for x in e[n]])
        for key, a in anchors.items():
            if step > 5 and step % 5 == 2:
                stacks[key] = stacks[key] + message[key].mean(0) - message[key]
                anchors[key] = a + message[key].mean(0)
            if step % 5 == 0:
                message[key] = torch.stack([said(row - a, 8, 3) for row in stacks[key]])
        assert merger.step() == (step > 5 and step % 5 == 2)
        for n, layer in layers.items():
            A0, B0 = layer.offsets()
            torch.testing.assert_close(layer.master(), W[n], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(B0 @ A0, offset[n], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(layer.feedback, e[n], rtol=1e-4, atol=1e-6)
        for n, k in anchors:
            torch.testing.assert_close(copies[n].get_parameter(k).detach(), stacks[n, k], rtol=1e-5, atol=1e-6)
    assert merger.merges == 3


def later(policy="copies", heads=4):
    """A model, its merger, and an optimizer of its parameters, at a step where messages are under way."""
    model = small(POLICIES[policy], merge_delay=3, heads=heads)
    return model, Merger(model, 4), torch.optim.AdamW(param_groups(model, lr=1, rest_lr=1, weight_decay=0.0))


@pytest.mark.slow
def test_a_state_with_messages_under_way_goes_on_and_grows_with_its_heads():
    model, merger, optimizer = later()
    for step in range(6):
        move(model, step)
        merger.step()
    again, resumed, _ = later()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(merger.state_dict()))
    larger, grown, its = later(heads=8)
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    larger.load_state_dict(HeadShards(larger, its).scatter(state)["model"])
    grown.load_state_dict(merger.state_dict())
    for m, clock in ((model, merger), (again, resumed), (larger, grown)):
        assert clock.step() is True
        assert not any(layer.under_way for layer in headed(m).values())
    for n, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[n], value), n
    for n, layer in headed(model).items():
        torch.testing.assert_close(larger.get_submodule(n).master(), layer.master(), rtol=0, atol=1e-12)
    torch.testing.assert_close(larger.transformer.wte.weight[6], model.transformer.wte.weight[3], rtol=0, atol=1e-12)


def test_a_process_alone_owes_what_it_had_under_way():
    model, merger, optimizer = later()
    for step in range(6):
        move(model, step)
        merger.step()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": {"state": {}, "param_groups": []},
        "others": {"merger": merger.state_dict()},
    }
    assert merger.state_dict()["under_way"][0][0] == 4
    shards = HeadShards(model, optimizer)
    saved = shards.alone(state)
    assert saved["others"]["merger"] == {"steps": 6, "merges": 0, "under_way": []}
    for n, layer in headed(model).items():
        assert torch.equal(saved["model"][f"{n}.feedback"], layer.owed())
        assert layer.sent_message.any()
        assert not saved["model"][f"{n}.sent_message"].any()
        assert torch.equal(saved["model"][f"{n}.merged_A"], saved["model"][f"{n}.lora_A"])
    wte = model.transformer.wte
    assert torch.equal(saved["model"]["transformer.wte.weight"], wte.weight)
    assert not saved["model"]["transformer.wte.message_weight"].any()
    _, rows = shards.own_rows(saved)
    assert all(torch.equal(saved["model"][n], part) for n, (_, part) in rows.items())


def test_a_merge_out_of_turn_is_refused_while_messages_are_under_way():
    model, merger, _ = later("frozen")
    for _ in range(4):
        merger.step()
    for out_of_turn in (lambda: merge(model), headed(model)["transformer.h.0.attn.c_attn"].merge):
        with pytest.raises(RuntimeError, match="c_attn has messages under way: its Merger takes them"):
            out_of_turn()
    for _ in range(3):
        merger.step()
    merge(model)  # at once, whatever the delay
    assert not any(layer.under_way for layer in headed(model).values())
    with pytest.raises(ValueError, match="merge_delay 3 must be at most every, 2"):
        Merger(model, 2)


def test_a_training_can_be_put_back_before_messages_were_sent():
    model, merger, _ = later()
    before = copy.deepcopy((model.state_dict(), merger.state_dict()))
    ends = []
    for _ in range(2):
        model.load_state_dict(before[0])
        merger.load_state_dict(before[1])
        for step in range(5):
            move(model, step)
            merger.step()
        assert all(layer.under_way for layer in headed(model).values())
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_what_is_due_again_before_it_has_arrived_is_merged_first():
    """A run that goes on with more merges than it was begun with."""
    model, merger, _ = later()
    for step in range(4):
        move(model, step)
        merger.step()
    sooner = Merger(model, 5)
    sooner.load_state_dict(merger.state_dict())
    assert sooner.step() is True
    assert sooner.state_dict() == {"steps": 5, "merges": 1, "under_way": [[5, [*headed(model), *replicas(model)]]]}


def test_what_has_arrived_when_a_process_is_lost_is_merged():
    """So that survivors on both sides of a late merge have the same to save. Here everything has arrived at once."""
    model, merger, optimizer = later()
    twin, clock, _ = later()
    for step in range(7):
        for m, c in ((model, merger), (twin, clock)):
            if step < 6 or m is twin:
                move(m, step, scale=0.02 if step < 6 else 0)
                c.step()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": {"state": {}, "param_groups": []},
        "others": {"merger": merger.state_dict()},
    }
    (sent,) = merger._under_way
    sent.has_ended = lambda: False  # as where a process was lost before all had arrived: nothing is merged, all is owed
    saved = HeadShards(model, optimizer, None, merger).alone(state)
    assert saved["others"]["merger"] == {"steps": 6, "merges": 0, "under_way": []}
    del sent.has_ended
    saved = HeadShards(model, optimizer, None, merger).alone(state)
    assert saved["others"]["merger"] == {"steps": 6, "merges": 1, "under_way": []}
    for n, layer in headed(twin).items():
        assert not layer.under_way
        assert torch.equal(saved["model"][f"{n}.weight"], layer.weight)
        torch.testing.assert_close(saved["model"][f"{n}.feedback"], layer.owed(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("options", "match"), [
    ({"merge_delay": -1, "merge_density": 0.1}, "merge_delay must be 0 or a number of optimizer steps, got -1"),
    ({"merge_delay": 1}, "merge_delay is for sparse merges: give a merge_density below 1"),
    ({"merge_delay": 1, "merge_density": 0.1, "reset": "B"}, "merge_delay needs reset='none', got 'B'"),
    ({"merge_density": 0.0}, "merge_density must be above 0"), ({"merge_density": 1.1}, "merge_density"),
    ({"merge_density": 0.1, "merge_bits": 0}, "merge_bits must be from 1 to 8"),
    ({"merge_density_replicas": 0.1, "replicas": ("norms",)}, "is for sparse merges of copies"),
    ({"merge_density_replicas": 0.1, "merge_density": 0.1}, "is for sparse merges of copies"),
    ({"merge_density_replicas": 1.0, "merge_density": 0.1, "replicas": ("norms",)}, "must be above 0 and below 1"),
])  # fmt: skip
def test_refused_options(options, match):
    with pytest.raises(ValueError, match=match):
        LTEConfig(**options)


def test_a_model_without_numbers_too_few_for_a_chunk():
    """Layers below 256 numbers, odd sizes: everything is one chunk, and all of it comes through in time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=False)).double()
    inject(model, LTEConfig(heads=2, rank=2, alpha=4.0, merge_density=0.02, merge_bits=4, trainable=()))
    move(model, 0, scale=0.3)
    before = model[0].master().clone()
    delta = model[0].mean_delta()
    assert delta.any()
    for _ in range(60):  # nothing new: what is owed is paid
        merge(model)
    torch.testing.assert_close(model[0].master() - before, delta, rtol=0, atol=0.05 * float(delta.abs().max()))


def test_the_readme_has_what_waiting_for_a_slow_link_costs():
    text = (ROOT / "packages" / "lte" / "README.md").read_text()
    links = read_json(ROOT / "benchmarks" / "results" / "lte_overlap.json")["links"]
    assert [link["megabits_per_second"] for link in links] == [None, 4, 2]
    for label, way in (("waited for", "waiting"), ("3 steps late", "3 steps late"), ("9 steps late", "9 steps late")):
        assert f"| {label} | " + " | ".join(f"{link[way]['of_no_merges'][1]:.2f}" for link in links) + " |" in text


def test_the_readme_has_what_sparse_merges_cost():
    """Each arm's bytes, mean loss and its mean, least and most against full training, seed by seed."""
    text = (ROOT / "packages" / "lte" / "README.md").read_text()
    found, hidden = (read_json(ROOT / "benchmarks" / "results" / f"lte_sparse{n}.json") for n in ("", "_hidden"))
    runs = [r for r in found["runs"] if r["use"] == "report"]
    full = {r["seed"]: r["loss"] for r in runs if r["arm"] == "full, two rates"}

    def gaps(arm, of):
        mine = [r for r in of if r["arm"] == arm and r["use"] == "report"]
        assert len(mine) == len(full) == 5
        return [100 * (r["loss"] / full[r["seed"]] - 1) for r in mine], statistics.mean(r["loss"] for r in mine)

    for arm, sent in found["bytes_per_step"].items():
        apart, loss = gaps(arm, runs)
        end = f"{statistics.mean(apart):+.1f} % ({min(apart):+.1f} to {max(apart):+.1f}) |".replace("-", "−")
        assert f"| {loss:.3f} | {end}" in text, arm
        assert f"| {arm} | {sent:,} |" in text
    before = [gaps(arm, hidden["runs"])[0] for arm in ("8 % in 2 bits", "3 % in 4 bits", "1 % in 2 bits")]
    assert "end {:.1f}, {:.1f} and {:.0f} % above".format(*map(statistics.mean, before)) in text
    (one,) = {round(gaps("full, one rate", runs)[1], 3)}
    assert f"| full training, one rate | {found['ddp_bytes_per_step']:,} | 100 % | {one:.3f} |" in text


@pytest.mark.parametrize("settings", [{}, SPARSE, {"base": "4bit"}])
def test_a_layer_at_two_places_is_cut_put_together_and_saved_alone_under_both_names(settings):
    def twice(heads):
        torch.manual_seed(0)
        layer, norm = nn.Linear(64, 64), nn.LayerNorm(64)
        model = nn.Sequential(layer, norm, layer, nn.Linear(64, 64))
        more = {"replicas": ("norms",), "trainable": ("norms",)}
        return inject(model, LTEConfig(heads=heads, rank=2, alpha=4.0, **more, **settings))

    model, larger = twice(2), twice(4)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.05)
    merge(model)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.05)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0.0))
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "others": {}}
    assert {"0.lora_A", "2.lora_A"} <= state["model"].keys()
    grown = HeadShards(larger, torch.optim.AdamW(param_groups(larger, lr=1, rest_lr=1, weight_decay=0)))
    larger.load_state_dict(grown.scatter(state)["model"])
    x = torch.randn(4, 64)
    torch.testing.assert_close(larger.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    saved = HeadShards(model, optimizer).alone(state)["model"]
    both = [name.removeprefix("0.") for name in saved if name.startswith("0.")]
    assert all(torch.equal(saved[f"0.{name}"], saved[f"2.{name}"]) for name in both)
    twice(2).load_state_dict(saved)
