"""Random compositions of operations, as no table of single ones has them: at keep 1 a Razor is plain autograd."""

import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from backrazor import Razor

B, T, D, HEADS = 2, 16, 32, 4


def heads(x):
    return x.view(B, T, HEADS, D // HEADS).transpose(1, 2)


def modulated(norm):
    """A norm without weights, then a trained scale for each sample and a shift (adaLN)."""
    return lambda x, _, w: norm(x) * (1 + w(B, 1, D)) + w(B, 1, D)


def attention(x, z, w, gate):
    q, k, v = (heads(F.linear(t, w(D, D))) for t in (x, x, z))
    out = F.scaled_dot_product_attention(3 * q, k, v, is_causal=True).transpose(1, 2)
    return F.linear(gate(out, x).reshape(B, T, D), w(D, D))


def written_out(x, z, w):
    q, k = F.linear(x, w(D, D)), F.linear(x, w(D, D))
    return (q @ k.mT / 4).softmax(-1) @ F.linear(z, w(D, D))


def across(x, norm):
    """Over tokens in place of features: x is a transposed view."""
    return norm(x.transpose(1, 2)).transpose(1, 2)


OPERATIONS = {
    "linear": lambda x, _, w: F.linear(x, w(D, D), w(D)),
    "linear with a row of biases": lambda x, _, w: F.linear(x, w(D, D), w(1, D)),
    "frozen": lambda x, _, w: F.linear(x, w(D, D).detach()),
    "layer norm": lambda x, _, w: F.layer_norm(x, (D,), w(D), w(D)),
    "layer norm, modulated": modulated(lambda x: F.layer_norm(x, (D,))),
    "rms norm, modulated": modulated(lambda x: F.rms_norm(x, (D,))),
    "rms norm": lambda x, _, w: F.rms_norm(x, (D,), w(D)),
    "rms norm, written out": lambda x, _, w: w(D) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "batch norm of a view": lambda x, _, w: across(x, lambda v: F.batch_norm(v, None, None, w(D), w(D), True)),
    "batch norm without weights": lambda x, _, w: F.batch_norm(x, None, None, training=True) * w(D),
    "batch norm": lambda x, _, w: F.batch_norm(x, None, None, w(T), w(T), True),
    "group norm": lambda x, _, w: F.group_norm(x, 4, w(T), w(T)),
    "group norm of a view": lambda x, _, w: across(x, lambda v: F.group_norm(v, 4, w(D), w(D))),
    "convolution": lambda x, _, w: F.conv1d(x, w(T, T, 3), w(T), padding=1),
    "convolution of a view": lambda x, _, w: across(x, lambda v: F.conv1d(v, w(D, D, 3), padding=1)),
    "attention": lambda x, z, w: attention(x, z, w, lambda out, _: out),
    "attention with gated heads": lambda x, z, w: attention(
        x, z, w, lambda out, x: out * torch.sigmoid(F.linear(x, w(HEADS, D))).unsqueeze(-1)
    ),
    "attention with scaled heads": lambda x, z, w: attention(x, z, w, lambda out, _: out * w(HEADS, 1)),
    "attention, written out": written_out,
    "gated": lambda x, z, w: F.silu(x) * z,
    "gated by half": lambda x, _, w: torch.cat([F.silu(x[..., : D // 2]) * x[..., D // 2 :], x[..., : D // 2]], -1),
    "gelu": lambda x, *_: F.gelu(x),
    "relu": lambda x, *_: F.relu(x),
    "relu in place": lambda x, *_: F.relu(x * 1.5, inplace=True),
    "tanh": lambda x, *_: torch.tanh(x),
    "sigmoid": lambda x, z, _: torch.sigmoid(x) * z,
    "softmax": lambda x, *_: torch.softmax(x, -1) * 8,
    "sum": lambda x, z, _: x + z,
    "product": lambda x, z, _: x * z,
    "scale": lambda x, _, w: x * w(D),
    "another order in memory": lambda x, *_: x.mT.contiguous().mT,
    "imaginary parts": lambda x, z, w: (
        F.linear(torch.complex(x, z).imag, w(D, D)) + F.linear(torch.complex(x, z).conj().imag, w(D, D))
    ),
}


class Model:
    """Three to seven operations, each on what earlier ones gave; its weights are drawn as they are asked for."""

    def __init__(self, seed):
        draw = random.Random(seed)
        self.steps = [
            (draw.choice([*OPERATIONS]), draw.randint(0, i), draw.randint(0, i)) for i in range(draw.randint(3, 7))
        ]
        self.weights = []

    def __call__(self, x):
        made, used = [x], iter(range(1000))

        def weight(*shape):
            i = next(used)
            if i == len(self.weights):
                drawn = torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) > 1 and shape[0] > 2 else 2) + 0.1
                self.weights.append(drawn.requires_grad_())
            return self.weights[i]

        for name, a, b in self.steps:
            made.append(OPERATIONS[name](made[a], made[b], weight))
        return sum(
            (y * torch.cos((0.7 + i) * torch.arange(y.numel()).view_as(y))).sum() for i, y in enumerate(made[1:])
        )


def gradients(model, x, context):
    x = x.clone().requires_grad_()
    with context:
        loss = model(x * 1.0)
    return loss.detach(), torch.autograd.grad(loss, [x, *model.weights], allow_unused=True)


@pytest.mark.parametrize("seed", range(120))
def test_at_keep_1_a_razor_is_plain_autograd(seed):
    model, x = Model(seed), torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    expected = gradients(model, x, nullcontext())
    got = gradients(model, x, Razor(1.0))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-3)
    for a, b in zip(got[1], expected[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 2e-4 * b.norm() + 1e-6, model.steps


@pytest.mark.parametrize("name", [*OPERATIONS])
def test_one_operation_between_layers_keeps_its_gradient(name):
    """The layer after it too, whose saved input may be made from what the operation keeps."""
    model, x = Model(0), torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))
    model.steps = [("linear", 0, 0), (name, 1, 1), ("linear", 2, 2)]
    torch.manual_seed(0)
    expected = gradients(model, x, nullcontext())[1]
    got = gradients(model, x, Razor(0.25))[1]
    for a, b in zip(got, expected, strict=True):
        if a is not None and b.norm() > 1e-3:
            assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.95, model.steps


@pytest.mark.parametrize("observe", [lambda h: h.register_hook(lambda g: g * 0), lambda h: h.retain_grad()])
def test_a_hook_on_a_gates_activation_is_called(observe):
    x, gate, up = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def grads(context):
        with context:
            h = F.silu(x @ gate)
            observe(h)
            loss = (h * (x @ up)).square().mean()
        gate.grad = up.grad = None
        loss.backward()
        return gate.grad, up.grad, h.grad if h.retains_grad else torch.ones(1)

    torch.testing.assert_close(grads(Razor(1.0)), grads(nullcontext()))


@pytest.mark.parametrize("call", [torch.sigmoid, torch.tanh, F.softplus, F.hardswish])
@pytest.mark.parametrize("end", [float("inf"), float("-inf")])
def test_an_infinite_number_spoils_no_other(call, end):
    x, g = torch.randn(64, 8), torch.randn(64, 8)
    x[3, 5] = end
    leaf = x.requires_grad_()
    with Razor(0.1):
        y = call(leaf * 1.0)
    (got,) = torch.autograd.grad(y, leaf, g)
    (expected,) = torch.autograd.grad(call(leaf * 1.0), leaf, g)
    assert torch.equal(got.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    assert F.cosine_similarity(got[finite], expected[finite], 0) > 0.9
