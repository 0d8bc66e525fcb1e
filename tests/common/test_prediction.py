"""The predicted ledger against the measured one, to the byte."""

import gc
from contextlib import nullcontext

import pytest
import torch
from memtrain_common.measuring.memory import SavedActivations, measure
from memtrain_common.measuring.peak import memory_in_use
from memtrain_common.measuring.prediction import LiveBytes, predict
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
