"""The predicted ledger against the measured one, to the byte."""

import gc
import warnings
from collections import namedtuple
from contextlib import nullcontext
from types import MappingProxyType

import pytest
import torch
from memtrain_common.errors import UserError
from memtrain_common.measuring import rnn_workspace
from memtrain_common.measuring.memory import SavedActivations, measure
from memtrain_common.measuring.peak import memory_in_use
from memtrain_common.measuring.prediction import LiveBytes, dense_activations, fake_step, predict
from memtrain_common.measuring.rnn_workspace import rule_holds
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from torch import nn
from torch.utils.checkpoint import checkpoint

CONFIG = GPTConfig(block_size=24, vocab_size=53, n_layer=2, n_head=3, n_embd=48, dropout=0.1)


def gpt():
    return GPT(CONFIG)


def gpt_loss(model):
    return next_token_loss(model, torch.randint(0, 53, (2, 5, 24)).unbind())


class Convolutions(nn.Module):
    """What a CNN has: convolution, batch norm (with buffers), ReLU, pooling, a checkpointed part."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(7, 5, 3, groups=1), nn.ReLU(), nn.Conv2d(5, 5, 1))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = checkpoint(self.second, self.first(x), use_reentrant=False)
        return self.head(x.mean((2, 3)))


def convolution_loss(model):
    return nn.functional.cross_entropy(model(torch.randn(3, 3, 17, 19)), torch.zeros(3, dtype=torch.long))


def in_bf16(model):
    with torch.autocast("cpu", torch.bfloat16):
        return gpt_loss(model)


class InBackward(torch.optim.Optimizer):
    """SGD with momentum that takes each gradient when it comes, and lets it go."""

    def __init__(self, model):
        super().__init__(model.parameters(), {})
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self._take)

    def _take(self, p):
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        self.state[p]["momentum"].add_(p.grad)
        p.data.add_(self.state[p]["momentum"], alpha=-1e-3)
        p.grad = None

    def step(self):
        pass


def frozen_norms():
    model = gpt()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln" not in name)
    return model


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, num_key_value_heads=2, use_cache=False, **sizes))


def llama_loss(model):
    tokens, mask = torch.ones(3, 24).long(), torch.ones(3, 24).long()
    return model(input_ids=tokens, attention_mask=mask, labels=tokens).loss


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def offload():
    return torch.autograd.graph.save_on_cpu()


def real_step(build, loss, optimizer, saving):
    """-> the measured ledger, and the largest sum of live bytes in a second step."""
    with LiveBytes() as live:
        model = build()
        made = optimizer(model)
        for step in range(2):
            live.peak_bytes = live.bytes
            recording = SavedActivations(model) if step == 0 else nullcontext()
            with saving(), recording:
                value = loss(model)
            if step == 0:
                activations = recording.by_layer()
                del recording
            value.backward()
            del value
            made.step()
            if step == 0:
                ledger = measure(model, made, activations)
            made.zero_grad(set_to_none=True)
    return ledger, live.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "loss", "optimizer", "saving"),
    [
        pytest.param(gpt, gpt_loss, adamw, nullcontext, id="gpt"),
        pytest.param(gpt, in_bf16, adamw, nullcontext, id="gpt-autocast"),
        pytest.param(frozen_norms, gpt_loss, sgd, nullcontext, id="gpt-frozen-norms"),
        pytest.param(gpt, gpt_loss, adamw, offload, id="gpt-offload"),
        pytest.param(gpt, gpt_loss, InBackward, nullcontext, id="gpt-stepped-in-the-backward-pass"),
        pytest.param(llama, llama_loss, adamw, nullcontext, id="llama-of-transformers"),
        pytest.param(Convolutions, convolution_loss, sgd, nullcontext, id="cnn-checkpoint"),
    ],
)
def test_predicted_is_measured_to_the_byte(build, loss, optimizer, saving):
    predicted = predict(build, loss, optimizer, saving=saving)
    ledger, peak_bytes = real_step(build, loss, optimizer, saving)
    assert predicted.ledger == ledger
    assert predicted.ledger.total("activations") > 0
    assert abs(predicted.peak_bytes - peak_bytes) <= 0.001 * peak_bytes  # transformers keeps small tables between calls
    assert predicted.peak_bytes > sum(predicted.ledger.totals[c] for c in ("weights", "optimizer", "buffers"))


@pytest.mark.slow
def test_a_model_that_exists_keeps_its_buffers_and_plain_tensors():
    def build():
        model = Convolutions()
        model.table = torch.arange(9.0)  # no buffer: transformers' rotary embedding has such
        return model

    model = build()
    assert predict(lambda: model, convolution_loss, sgd).ledger == predict(build, convolution_loss, sgd).ledger
    assert predict(lambda: model, convolution_loss, sgd).ledger.total("buffers") > 0


@pytest.mark.slow
def test_a_model_that_exists_is_left_alone_and_predicted_with_its_ties():
    model = gpt()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    predicted = predict(lambda: model, gpt_loss, adamw)
    assert torch.equal(torch.get_rng_state(), random)
    assert predicted.ledger == predict(gpt, gpt_loss, adamw).ledger
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_micro_batches_add_to_one_gradient_but_not_to_the_activations():
    one, three = predict(gpt, gpt_loss, adamw), predict(gpt, gpt_loss, adamw, micro_batches=3)
    assert one.ledger == three.ledger
    assert three.peak_bytes > one.peak_bytes  # the second forward pass runs beside the first one's gradients


@pytest.mark.slow
def test_what_would_not_fit_is_predicted_without_being_allocated():
    before = memory_in_use(torch.device("cpu"))
    big = GPTConfig(block_size=2048, vocab_size=50304, n_layer=36, n_head=20, n_embd=1280)
    predicted = predict(lambda: GPT(big), lambda m: next_token_loss(m, torch.zeros(2, 4, 2048).long().unbind()), adamw)
    assert predicted.ledger.total("optimizer") > 5 << 30
    assert predicted.peak_bytes > 20 << 30
    assert memory_in_use(torch.device("cpu")) - before < 1 << 30


def test_conditions_on_numbers_go_the_way_of_a_healthy_run():
    """nn.init.trunc_normal_ draws until no value is outside: an ``any`` reads False, an ``all`` True."""

    def build():
        model = nn.Linear(4, 4)
        nn.init.trunc_normal_(model.weight)
        assert bool((model.weight == model.weight).all())
        assert not bool(model.weight.isnan().any())
        assert model.weight.sum().item() == 1.0
        return model

    assert predict(build, lambda m: m(torch.randn(2, 4)).sum()).ledger.total("activations") == 2 * 4 * 4


def test_a_padded_batch_keeps_more_than_is_predicted_of_it():
    """transformers leaves out a mask of ones; a fake mask reads as one (packages/common/README.md says so)."""
    model, held = llama(), {}
    for name, length in (("full", 24), ("padded", 15)):
        mask = (torch.arange(24) < torch.tensor([[24], [24], [length]])).long()
        tokens = torch.ones(3, 24).long()

        def loss(model, mask=mask, tokens=tokens):
            return model(input_ids=tokens, attention_mask=mask, labels=tokens).loss

        with SavedActivations(model) as saved:
            value = loss(model)
        held[name] = sum(saved.by_layer().values())
        del value
    predicted = predict(llama, llama_loss).ledger.total("activations")
    assert predicted == held["full"]
    assert 1.02 < held["padded"] / predicted < 1.15


class Drops(nn.Module):
    """Stochastic depth as timm and transformers build it: rates read out of a linspace, and nothing where one is 0."""

    def __init__(self, most, ways):
        super().__init__()
        rates = torch.linspace(0, most, 7, device="cpu")
        self.rates = {
            "item": lambda: [x.item() for x in rates],
            "tolist": lambda: rates.tolist(),
            "parts": lambda: [r for part in rates.split([3, 4]) for r in part.tolist()],
        }[ways]()
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in self.rates)

    def forward(self, x):
        for rate, layer in zip(self.rates, self.layers, strict=True):
            y = torch.tanh(layer(x))
            if rate > 0:
                y = y * y.new_empty(len(x), 1).bernoulli_(1 - rate)
            x = x + y
        return x.sum()


@pytest.mark.slow
@pytest.mark.parametrize("most", [0.0, 0.25])
@pytest.mark.parametrize("ways", ["item", "tolist", "parts"])
def test_rates_read_out_of_a_linspace_are_what_they_would_be(most, ways):
    expected = torch.linspace(0, most, 7).tolist()
    made = []

    def build():
        made.append(Drops(most, ways))
        return made[-1]

    found = predict(build, lambda m: m(torch.empty(5, 9)))
    assert made[0].rates == pytest.approx(expected, rel=1e-6)
    model = Drops(most, ways)
    with SavedActivations(model) as saved:
        loss = model(torch.randn(5, 9))
    assert found.ledger.total("activations") == sum(saved.by_layer().values())
    del loss


def test_a_linspace_that_was_changed_reads_as_any_tensor():
    read = []

    def build():
        changed = torch.linspace(0, 0.5, 3)
        changed.mul_(2)
        read.extend(x.item() for x in changed)
        return nn.Linear(2, 2)

    predict(build, lambda m: m(torch.empty(1, 2)).sum())
    assert read == [1.0] * 3


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen before"])
def test_what_counts_finds_its_own_garbage_and_leaves_the_collector_as_it_was(frozen):
    if frozen:
        gc.freeze()
    try:
        with LiveBytes() as live, LiveBytes():
            cycle = [torch.ones(1000)]
            cycle.append(cycle)
            del cycle
            live.restart()
            assert live.bytes == 0
            assert gc.get_freeze_count() > 0
        assert (gc.get_freeze_count() > 0) is frozen
    finally:
        gc.unfreeze()


def test_only_the_outermost_asks_whether_something_is_frozen(monkeypatch):
    """To ask takes Python as long as there is much of it: tens of milliseconds with torch and transformers."""
    asked, ask = [], gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: asked.append(1) or ask())
    for _ in range(2):
        with LiveBytes(), LiveBytes():
            pass
        with pytest.raises(ValueError), LiveBytes():
            raise ValueError
    assert len(asked) == 4


def adamw_of(model):
    return torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize(
    "sizes",
    [
        {"input_size": 64, "hidden_size": 128},
        {"input_size": 17, "hidden_size": 33, "num_layers": 2, "dropout": 0.1},
        {"input_size": 300, "hidden_size": 40, "bidirectional": True},
        {"input_size": 20, "hidden_size": 256, "batch_first": True, "bias": False},
        {"input_size": 16, "hidden_size": 24, "proj_size": 8},
    ],
)
def test_an_lstm_is_predicted_with_onednns_workspace(sizes):
    if not rule_holds():
        pytest.skip("this processor's oneDNN keeps another workspace; predict warns of it")
    build = lambda: nn.LSTM(**sizes)  # noqa: E731
    loss = lambda m: m(torch.randn(9, 7, m.input_size))[0].square().mean()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "LSTM with projections")
        predicted = predict(build, loss, adamw_of)
        ledger, peak_bytes = real_step(build, loss, adamw_of, nullcontext)
    assert predicted.ledger == ledger
    assert predicted.peak_bytes == pytest.approx(peak_bytes, rel=0.001)


@pytest.mark.parametrize("known", [True, False], ids=["bfloat16", "another rule"])
def test_an_unknown_workspace_is_warned_of(known, monkeypatch):
    monkeypatch.setattr(rnn_workspace, "rule_holds", lambda: known)

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=known):
            return model(torch.randn(4, 3, 16))[0].float().sum()

    with pytest.warns(UserWarning, match="workspace that oneDNN keeps of an LSTM"):
        predict(lambda: nn.LSTM(16, 16), loss)


def test_a_workspace_is_kept_only_for_a_backward_pass():
    def loss(model):
        with torch.no_grad():
            model[1](torch.randn(9, 7, 64))
        return model[0](torch.randn(2, 4)).sum()

    build = lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(64, 128))  # noqa: E731
    _, peak_bytes = real_step(build, loss, sgd, nullcontext)
    assert predict(build, loss, sgd).peak_bytes == peak_bytes


def test_a_sparse_gradient_is_warned_of():
    build = lambda: nn.Embedding(50, 16, sparse=True)  # noqa: E731
    loss = lambda m: m(torch.randint(0, 50, (4, 12))).sum()  # noqa: E731
    with pytest.warns(UserWarning, match="sparse gradient of weight is predicted as 0 bytes"):
        predict(build, loss)


def square(model):
    return model(torch.randn(4, 16)).square().mean()


@pytest.mark.parametrize(
    ("build", "loss", "word"),
    [
        (lambda: nn.Linear(16, 16), lambda m: m(torch.randn(4, 16))[torch.rand(4) > 0].sum(), r"nonzero.*torch\.where"),
        (
            lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 50, [10, 30]),
            lambda m: m(torch.randn(24, 16), torch.randint(0, 50, (24,))).loss,
            "nonzero gives a tensor whose size",
        ),
        (
            lambda: nn.Linear(16, 10),
            lambda m: nn.functional.ctc_loss(
                m(torch.randn(12, 4, 16)).log_softmax(-1), torch.randint(1, 10, (4, 3)), torch.full((4,), 12),
                torch.full((4,), 3),
            ),
            "_ctc_loss",
        ),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)), square, "allclose looks at the numbers"),
        (lambda: nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16)), square, "lazy module cannot be predicted"),
    ],
    ids=["mask", "adaptive softmax", "ctc", "orthogonal", "lazy"],
)  # fmt: skip
def test_what_needs_numbers_is_refused_by_name(build, loss, word):
    with pytest.raises(UserError, match=word):
        predict(build, loss, adamw_of)


def test_a_lazy_model_that_exists_is_refused_until_it_has_sizes():
    model = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(UserError, match=r"lazy module \(LazyLinear\)"):
        predict(lambda: model, square)
    model(torch.randn(1, 16))
    assert predict(lambda: model, square).ledger.total("weights") == 4 * (16 * 8 + 8)


@pytest.mark.parametrize("foreach", [False, True])
def test_nadam_reads_its_product(foreach):
    """It divides by 1 minus a number that begins as 1 and is multiplied."""
    build = lambda: nn.Linear(16, 16)  # noqa: E731
    nadam = lambda m: torch.optim.NAdam(m.parameters(), foreach=foreach)  # noqa: E731
    ledger, _ = real_step(build, square, nadam, nullcontext)
    assert predict(build, square, nadam).ledger == ledger


def test_a_number_that_began_as_1_reads_its_product_until_it_is_changed_otherwise():
    with fake_step():
        number, other = torch.tensor(1.0), torch.tensor(1.0)
        assert number.item() == 1
        number *= 0.5
        torch._foreach_mul_([number, other], [0.5, 0.75])
        assert (number.item(), other.item()) == (0.25, 0.75)
        number += 3
        torch._foreach_add_([other], 1)
        assert (number.item(), other.item()) == (1, 1)


Pair = namedtuple("Pair", ("x", "y"))


@pytest.mark.parametrize("extra", [3, None, "id-1", ["a", 2], {"name": "b"}, 0.5])
def test_a_batch_may_hold_what_is_no_tensor(extra):
    """As it may in fit."""
    seen = []

    def loss(model, batch):
        seen.append(batch)
        (x, y), more = batch[0], batch[1]
        return (model(x) - y).square().mean() + (more == 1)

    batch = [Pair(torch.randn(8, 4), torch.randn(8, 1)), extra]
    assert dense_activations(nn.Linear(4, 1), loss, batch)
    assert type(seen[0]) is list
    assert type(seen[0][0]) is Pair
    assert seen[0][1] == extra


def test_a_mapping_is_a_batch():
    batch = MappingProxyType({"x": torch.randn(8, 4), "name": "a"})
    assert dense_activations(nn.Linear(4, 1), lambda m, b: m(b["x"]).square().mean(), batch)
