"""The context: what it refuses, what it stores once, and how it goes with the rest of PyTorch."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from backrazor import Razor, RazorError
from backrazor.keeper import SETTINGS
from torch import nn
from torch.utils.checkpoint import checkpoint


def mlp():
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))


class Kept:
    """Bytes of the distinct storages that a forward pass saves, weights left out."""

    def __init__(self, model):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)
        self.bytes = sum(n for n, _ in self.storages.values())


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"keep": 0}, "keep=0 "),
        ({"keep": -0.1}, "(0, 1]"),
        ({"keep": 1.5}, "1.5"),
        ({"keep": float("nan")}, "nan"),
        ({"keep": "much"}, "much"),
        ({"mode": "papers"}, "low-bit, pruned, paper"),
        ({"attention": "flash"}, "pruned, exact"),
        ({"values": "fp8"}, "bf16, fp32, fp16, int8"),
        ({"derivative_bits": 1}, "2, 3 or 4"),
        ({"recompute": "all"}, "None, attention, block"),
        ({"exact": "depthwise"}, "tuple of patterns"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings, word):
    with pytest.raises(RazorError, match=word.replace("(", r"\(").replace("[", r"\[")):
        Razor(**settings)


def test_no_module_is_replaced_and_the_context_can_be_entered_again():
    model, razor, x = mlp(), Razor(0.1), torch.randn(32, 16)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modules = list(model.modules())
    losses = []
    for _ in range(2):
        with razor:
            losses.append(model(x).square().mean())
        losses[-1].backward()
    assert losses[0] == losses[1] == model(x).square().mean()
    assert list(model.modules()) == modules
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    with razor, pytest.raises(RazorError, match="open already"), Razor(0.5):
        pass


class Named(Razor):
    def __init__(self, name, **settings):
        super().__init__(**settings)
        self.name = name


def unpickled(razor):
    return pickle.loads(pickle.dumps(razor))


@pytest.mark.parametrize("again", [unpickled, copy.copy, copy.deepcopy])
def test_a_razor_from_another_process_is_a_new_one_of_the_same_settings(again):
    """Spawned workers and job queues pickle what they are given."""
    settings = {
        "keep": 0.03, "mode": "pruned", "attention": "exact", "values": "int8", "derivative_bits": 3,
        "recompute": "attention", "exact": ("2", "gelu"),
    }  # fmt: skip
    assert settings.keys() == {*SETTINGS, "exact"} == inspect.signature(Razor).parameters.keys()
    model, x = mlp(), torch.randn(300, 16)
    for given in ({}, {"keep": 0.03}, {"keep": 1}, settings):
        razor = Named("mine", **given)
        with razor:
            loss = model(x).square().mean()
            got = again(razor)  # of one that is entered too
            assert len(razor._store) > 0 or given.get("keep") == 1
        expected = gradients(model, loss)
        assert (type(got), got.name, len(got._store), got.exact.patterns) == (Named, "mine", 0, given.get("exact", ()))
        assert [getattr(got, name) for name in SETTINGS] == [getattr(razor, name) for name in SETTINGS]
        with got, Kept(model) as kept:
            loss = model(x).square().mean()
        with razor, Kept(model) as same:
            model(x)
        assert kept.bytes - 300 * 4 * 4 <= same.bytes <= kept.bytes  # the loss keeps the output
        for a, b in zip(expected, gradients(model, loss), strict=True):
            assert torch.equal(a, b)


def test_as_a_decorator_of_a_forward_function():
    model, razor, x = mlp(), Razor(0.1), torch.randn(320, 16)

    @razor
    def forward(x, *, scale: float = 1.0):
        """Its words."""
        return model(x).square().mean() * scale

    @razor
    def twice(x):
        return forward(x) + forward(x, scale=2.0)  # within already

    with razor:
        expected = gradients(model, model(x).square().mean())
    for a, b in zip(expected, gradients(model, forward(x)), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(expected, gradients(model, twice(x)), strict=True):
        torch.testing.assert_close(3 * a, b)
    assert (forward.__name__, forward.__doc__) == ("forward", "Its words.")
    with Razor(0.5), pytest.raises(RazorError, match="open already"):
        forward(x)

    class Net(nn.Sequential):
        forward = razor(nn.Sequential.forward)

    net = Net(*model)
    for a, b in zip(expected, gradients(net, net(x).square().mean()), strict=True):
        assert torch.equal(a, b)


def test_a_decorator_of_what_runs_later_is_refused():
    razor = Razor(0.1)

    def generator(x):
        yield x

    async def coroutine(x):
        return x

    for later in (generator, coroutine):
        with pytest.raises(RazorError, match=f"{later.__name__} is a generator or a coroutine.*with razor:"):
            razor(later)
    with pytest.raises(RazorError, match="Linear is a class: decorate its forward"):
        razor(nn.Linear)


def test_x_is_stored_once_for_all_layers_that_take_it_and_in_any_shape():
    heads = nn.ModuleList(nn.Linear(64, 8, bias=False) for _ in range(3))
    x = torch.randn(4, 50, 64)
    with Kept(heads) as one, Razor(0.1):
        heads[0](x)
    with Kept(heads) as three, Razor(0.1):
        outs = [heads[0](x), heads[1](x.view(200, 64)), heads[2](x.view(2, 100, 64))]
    assert one.bytes == three.bytes
    loss = sum(o.square().sum() for o in outs)
    got = gradients(heads, loss)
    for head, shape, grad in zip(heads, ((4, 50, 64), (200, 64), (2, 100, 64)), got, strict=True):
        with Razor(0.1):
            alone = head(x.view(shape)).square().sum()
        assert torch.equal(grad, torch.autograd.grad(alone, head.weight)[0]) or shape != (4, 50, 64)
        assert grad.isfinite().all()


def test_a_norm_and_the_layers_after_it_share_the_normalised_input():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8), nn.Linear(8, 8))
    x = torch.randn(40, 100, 64).requires_grad_()
    with Kept(model) as both, Razor(0.1):
        model[1](model[0](x))
    with Kept(model) as norm, Razor(0.1):
        model[0](x)
    assert both.bytes == norm.bytes


def test_frozen_weights_keep_nothing_of_x():
    model = mlp().requires_grad_(False)
    model[0].bias.requires_grad_(True)
    x = torch.randn(1000, 16)
    with Kept(model) as kept, Razor(0.1, mode="pruned"):
        model(x)
    assert kept.bytes == 1000 * 64 // 4  # the derivative codes, 2 bits each
    with Kept(model) as kept, Razor(0.1):
        model(x)
    assert kept.bytes == 1000 * 64 + 1000 * 2 / 2  # GELU's input: a matrix is kept in 8 bits, a scale for every 128
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
    with Kept(conv) as kept, Razor(0.1):
        conv(torch.randn(2, 3, 9, 9).requires_grad_())
    assert kept.bytes == 0


def test_nothing_is_stored_without_gradients():
    model = mlp()
    with torch.no_grad(), Razor(0.1) as razor:
        assert not model(torch.randn(8, 16)).requires_grad
        assert len(razor._store) == 0


def test_what_is_stored_goes_with_the_graph():
    model, razor, x = mlp(), Razor(0.1), torch.randn(3000, 16)
    with razor:
        loss = model(x).sum()
        assert len(razor._store) == 3  # x, GELU's input, and its output, which is made from that
        loss.backward()
        assert len(razor._store) == 0  # dropped by the backward pass, within the context
        loss = model(x).sum()
        del loss
        assert len(razor._store) == 0  # without a backward pass, too


def test_a_tensor_changed_after_it_was_stored_is_stored_again():
    lin = nn.Linear(16, 4, bias=False).double()
    x = torch.randn(600, 16, dtype=torch.float64)
    g = torch.randn(600, 4, dtype=torch.float64)

    def dw(change):
        h = x.clone()
        with Razor(0.25, values="fp32"):
            y = lin(h)
            if change:
                h.mul_(-2)
            z = lin(h)
        return torch.autograd.grad((y * g).sum() + (z * g).sum(), lin.weight)[0]

    torch.testing.assert_close(dw(True), -0.5 * dw(False), rtol=1e-5, atol=1e-5)


def of_norm(x, w, change):
    h = F.layer_norm(x, (16,))
    change(h)
    return F.linear(h, w)


def of_gelu(x, w, change):
    h = F.gelu(x)
    change(h)
    return F.linear(h, w)


def of_scores(x, w, change):
    q, k, v = (F.linear(x, w * n) for n in (1, 2, 3))
    s = q @ k.mT
    change(s)
    return s.softmax(-1) @ v


def of_rms_norm(x, w, change):
    m = x.pow(2).mean(-1, keepdim=True)
    change(m)
    return F.linear(x * torch.rsqrt(m + 1e-6), w)


def of_logits(x, w, change):
    z = F.linear(x, w.repeat(600, 1))
    change(z)
    return F.cross_entropy(z.flatten(0, 1), torch.arange(z[..., 0].numel()))


def replaced(h):
    h.data = h.data.clamp(-0.1, 0.1)


def without_gradients(h):
    with torch.no_grad():
        h.data.clamp_(-0.1, 0.1)


DATA = [lambda h: h.data.clamp_(-0.1, 0.1), lambda h: h.view(-1).data.clamp_(-0.1, 0.1), replaced, without_gradients]


@pytest.mark.parametrize("mode", ["low-bit", "pruned", "paper"])
@pytest.mark.parametrize("use", [of_norm, of_gelu, of_scores, of_rms_norm, of_logits])
def test_a_change_through_data_is_noticed(use, mode):
    """The version of a tensor does not count it, as it counts one of what detach() returns."""
    x, w = torch.randn(8, 40, 16, requires_grad=True), nn.Parameter(torch.randn(16, 16))

    def result(change):
        with Razor(0.25, mode=mode):
            y = use(x, w, change)
        return y, *torch.autograd.grad(y.square().sum(), (x, w))

    expected = result(lambda h: h.detach().clamp_(-0.1, 0.1))
    for change in DATA if use is not of_logits else (DATA[0], replaced):  # of a view of logits it is not
        for a, b in zip(expected, result(change), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("keep", [0.25, 0.05])
def test_a_change_through_data_that_was_asked_for_before_is_noticed(keep):
    x, w = torch.randn(8, 40, 16, requires_grad=True), nn.Parameter(torch.randn(16, 16))

    def result(take):
        with Razor(keep) as razor:
            h = F.layer_norm(x, (16,))
            memory = take(h)
            y = F.linear(h, w)
            memory.mul_(-2)
            z = F.linear(h, w)
        assert not razor._store._uncounted  # the next pass shares again
        return torch.autograd.grad((y * z).sum(), w)[0]

    h = F.layer_norm(x, (16,))
    expected = torch.autograd.grad((F.linear(h * 1.0, w) * F.linear(h * -2.0, w)).sum(), w)[0]
    for take in (torch.Tensor.detach, lambda h: h.data):
        assert (result(take) - expected).norm() < 0.1 * expected.norm()


def test_weights_changed_before_the_backward_pass_are_noticed():
    model = mlp()
    with Razor(0.1):
        loss = model(torch.randn(8, 16)).sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_module_used_twice_gets_both_gradients():
    lin = nn.Linear(16, 16).double()
    x = torch.randn(30, 16, dtype=torch.float64)
    expected = gradients(lin, lin(lin(x)).square().sum())
    with Razor(1):
        loss = lin(lin(x)).square().sum()
    for a, b in zip(expected, gradients(lin, loss), strict=True):
        torch.testing.assert_close(a, b)


def test_accumulating_micro_batches_is_the_whole_batch():
    """Selection is by sample, so it does not matter with whom a sample shares its batch."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    x = torch.randn(4, 3, 90, 90, dtype=torch.float64)
    with Razor(0.1):
        whole = gradients(model, model(x).square().sum())
    parts = []
    for part in x.split(1):
        with Razor(0.1):
            parts.append(gradients(model, model(part).square().sum()))
    for a, *rest in zip(whole, *parts, strict=True):
        torch.testing.assert_close(a, sum(rest))


def test_second_derivatives_and_transforms_are_refused_in_words():
    model, x = mlp(), torch.randn(8, 16)
    with Razor(0.1):
        loss = model(x).sum()
    with pytest.raises(RazorError, match="second derivative"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with Razor(0.1), pytest.raises(RazorError, match="vmap"):
        torch.func.vmap(model)(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_functions_are_refused_in_words():
    model, x = mlp(), torch.randn(8, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with Razor(0.1), pytest.raises(RazorError, match=r"torch\.compile"):
        compiled(x)

    def around(x):
        with Razor(0.1):
            return model(x)

    with pytest.raises(RazorError, match=r"torch\.compile"):
        torch.compile(around, backend="eager")(x)
    torch._dynamo.reset()
    with Razor(0.1):
        model(x).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_saves_nothing_and_is_exact(reentrant):
    model, x = mlp().double(), torch.randn(64, 16, dtype=torch.float64).requires_grad_()
    expected = gradients(model, model(x).square().sum())
    with Kept(model), Razor(0.1):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    loss.backward()
    for a, p in zip(expected, model.parameters(), strict=True):
        assert torch.equal(a, p.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_outside_makes_the_pruned_activations_again(reentrant):
    model, x = mlp(), torch.randn(640, 16).requires_grad_()

    def part(x):
        with Razor(0.1):
            return model(x)

    expected = gradients(model, part(x).square().sum())
    checkpoint(part, x, use_reentrant=reentrant).square().sum().backward()
    for a, p in zip(expected, model.parameters(), strict=True):
        assert torch.equal(a, p.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [1, 0.1])
def test_autocast(dtype, keep):
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    x = torch.randn(4, 30, 32)
    with torch.autocast("cpu", dtype):
        plain = model(x)
    expected = gradients(model, plain.float().square().mean())
    with torch.autocast("cpu", dtype), Razor(keep):
        out = model(x)
    assert torch.equal(out, plain)
    got = gradients(model, out.float().square().mean())
    for a, b in zip(expected, got, strict=True):
        assert b.dtype == torch.float32
        if keep == 1:
            torch.testing.assert_close(a, b, rtol=3e-2, atol=1e-4)
        else:
            assert b.isfinite().all()


def test_composite_functions_are_entered():
    """nn.MultiheadAttention is one function of torch.nn.functional: what it is made of is met all the same."""
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(4, 60, 32)
    with Kept(attention) as dense:
        attention(x, x, x, need_weights=False)
    with Kept(attention) as pruned, Razor(0.1):
        attention(x, x, x, need_weights=False)
    assert dense.bytes > 5 * pruned.bytes
    with Kept(attention) as pruned, Razor(0.1):
        attention(x, x, x, need_weights=True)
    assert dense.bytes > 5 * pruned.bytes


def test_exact_attention_is_pytorchs_own():
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))
    plain = F.scaled_dot_product_attention(q, k, v)
    with Razor(0.1, attention="exact"):
        out = F.scaled_dot_product_attention(q, k, v)
        written = torch.softmax(q @ k.mT * 8**-0.5, -1) @ v
    g = torch.randn_like(out)
    expected = torch.autograd.grad(plain, (q, k, v), g)
    for o in (out, written):
        for a, b in zip(expected, torch.autograd.grad(o, (q, k, v), g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (1, 16), (16,)])
def test_empty_and_tiny_batches(shape):
    model, x = mlp(), torch.randn(shape)
    expected = gradients(model, model(x).sum())
    with Razor(0.1):
        loss = model(x).sum()
    for a, b in zip(expected, gradients(model, loss), strict=True):
        assert a.shape == b.shape
        assert b.isfinite().all()


def test_no_transient_exceeds_a_layers_dense_activations():
    """What lives beyond the plain forward pass's tensors while a tensor is packed: at most the layer's own size."""
    from memtrain_common.measuring.prediction import predict

    def build():
        return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

    def loss(model):
        return model(torch.randn(64, 100, 256)).mean()

    dense = predict(build, loss)
    razor = predict(build, loss, saving=lambda: Razor(0.1))
    layer = 64 * 100 * 1024 * 4
    assert razor.peak_bytes < dense.peak_bytes + layer
    assert razor.ledger.total("activations") < dense.ledger.total("activations") / 12


@pytest.mark.slow
def test_predicted_equals_measured_to_the_byte():
    from memtrain_common.measuring.memory import SavedActivations
    from memtrain_common.measuring.prediction import predict

    def build():
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), mlp_of(16 * 15 * 15)
        )

    def mlp_of(width):
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 70), nn.SiLU(), nn.Dropout(0.3), nn.Linear(70, 3))

    def loss(model):
        return model(torch.randn(5, 3, 32, 32)).square().mean()

    for settings in ({}, {"keep": 0.03}, {"values": "int8"}, {"derivative_bits": 3}):
        model = build()
        with SavedActivations(model) as saved, Razor(**settings):
            kept = loss(model)
        measured = saved.by_layer()
        del kept
        assert (
            predict(build, loss, saving=lambda s=settings: Razor(**s)).ledger.bytes_by_layer["activations"] == measured
        )
