"""A linear layer and its cross-entropy as one operation: exact, on unmodified code, logits used elsewhere or not."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from backrazor import Razor, RazorError
from backrazor.internals import saved_tensor_hook
from backrazor.ops import logits as lazy
from backrazor.ops import loss as fused
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

B, T, K, V = 3, 20, 6, 37
FUSED = "LinearCrossEntropyBackward"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Heads of 37 classes, in chunks of 13 rows."""
    monkeypatch.setattr(lazy, "LEAST_CLASSES", 30)
    monkeypatch.setattr(fused, "CHUNK", 13 * V)


def targets():
    t = torch.randint(0, V, (B, T))
    t[0, 3] = t[2, -1] = t[1, 0] = -100
    return t


def flat(z, t, **settings):
    return F.cross_entropy(z.view(-1, z.size(-1)), t.view(-1), **settings)


def shifted(z, t):
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), t[..., 1:].contiguous().view(-1))


# How models and libraries write it.
FORMS = {
    "view": flat,
    "float, as transformers": lambda z, t: flat(z.float() if z.dtype != torch.float64 else z, t),
    "shift, as transformers did": shifted,
    "shift, as nanoGPT's descendants": lambda z, t: F.cross_entropy(z[:, :-1].flatten(0, 1), t[:, 1:].flatten()),
    "sum": lambda z, t: flat(z, t, reduction="sum") / 7,
    "one a row": lambda z, t: flat(z, t, reduction="none").square().sum(),
    "label smoothing": lambda z, t: flat(z, t, label_smoothing=0.2),
    "label smoothing, sum": lambda z, t: flat(z, t, label_smoothing=0.2, reduction="sum"),
    "label smoothing, one a row": lambda z, t: flat(z, t, label_smoothing=0.2, reduction="none").square().sum(),
    "another index is ignored": lambda z, t: flat(z, t.clamp(min=0), ignore_index=0),
    "classes second": lambda z, t: F.cross_entropy(z.transpose(1, 2), t),
    "classes second, smoothed": lambda z, t: F.cross_entropy(z.permute(0, 2, 1), t, label_smoothing=0.1),
    "classes second, one a row": lambda z, t: F.cross_entropy(z.mT, t, reduction="none").square().sum(),
    "a module": lambda z, t: nn.CrossEntropyLoss()(z.reshape(-1, V), t.reshape(-1)),
    "chosen rows": lambda z, t: F.cross_entropy(z[t != -100], t[t != -100]),
    "rows by number": lambda z, t: F.cross_entropy(z[:, 5], t[:, 5]),
    "rows by places": lambda z, t: F.cross_entropy(z[torch.tensor([2, 0])].reshape(-1, V), t[[2, 0]].reshape(-1)),
    "dtype by to": lambda z, t: flat(z.to(torch.float64), t).to(z.dtype),
}

OTHER_KERNELS = ("classes second", "classes second, smoothed", "classes second, one a row", "rows by number")
"""Softmax over another dimension than the last, and a product of very few rows."""


def inputs(dtype=torch.float64, bias=True):
    x = torch.randn(B, T, K, dtype=dtype, requires_grad=True)
    weight = nn.Parameter(torch.randn(V, K, dtype=dtype))
    return [x, weight, *([nn.Parameter(torch.randn(V, dtype=dtype))] if bias else [])]


def within(call, given, razor=None):
    with razor or Razor(0.1):
        return call(given)


def through(form, t):
    return lambda given: form(F.linear(given[0] * 1.0, *given[1:]), t)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_pytorchs(form, bias):
    given, t = inputs(bias=bias), targets()
    call = through(FORMS[form], t)
    plain, got = call(given), within(call, given)
    if form in OTHER_KERNELS:
        torch.testing.assert_close(plain, got, rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(plain, got)
    names, node = set(), got.grad_fn
    while node is not None and not hasattr(node, "variable"):
        names.add(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert FUSED in names
    assert "AddmmBackward0" not in names
    expected = torch.autograd.grad(plain, given)
    for again in (True, False):  # the graph may be kept, and used again
        for a, b in zip(expected, torch.autograd.grad(got, given, retain_graph=again), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    t = targets()
    for settings in ({}, {"label_smoothing": 0.3}, {"reduction": "none"}, {"reduction": "sum"}):

        def call(*given, settings=settings):
            with Razor(0.1):
                return flat(F.linear(given[0] * 1.0, *given[1:]), t, **settings)

        assert torch.autograd.gradcheck(call, inputs(), fast_mode=True)


def test_random_shapes_and_chunks(monkeypatch):
    for seed in range(25):
        torch.manual_seed(seed)
        rows, width = (int(torch.randint(1, 12, ())) for _ in range(2))
        classes = int(torch.randint(max(30, 3 * width + 1), 80, ()))
        monkeypatch.setattr(fused, "CHUNK", int(torch.randint(1, 300, ())))
        given = [
            torch.randn(rows, width, dtype=torch.float64, requires_grad=True),
            nn.Parameter(torch.randn(classes, width, dtype=torch.float64)),
        ]
        t = torch.randint(0, classes, (rows,))
        call = through(lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1 * (len(t) % 2)), t)
        plain, got = call(given), within(call, given)
        torch.testing.assert_close(plain, got, rtol=1e-14, atol=1e-14)  # few rows take another kernel
        for a, b in zip(torch.autograd.grad(plain, given), torch.autograd.grad(got, given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["view", "float, as transformers", "label smoothing", "shift, as transformers did"])
def test_other_types_err_no_more_than_pytorch(form, dtype):
    given, t = inputs(dtype), targets()
    call = through(FORMS[form], t)
    plain, got = call(given), within(call, given)
    assert plain.dtype == got.dtype
    assert torch.equal(plain, got)
    exact = [g.detach().double().requires_grad_() for g in given]
    truth = torch.autograd.grad(call(exact), exact)
    for a, b, c in zip(torch.autograd.grad(plain, given), torch.autograd.grad(got, given), truth, strict=True):
        assert b.dtype == dtype
        assert (b - c).norm() <= 1.3 * (a - c).norm() + 1e-6 * c.norm()


@pytest.mark.parametrize("form", ["view", "float, as transformers"])
def test_autocast(form):
    given, t = inputs(torch.float32), targets()
    call = through(FORMS[form], t)
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = call(given), within(call, given)
    assert plain.dtype == got.dtype
    assert torch.equal(plain, got)
    assert FUSED in got.grad_fn.name()
    exact = [g.detach().double().requires_grad_() for g in given]
    truth = torch.autograd.grad(call(exact), exact)
    for a, b, c in zip(torch.autograd.grad(plain, given), torch.autograd.grad(got, given), truth, strict=True):
        assert b.dtype == torch.float32
        assert (b - c).norm() <= 1.3 * (a - c).norm()


def test_pytorchs_own_function_is_met():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.15")
    x, weight, bias = inputs()
    t = targets().view(-1)

    def call(given):
        return F.linear_cross_entropy(given[0].view(-1, K), given[1], t, linear_bias=given[2], label_smoothing=0.1)

    given = [x, weight, bias]
    plain, got = call(given), within(call, given)
    assert torch.equal(plain, got)
    assert FUSED in got.grad_fn.name()
    for a, b in zip(torch.autograd.grad(plain, given), torch.autograd.grad(got, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


USES = {
    "a term of the loss": lambda z, t: flat(z, t) + z.square().mean(),
    "looked at before": lambda z, t: (z.argmax(-1), flat(z, t))[1],
    "looked at without gradients": lambda z, t: (_without(z), flat(z, t))[1],
    "two losses": lambda z, t: flat(z, t) + shifted(z, t),
    "z loss": lambda z, t: flat(z, t) + 1e-2 * torch.logsumexp(z.view(-1, V), -1).square().mean(),
    "scaled": lambda z, t: flat(z / 3, t),
    "clamped": lambda z, t: flat(z.clamp(-3, 3), t),
    "changed in place": lambda z, t: flat(z.mul_(2), t),
    "changed through a view": lambda z, t: (z.view(-1, V).mul_(2), flat(z, t))[1],
    "changed after a view": lambda z, t: _change(z, t, lambda z: z.view(-1, V)),
    "changed after a copy": lambda z, t: _change(
        z, t, lambda z: z.contiguous().to(torch.float64)[:, 1:].reshape(-1, V)
    ),
    "classes cut off": lambda z, t: _cut(z, t),
    "weights of classes": lambda z, t: flat(z, t, weight=torch.arange(V, dtype=z.dtype)),
    "probabilities": lambda z, t: F.cross_entropy(z.view(-1, V), torch.softmax(z.detach().view(-1, V), -1)),
    "log_softmax": lambda z, t: F.nll_loss(F.log_softmax(z, -1).view(-1, V), t.view(-1)),
    "some classes": lambda z, t: flat(z[..., :30].contiguous(), t.clamp(max=29)),
    "joined": lambda z, t: F.cross_entropy(torch.cat([z, z]).view(-1, V), torch.cat([t, t]).view(-1)),
    "indexing as rows and classes": lambda z, t: z[0, 1:3, 4].sum() + z[..., -1].sum() + z[:, 1].sum() + z[1, 2].sum(),
    "an extension": lambda z, t: Extension.apply(z.view(-1, V), t.view(-1).clamp(min=0)),
}


def _without(z):
    with torch.no_grad():
        return z.argmax(-1), z.float().mean()


def _change(z, t, derive):
    seen = derive(z)
    z.mul_(2)
    rows = t.view(-1) if len(seen) == B * T else t[:, 1:].reshape(-1)
    return F.cross_entropy(seen, rows) + z.mean()


def _cut(z, t):
    z[..., V - 3 :] = -1e4
    return flat(z, t.clamp(max=V - 4))


class Extension(torch.autograd.Function):
    """A loss as a compiled extension would give it: the tensor goes past the functions of torch."""

    @staticmethod
    def forward(ctx, z, t):
        p = torch.softmax(z, -1)
        ctx.save_for_backward(p, t)
        return -p.gather(1, t[:, None]).log().sum()

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return g * (p - F.one_hot(t, p.shape[1])), None


@pytest.mark.parametrize("use", USES)
def test_logits_that_are_used_elsewhere_are_right(use):
    given, t = inputs(), targets()
    call = through(USES[use], t)
    plain, got = call(given), within(call, given)
    torch.testing.assert_close(plain, got, rtol=1e-13, atol=1e-13)
    dx, dweight, dbias = zip(torch.autograd.grad(plain, given), torch.autograd.grad(got, given), strict=True)
    torch.testing.assert_close(*dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*dbias, rtol=1e-12, atol=1e-12)
    assert dweight[1].isfinite().all()  # of the pruned x, as of any linear layer


def test_logits_look_like_the_tensor_that_they_stand_for():
    x, weight, bias = inputs()
    plain = F.linear(x, weight, bias)
    with Razor(0.1):
        z = F.linear(x, weight, bias)
        assert isinstance(z, torch.Tensor)
        assert isinstance(z, lazy.Logits)
        assert (z.shape, z.dtype, z.device, z.ndim, z.requires_grad) == (
            plain.shape,
            plain.dtype,
            plain.device,
            3,
            True,
        )
        assert (z.size(-1), z.numel(), len(z), z.is_floating_point()) == (V, plain.numel(), B, True)
        assert z.graph is None
        assert "grad_fn" in repr(z)
        assert z.graph is not None
    assert torch.equal(z, plain)
    assert torch.equal(z.detach(), plain)
    assert z.tolist() == plain.tolist()


def test_logits_may_be_used_after_the_context():
    given, t = inputs(), targets()
    plain = through(flat, t)(given)
    with Razor(0.1):
        z = F.linear(given[0] * 1.0, *given[1:])
    assert FUSED in flat(z, t).grad_fn.name()
    got = torch.autograd.grad(flat(z, t), given, retain_graph=True)
    for a, b in zip(torch.autograd.grad(plain, given), got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(flat(z, t), plain)
    hooked = []
    z.register_hook(lambda g: hooked.append(g.shape))
    flat(z, t).backward()
    assert hooked == [(B, T, V)]


def test_what_was_changed_too_early_is_an_error_in_words():
    x, weight, _ = inputs()
    for tensor in ("x", "weight"):
        with Razor(0.1):
            h = x * 1.0
            z = F.linear(h, weight)
            with torch.no_grad():
                (h if tensor == "x" else weight).mul_(2)
            with pytest.raises(RazorError, match="changed in place before its output was used"):
                flat(z, targets())


def test_bad_targets_are_pytorchs_errors():
    x, weight, _ = inputs()
    for bad in (V, -7):
        with Razor(0.1), pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
            F.cross_entropy(F.linear(x, weight).view(-1, V), torch.full((B * T,), bad))
    with Razor(0.1), pytest.raises((ValueError, RuntimeError), match=r"batch_size|size"):
        F.cross_entropy(F.linear(x, weight).view(-1, V), torch.zeros(5, dtype=torch.long))
    with Razor(0.1), pytest.raises(RuntimeError, match="invalid for input of size"):
        F.linear(x, weight).view(7, V)


def test_nothing_left_to_learn_from_is_not_a_number_as_in_pytorch():
    given = inputs()
    nothing = torch.full((B, T), -100)
    call = through(flat, nothing)
    plain, got = call(given), within(call, given)
    assert plain.isnan()
    assert got.isnan()
    for a, b in zip(torch.autograd.grad(plain, given), torch.autograd.grad(got, given), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_frozen_parts():
    t = targets()
    for frozen in ("x", "weight", "bias"):
        given = dict(zip(("x", "weight", "bias"), inputs(), strict=True))
        given[frozen].requires_grad_(False)
        wanted = [v for v in given.values() if v.requires_grad]
        call = through(flat, t)
        plain, got = call(list(given.values())), within(call, list(given.values()))
        assert torch.equal(plain, got)
        assert FUSED in got.grad_fn.name()
        for a, b in zip(torch.autograd.grad(plain, wanted), torch.autograd.grad(got, wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_gradients_and_at_keep_1_nothing_is_changed():
    given, t = inputs(), targets()
    call = through(flat, t)
    with torch.no_grad(), Razor(0.1):
        z = F.linear(*given)
        assert type(z) is torch.Tensor
        assert torch.equal(flat(z, t), call(given))
    for razor in (Razor(1), Razor(0.1, mode="paper")):
        assert FUSED not in within(call, given, razor).grad_fn.name()
    with pytest.raises(RazorError, match="second derivative"):
        torch.autograd.grad(within(call, given), given[0], create_graph=True)


def test_logits_do_not_outlive_their_use():
    given, t = inputs(), targets()
    gc.disable()
    try:
        with Razor(0.1):
            z = F.linear(*given)
            seen = weakref.ref(z)
            loss = flat(z, t)
            del z
        assert seen() is None
        loss.backward()
    finally:
        gc.enable()


class Tiny(nn.Module):
    """A language model with a tied head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, K)
        self.body = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, 2 * K), nn.GELU(), nn.Linear(2 * K, K), nn.LayerNorm(K))
        self.head = nn.Linear(K, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def test_a_tied_head():
    model, t = Tiny().double(), targets()
    tokens = t.clamp(min=0)
    plain = flat(model(tokens), t)
    with Razor(0.1):
        got = flat(model(tokens), t)
    assert torch.equal(plain, got)
    expected = torch.autograd.grad(plain, model.body[4].bias)
    torch.testing.assert_close(torch.autograd.grad(got, model.body[4].bias, retain_graph=True), expected)
    assert torch.autograd.grad(got, model.embedding.weight)[0].isfinite().all()


@pytest.mark.slow
def test_measured_equals_predicted_and_no_logits_are_kept():
    from memtrain_common.measuring.memory import SavedActivations
    from memtrain_common.measuring.prediction import predict

    def loss(model):
        t = torch.zeros(B, T, dtype=torch.long)
        return shifted(model(t), t)

    model = Tiny()
    with SavedActivations(model) as dense:
        kept = loss(model)
    plain = dense.by_layer()
    with SavedActivations(model) as saved, Razor(0.1):
        kept = loss(model)
    measured = saved.by_layer()
    del kept
    assert measured == predict(Tiny, loss, saving=lambda: Razor(0.1)).ledger.bytes_by_layer["activations"]
    assert sum(plain.values()) - sum(measured.values()) > 0.9 * B * (T - 1) * V * 4


@pytest.mark.slow
def test_no_more_than_a_chunk_of_logits_exists():
    from memtrain_common.measuring.prediction import fake_step

    with fake_step() as live:
        x, weight = torch.empty(4000, 8, requires_grad=True), nn.Parameter(torch.empty(1000, 8))
        lazy_least, lazy.LEAST_CLASSES, fused.CHUNK = lazy.LEAST_CLASSES, 900, 100_000
        try:
            live.peak_bytes = before = live.bytes
            with Razor(0.1):
                loss = F.cross_entropy(F.linear(x * 1.0, weight), torch.zeros(4000, dtype=torch.long))
            loss.backward()
        finally:
            lazy.LEAST_CLASSES = lazy_least
    assert live.peak_bytes - before < 4 * 100_000 * 4 + 4000 * 8 * 4 * 8
    assert 5 * (live.peak_bytes - before) < 4000 * 1000 * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpoints(reentrant):
    model, t = Tiny().double(), targets()
    tokens = t.clamp(min=0)
    expected = torch.autograd.grad(flat(model(tokens), t), model.head.weight)[0]
    with Razor(0.1):
        h = model.embedding(tokens)
        h = checkpoint(model.body, h, use_reentrant=reentrant)
        loss = flat(model.head(h), t)
    loss.backward()
    torch.testing.assert_close(model.head.weight.grad, expected)


CHECKPOINTED = {
    "one use": lambda z: z.logsumexp(-1).mean(),
    "no loss": lambda z: z * 2,
    "two uses": lambda z: z.logsumexp(-1) - z.exp().mean(-1),
    "of rows": lambda z: z.float()[:, 2:].flatten(0, 1).logsumexp(-1),
    "a product": lambda z: (z.tanh() @ z.new_ones(V, 3)).tanh(),
    "the loss": lambda z: flat(z, torch.arange(B * T) % V),
    "and the loss": lambda z: F.cross_entropy(z.flatten(0, 1), torch.arange(B * T) % V) + z.square().mean(),
    "another checkpoint": lambda z: checkpoint(torch.exp, z, use_reentrant=False) * z,
}


def remember_products(context, operation, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("where", ["within", "after", "used before", "all in a checkpoint"])
@pytest.mark.parametrize("function", CHECKPOINTED)
def test_logits_may_be_given_to_a_checkpoint(function, where):
    """Which counts what is saved in its first run and in the next one, so that neither may compute them."""
    given = inputs()
    selective = partial(create_selective_checkpoint_contexts, remember_products)

    def call(razor, **settings):
        def part():
            with razor:
                z = F.linear(given[0] * 1.0, *given[1:])
                if where == "used before":
                    assert z.argmax() is not None
                if where == "after":
                    return checkpointed(z)
                y = checkpointed(z)
                assert z.argmax() is not None
            return y

        def checkpointed(z):
            return checkpoint(CHECKPOINTED[function], z, use_reentrant=False, **settings)

        y = checkpoint(part, use_reentrant=False) if where == "all in a checkpoint" else part()
        return y, torch.autograd.grad(y.square().sum(), given)

    plain, expected = call(nullcontext())
    for settings in ({}, {"context_fn": selective}):
        y, got = call(Razor(0.1), **settings)
        torch.testing.assert_close(y, plain)
        for a, b in zip(expected[::2], got[::2], strict=True):  # dW is of the pruned x, as of any linear layer
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert saved_tensor_hook() is None


def test_predicted_logits_may_be_given_to_a_selective_checkpoint():
    """The modes of fake tensors stay on where those of the checkpoint are laid aside."""
    with torch._subclasses.FakeTensorMode(), Razor(0.1):
        given, selective = inputs(), partial(create_selective_checkpoint_contexts, remember_products)
        z = F.linear(given[0] * 1.0, *given[1:])
        y = checkpoint(lambda z: z.exp() + torch.ones(V), z, use_reentrant=False, context_fn=selective)
        y.sum().backward()
    assert given[0].grad.shape == given[0].shape


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Bert", "T5"])
def test_losses_of_transformers(family):
    import transformers as tr

    body = {
        "vocab_size": V,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    t = targets()
    model = {
        "GPT2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=T)),
        "Llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**body)),
        "Bert": lambda: tr.BertForMaskedLM(tr.BertConfig(**body)),
        "T5": lambda: tr.T5ForConditionalGeneration(
            tr.T5Config(
                vocab_size=V, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
                pad_token_id=0,
            )
        ),
    }[family]()  # fmt: skip
    batch = {"input_ids": t.clamp(min=0), "labels": t}
    for more in ({}, {"num_items_in_batch": torch.tensor(11)}) if family in ("GPT2", "Llama") else ({},):
        torch.manual_seed(1)
        plain = model(**batch, **more).loss
        torch.manual_seed(1)
        with Razor(0.1):
            out = model(**batch, **more)
        assert torch.equal(plain, out.loss)
        assert out.logits.graph is None, "the logits were computed"
        torch.manual_seed(1)
        torch.testing.assert_close(out.logits.detach(), model(**batch, **more).logits.detach())
        out.loss.backward()
