"""Heads on models that are put together otherwise than blocks of linear layers: layers with two names, padded
embeddings, other memory formats, hooks, and what a refused or unloaded model is afterwards."""

import copy

import lte
import pytest
import torch
from lte import LTEConfig, Merger, clip_grad_norm_per_head, inject, merge, merged_state_dict, param_groups, unload
from torch import nn

TWO = LTEConfig(heads=2, rank=2, alpha=4.0)


def trained(model, steps, batch, every=1):
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, rest_lr=1e-2, weight_decay=0.0))
    merger = Merger(model, every)
    for _ in range(steps):
        model(batch).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        merger.step()
    return model


@pytest.mark.parametrize("padding", [0, 3])
def test_the_padding_row_of_every_copy_stays(padding):
    plain = nn.Sequential(nn.Embedding(5, 4, padding_idx=padding), nn.Linear(4, 2))
    config = LTEConfig(heads=4, rank=2, replicas=("embeddings",))
    model = inject(copy.deepcopy(plain), config)
    batch = torch.tensor([[1, 2, padding, padding]] * 8)
    model(batch).sub(1).square().mean().backward()
    assert not model[0].weight.grad[:, padding].any()
    assert model[0].weight.grad[:, 1].all()  # every copy's, of a row that is looked up
    trained(model, 5, batch)
    assert torch.equal(merged_state_dict(model)["0.weight"][padding], plain[0].weight[padding])


class Shared(nn.Module):
    """An embedding and a norm that answer to two names, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.encoder = nn.Module()
        self.encoder.words, self.encoder.linear = self.words, nn.Linear(4, 4)
        self.first, self.lm_head = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.second, self.lm_head.weight = self.first, self.words.weight

    def forward(self, x):
        return self.lm_head(self.second(self.encoder.linear(self.first(self.encoder.words(x)))))


@pytest.mark.parametrize("how", [{"vectors": ("norms",)}, {"replicas": ("embeddings", "norms", "skipped")}])
def test_a_layer_with_two_names_has_its_heads_under_both(how):
    model = inject(Shared(), LTEConfig(heads=2, rank=2, **how))
    assert model.first is model.second
    assert model.words is model.encoder.words
    assert type(model.first) is not nn.LayerNorm
    x = torch.randint(0, 7, (4, 3))
    trained(model, 5, x, every=2)  # something is unmerged at the end
    state, answer = merged_state_dict(model), model.eval()(x)
    assert set(state) == set(Shared().state_dict())
    assert torch.equal(state["words.weight"], state["encoder.words.weight"])
    fresh = Shared().eval()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), answer, rtol=1e-5, atol=1e-6)
    unload(model)
    assert model.first is model.second
    assert type(model.first) is nn.LayerNorm
    assert model.words.weight is model.lm_head.weight is model.encoder.words.weight
    torch.testing.assert_close(model(x), answer, rtol=1e-5, atol=1e-6)


def test_unload_trains_what_was_trained_before():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[1].bias.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    inject(model, LTEConfig(heads=2, rank=2, trainable=()))
    assert not model[0].weight.requires_grad
    unload(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("sparse", [{}, {"merge_density": 0.5}, {"outer_momentum": 0.5}])
def test_convolutions_in_channels_last(sparse):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2, 1))
    config = LTEConfig(heads=2, rank=2, **sparse)
    torch.manual_seed(2)
    model = inject(copy.deepcopy(plain), config)
    torch.manual_seed(2)
    last = inject(copy.deepcopy(plain).to(memory_format=torch.channels_last), config)
    x = torch.randn(4, 3, 6, 6)
    for m, batch in ((model, x), (last, x.to(memory_format=torch.channels_last))):
        trained(m, 3, batch, every=2)
        merge(m)
    later = model.to(memory_format=torch.channels_last)  # cast after inject
    torch.testing.assert_close(last.eval()(x), later.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "config", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), TWO, "1: a convolution with groups=8"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
            LTEConfig(heads=2, rank=2, vectors=("norms",)),
            "BatchNorm2d",
        ),
        (
            nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)),
            LTEConfig(heads=2, rank=2, replicas=("norms",)),
            "BatchNorm1d has buffers",
        ),
        (
            nn.Sequential(nn.Linear(3, 8), nn.Embedding(4, 3, max_norm=1.0)),
            LTEConfig(heads=2, rank=2, replicas=("embeddings",)),
            "Embedding with max_norm",
        ),
    ],
)
def test_a_refused_model_is_as_it_was(model, config, said):
    before, state = [*model.named_modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        inject(model, config)
    assert [*model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    inject(model, LTEConfig(heads=2, rank=2, exclude=("1",)))  # what the sentence advises can be followed


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: inject(nn.Linear(4, 4), TWO), "the model is one Linear"),
        (lambda: inject(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), TWO), "1.weight has no size yet"),
        (lambda: LTEConfig(exclude="lm_head"), "exclude must be a tuple of words"),
        (lambda: LTEConfig(trainable=None), "trainable must be a tuple of words"),
        (lambda: LTEConfig(heads=2.0), "heads must be a whole number"),
        (lambda: LTEConfig(merge_bits=2.5, merge_density=0.5), "merge_bits must be a whole number"),
        (lambda: LTEConfig(alpha="8"), "alpha must be a number"),
        (lambda: LTEConfig(alpha=float("inf")), "alpha must be positive and finite"),
        (lambda: merge(inject(nn.Sequential(nn.Linear(4, 4)), TWO), only=["1"]), "only names '1', which has no heads"),
        (lambda: inject(nn.Sequential(nn.Linear(4, 4)), TWO)(torch.randn(4)), r"0 needs \(batch"),
        (lambda: inject(nn.Sequential(nn.Conv2d(3, 4, 1)), TWO)(torch.randn(3, 4, 4)), r"0 needs \(batch"),
    ],
)
def test_refused_in_a_sentence(build, said):
    with pytest.raises(ValueError, match=said):
        build()


def test_no_model_is_refused():
    with pytest.raises(TypeError, match="and an LTEConfig, got Linear and dict"):
        inject(nn.Linear(2, 2), {"heads": 2})


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.first(x))


def test_another_method_than_forward_has_a_batch_of_its_own():
    model = inject(Encoder(), TWO)
    model(torch.randn(8, 4))
    assert model.last(model.first(torch.randn(4, 4))).shape == (4, 4)


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_of_others_are_called_before_and_after(kind):
    model, calls = Encoder(), []
    register = {
        "forward": model.first.register_forward_hook,
        "pre": model.first.register_forward_pre_hook,
        "backward": model.first.register_full_backward_hook,
    }[kind]
    handle = register(lambda *_: calls.append(1))
    x = torch.randn(4, 4, requires_grad=True)
    for change in (lambda m: inject(m, TWO), unload, lambda m: handle.remove()):
        change(model)
        calls.clear()
        model(x).sum().backward()
        assert len(calls) == (change.__name__ != "<lambda>" or type(model.first) is not nn.Linear)


def test_of_frozen_heads_nothing_is_missed_and_of_evaluation_it_is_said(recwarn):
    model = inject(Encoder(), TWO)
    model.first.requires_grad_(False)
    trained(model, 2, torch.randn(4, 4))
    assert not [w for w in recwarn if "first backward pass" in str(w.message)]
    model = inject(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), TWO).eval()
    with pytest.warns(UserWarning, match="reached no head: heads train in training mode alone"):
        trained(model, 1, torch.randn(4, 4))


def test_vectors_keep_their_digits_under_autocast():
    model = inject(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), LTEConfig(heads=2, rank=4, vectors=("norms",)))
    vector = model[1].weight
    vector.lora_B.data.normal_()
    vector.merge()
    vector.lora_B.data.add_(1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = vector()
    assert torch.equal(cast, vector())


def test_a_double_stays_one_under_autocast():
    model = inject(nn.Sequential(nn.Linear(4, 4)).double(), TWO)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 4, dtype=torch.float64)).dtype == torch.float64


class OddNames(nn.Module):
    """Layers that are called as parameters are, and a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.bias(self.weight(x))

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


def test_layers_named_as_parameters_and_a_state_that_is_no_tensor():
    model = inject(OddNames(), TWO)
    x = torch.randn(4, 4)
    trained(model, 3, x, every=2)
    answer = model.eval()(x)
    assert set(merged_state_dict(model)) == set(OddNames().state_dict())
    torch.testing.assert_close(unload(model)(x), answer)


def test_clipping_without_gradients_is_a_norm_of_zero():
    model = inject(nn.Sequential(nn.Linear(4, 4)), TWO)
    assert clip_grad_norm_per_head(model, 1.0) == 0
    plain = nn.Linear(4, 4)
    plain(torch.ones(1, 4)).sum().backward()
    assert clip_grad_norm_per_head(plain, 1e-3) > 1
    assert lte.clip_grad_norm_per_head(plain, 1.0) < 1.1e-3


def test_weights_without_heads_are_told_of_models_without_numbered_blocks_too():
    model = nn.Module()
    model.conv, model.fc = nn.Conv1d(3, 64, 3), nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="have no heads: conv.weight"):
        inject(model, TWO)


def test_copies_are_not_cut_along_a_table():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
            self.table = nn.Parameter(torch.randn(12, 4))

        def forward(self, x):
            return self.linear(x) + self.norm(self.table).mean(0)

    model = inject(Tables(), LTEConfig(heads=4, rank=2, replicas=("norms",)))
    with pytest.raises(ValueError, match="norm meets 12 rows, no multiple of the batch of 8"):
        model(torch.randn(8, 4))


def test_a_part_that_was_injected_is_unloaded_from_the_whole():
    whole = nn.ModuleDict({"frozen": nn.Linear(4, 4), "codes": nn.Module(), "inner": Encoder()})
    whole["frozen"].requires_grad_(False)
    whole["codes"].table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    before = {n: p.requires_grad for n, p in whole.named_parameters()}
    inject(whole["inner"], TWO)
    unload(whole)
    assert {n: p.requires_grad for n, p in whole.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in whole.modules())


def test_sequential_heads_take_a_single_vector():
    model = inject(nn.Sequential(nn.Linear(8, 4)), LTEConfig(heads=2, rank=2, mode="sequential"))
    assert model(torch.randn(8)).shape == (4,)


def test_weights_that_are_read_in_training_are_not_said_to_be_evaluated():
    class Reads(Encoder):
        def forward(self, x):
            return nn.functional.linear(x, self.first.weight + self.scale) + self.last.weight.sum()

    model = Reads()
    model.scale = nn.Parameter(torch.zeros(()))
    inject(model, TWO)
    with pytest.warns(UserWarning, match="did not reach heads of first, last"):
        trained(model, 1, torch.randn(4, 4))


class Twice(nn.Module):
    """A linear layer under two names, and a block that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again, self.blocks = self.first, nn.ModuleList([Encoder6()] * 2)

    def forward(self, x):
        x = self.again(self.first(x).relu())
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Encoder6(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


@pytest.mark.parametrize("more", [{}, {"vectors": ("biases",)}, {"merge_density": 0.5}, {"reset": "B"}])
def test_linear_layers_with_two_names_and_blocks_called_twice(more):
    plain = Twice()
    names, parameters = set(plain.state_dict()), [n for n, _ in plain.named_parameters()]
    model = inject(copy.deepcopy(plain), LTEConfig(heads=2, rank=2, alpha=4.0, **more))
    assert model.first is model.again
    assert model.blocks[0] is model.blocks[1]
    assert type(model.first) is lte.LTELinear
    x = torch.randn(4, 6)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, rest_lr=1e-2, weight_decay=0.0))
    merger = Merger(model, 2, optimizer=optimizer)
    for _ in range(5):
        model(x).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        merger.step()
    state, answer = merged_state_dict(model), model.eval()(x)
    assert set(state) == names
    assert state["first.weight"] is state["again.weight"]
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), answer, rtol=1e-5, atol=1e-6)
    merge(model, optimizer=optimizer)
    torch.testing.assert_close(model(x), answer, rtol=1e-5, atol=1e-6)
    unload(model)
    assert type(model.first) is nn.Linear
    assert model.first is model.again
    assert model.blocks[0][2] is model.blocks[1][2]
    assert [n for n, _ in model.named_parameters()] == parameters
    torch.testing.assert_close(model(x), answer, rtol=1e-5, atol=1e-6)


def test_a_layer_with_two_names_is_found_by_either_and_tied_weights_are_still_refused():
    def with_heads(config):
        return {n for n, m in inject(Twice(), config).named_modules() if isinstance(m, lte.LTELinear)}

    assert "first" not in with_heads(LTEConfig(heads=2, rank=2, exclude=("again",)))
    assert with_heads(LTEConfig(heads=2, rank=2, targets=("again",))) == {"first"}
    model = Twice()
    model.last.weight = model.first.weight
    with pytest.raises(ValueError, match=r"first shares its weight with last\.weight and cannot have heads"):
        inject(model, TWO)


class Partly(nn.Module):
    """Embeddings, norms and a linear layer of which the model trains a part."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 6), nn.Embedding(5, 6)
        self.frozen_norm, self.norm, self.last = nn.LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        for p in (
            self.positions.weight,
            *self.frozen_norm.parameters(),
            self.norm.bias,
            self.last.weight,
            self.fc.bias,
        ):
            nn.init.normal_(p.requires_grad_(False))

    def forward(self, x):
        x = self.frozen_norm(self.words(x) + self.positions(x % 5))
        return self.out(self.last(self.norm(self.fc(x))))


FROZEN = ("positions.weight", "frozen_norm.weight", "frozen_norm.bias", "norm.bias", "last.weight", "fc.bias")


@pytest.mark.parametrize("sparse", [{}, {"merge_density": 0.5}])
@pytest.mark.parametrize(
    "how",
    [{"replicas": ("embeddings", "norms")}, {"replicas": ("embeddings",), "vectors": ("norms", "biases")}],
    ids=["copies", "vectors"],
)
def test_what_the_model_does_not_train_has_no_copies_and_no_heads(how, sparse):
    plain = Partly()
    flags = {n: p.requires_grad for n, p in plain.named_parameters()}
    model = inject(copy.deepcopy(plain), LTEConfig(heads=3, rank=2, alpha=6.0, **how, **sparse))
    assert type(model.positions) is nn.Embedding
    assert type(model.frozen_norm) is nn.LayerNorm
    assert all(not p.requires_grad for n, p in model.named_parameters() if n in FROZEN)
    x = torch.randint(0, 7, (6, 4))
    torch.testing.assert_close(model(x), plain(x))
    trained(model, 5, x, every=2)
    state, answer = merged_state_dict(model), model.eval()(x)
    assert set(state) == set(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value) == (name in FROZEN), name
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), answer, rtol=1e-5, atol=1e-6)
    unload(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    torch.testing.assert_close(model(x), answer, rtol=1e-5, atol=1e-6)


def test_a_frozen_vector_that_two_norms_share_stays_one():
    plain = Partly()
    plain.last.weight = plain.norm.bias
    names = [n for n, _ in plain.named_parameters()]
    for how in ({"vectors": ("norms",)}, {"replicas": ("norms",)}):
        model = unload(inject(copy.deepcopy(plain), LTEConfig(heads=2, rank=2, **how)))
        assert [n for n, _ in model.named_parameters()] == names
        assert model.last.weight is model.norm.bias


class Tokens(nn.Module):
    """As GPT-2's: one row of positions for the whole batch."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(9, 32, dtype=dtype), nn.Embedding(5, 32, dtype=dtype)
        self.norm, self.fc = nn.LayerNorm(32, dtype=dtype), nn.Linear(32, 16, dtype=dtype)

    def forward(self, x):
        return self.fc(self.norm(self.wte(x) + self.wpe(torch.arange(x.shape[1])[None])))


@pytest.mark.parametrize("norms", ["replicas", "vectors"])
def test_exclude_keeps_embeddings_and_norms_whole(norms):
    x = torch.randint(0, 9, (4, 5))
    kinds = {"replicas": ("embeddings", "norms")} if norms == "replicas" else {"replicas": ("embeddings",)}
    more = {"vectors": ("norms",)} if norms == "vectors" else {}
    model = inject(Tokens(), LTEConfig(heads=2, rank=2, **kinds, **more))
    with pytest.raises(ValueError, match=r"wpe meets 1 rows, no multiple of the batch of 4.*add it to exclude"):
        model(x)
    model = inject(Tokens(), LTEConfig(heads=2, rank=2, exclude=("lm_head", "wpe", "norm"), **kinds, **more))
    assert type(model.wpe) is nn.Embedding
    assert type(model.norm) is nn.LayerNorm
    assert type(model.wte) is lte.Replicas
    assert model.wpe.weight.requires_grad
    assert model.norm.weight.requires_grad
    trained(model, 3, x)


class Pair(nn.Module):
    def __init__(self, second):
        super().__init__()
        self.fc, self.second = nn.Linear(8, 8), second


@pytest.mark.parametrize(
    ("second", "replicas", "said"),
    [
        (lambda: nn.Bilinear(8, 8, 4), "skipped", "second: Bilinear takes input1, input2, .*add it to exclude, or"),
        (lambda: nn.Embedding(8, 8, sparse=True), "embeddings", "second: Embedding with sparse=True .*sparse=False"),
        (lambda: Positions(8, 8), "embeddings", "second: Positions takes input, position_ids, .*add it to exclude, or"),
    ],
)
def test_copies_of_what_they_cannot_answer_for_are_refused_by_name(second, replicas, said):
    with pytest.raises(ValueError, match=said):
        inject(Pair(second()), LTEConfig(heads=2, rank=2, replicas=(replicas,)))
    inject(Pair(second()), LTEConfig(heads=2, rank=2, replicas=(replicas,), exclude=("second",)))


class GatedNorm(nn.Module):
    """As Mamba's, which does without a gate."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x, gate=None):
        return nn.functional.rms_norm(x if gate is None else x * gate, x.shape[-1:], self.weight)


def test_a_norm_that_may_take_more_has_copies():
    model = inject(nn.Sequential(nn.Linear(8, 8), GatedNorm(8)), LTEConfig(heads=2, rank=2, replicas=("norms",)))
    model(torch.randn(4, 8)).square().sum().backward()
    assert model[1].weight.grad.shape == (2, 8)


class Positions(nn.Embedding):
    """As OPT's, which is given the places of the tokens."""

    def forward(self, input, position_ids=None):
        return super().forward(input)


def test_skipped_linear_layers_have_copies_though_they_are_excluded():
    model = inject(Pair(nn.Linear(8, 4)), LTEConfig(heads=2, rank=2, exclude=("second",), replicas=("skipped",)))
    assert type(model.second) is lte.Replicas


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("more", [{}, {"merge_density": 0.1}, {"merge_density": 0.1, "outer_lr": 0.5}])
def test_copies_of_a_bfloat16_model_are_summed_in_float32(more, when):
    """A mean of four copies, or a copy beside what merges made of it, does not fit into 16 bits."""
    torch.manual_seed(1)
    config = LTEConfig(heads=4, rank=4, alpha=8.0, exclude=("wpe",), replicas=("embeddings", "norms"), **more)
    model = inject(Tokens(torch.bfloat16 if when == "before" else torch.float32), config).to(torch.bfloat16)
    kept = {n: t.dtype for m in (model.wte, model.norm) for n, t in m.state_dict().items()}
    assert set(kept.values()) == {torch.float32}
    assert model.wpe.weight.dtype == torch.bfloat16
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    merger, moved, x = Merger(model, 2), 0.0, torch.randint(0, 9, (8, 5))
    for _ in range(8):
        y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = model.wte.means()["weight"]
        merger.step()
        moved = max(moved, float((model.wte.means()["weight"] - before).abs().max()))
    assert (moved < 1e-6) == ("outer_lr" not in more)
    answer, expected = model.eval()(x), merged_state_dict(model)["wte.weight"].bfloat16()
    assert answer.dtype == torch.bfloat16
    unload(model)
    assert model.wte.weight.dtype == (torch.bfloat16 if when == "before" else torch.float32)
    assert torch.equal(model.wte.weight.bfloat16(), expected)
    assert inject(Tokens(torch.bfloat16), config).double().wte.weight.dtype == torch.float64


@pytest.mark.parametrize("wrong", ["in a layer", "after all"])
def test_a_model_is_as_it_was_after_any_failure(wrong, monkeypatch):
    """Also of what is no refusal: two layers had heads and the third had none."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    before, flags = [*model.named_modules()], {n: p.requires_grad for n, p in model.named_parameters()}
    if wrong == "in a layer":
        made = []
        orthogonal = nn.init.orthogonal_

        def fails(t, *args):
            made.append(t)
            if len(made) > 4:  # two heads a layer
                raise NotImplementedError("orthogonal_")
            return orthogonal(t, *args)

        monkeypatch.setattr(nn.init, "orthogonal_", fails)
    else:
        monkeypatch.setattr(lte.injection, "say_what_has_no_heads", lambda *_: 1 / 0)
    with pytest.raises((NotImplementedError, ZeroDivisionError)):
        inject(model, LTEConfig(heads=2, rank=2, vectors=("norms",)))
    monkeypatch.undo()
    assert [*model.named_modules()] == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    trained(inject(model, TWO), 1, torch.randn(4, 4))


@pytest.mark.parametrize("how", [{}, {"replicas": ("embeddings", "norms")}, {"vectors": ("norms",)}])
def test_what_is_set_on_a_layer_is_there_under_heads(how):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.norm, self.fc = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)
            self.fc.gain, self.norm.gain, self.wte.gain, self.fc.rows = 2.0, 3.0, 4.0, []

        def forward(self, x):
            x = self.norm(self.wte(x) * self.wte.gain) * self.norm.gain
            return self.fc(x * (x.shape[-1] / self.wte.embedding_dim)) * self.fc.gain

    plain = Reads()
    rows, x = plain.fc.rows, torch.randint(0, 5, (4, 3))
    expected = plain(x)
    model = inject(plain, LTEConfig(heads=2, rank=2, **how))
    torch.testing.assert_close(model(x), expected)
    assert model.fc.rows is rows
    model.fc.gain = 5.0
    model.norm.other = 1
    del model.wte.gain
    unload(model)
    assert (model.fc.gain, model.norm.gain) == (5.0, 3.0)
    assert model.fc.rows is rows
    assert not hasattr(model.wte, "gain")
    assert type(model.fc) is nn.Linear
    assert {*vars(model.fc)} - {"gain", "rows"} == {*vars(nn.Linear(4, 4))}
