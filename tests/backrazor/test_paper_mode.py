"""The mode "paper": for every operation of the table, gradients by an independent slow reference, to 1e-5.

The references are the official code's formulas: what a product needs of an activation is pruned by a threshold a
sample, in float16 (float32 for norms and convolutions), probabilities too; activation functions keep their input in
float16.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from backrazor import OPERATIONS, Razor
from slow import paper_pruned
from test_operations import CASES, leaf, parameter

D = torch.float64
KEEP = 0.25
half = functools.partial(paper_pruned, keep=KEEP)
single = functools.partial(paper_pruned, keep=KEEP, values=torch.float32)


def steps_of_scores(x):
    """What is no product is PyTorch's own."""
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    s = (x * 1).masked_fill(~mask, -2.0)
    s.add_(0.5).mul_(3).div_(2).masked_fill_(~mask, -1.0)
    return torch.where(mask, s, 0.25)


MORE = {
    "contiguous": (lambda x: x.transpose(0, 1).contiguous(), lambda: (leaf(5, 7),)),
    "pad": (lambda x: F.pad(x, (1, 2)), lambda: (leaf(5, 7),)),
    "reshape": (lambda x: x.transpose(0, 1).reshape(-1), lambda: (leaf(5, 7),)),
    "to": (lambda x: (2 * x).to(torch.float32).to(D), lambda: (leaf(5, 7),)),
    "div": (lambda x: x / 3.0, lambda: (leaf(5, 7),)),
    "relu_": (lambda x: torch.relu_(x * 2.0), lambda: (leaf(40),)),
    "matmul by a weight": (lambda x, w: x @ w, lambda: (leaf(3, 5, 7), parameter(7, 4))),
    "steps of scores": (steps_of_scores, lambda: (leaf(3, 5, 7),)),
    "mul by a weight": (torch.mul, lambda: (leaf(50, 30), parameter(30))),
    "dropout": (lambda x: _seeded(F.dropout, x, 0.3), lambda: (leaf(5, 40),)),
}
if hasattr(F, "linear_cross_entropy"):
    MORE["linear, then cross_entropy"] = (
        lambda x, w: F.linear_cross_entropy(x, w, torch.arange(5)),
        lambda: (leaf(5, 7), parameter(40, 7)),
    )


def _seeded(call, *args):
    torch.manual_seed(7)
    return call(*args)


def plain(call, inputs, g):
    inputs = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(call(*inputs), inputs, g)


def exact(call, inputs, g):
    """Nothing is approximated."""
    return plain(call, inputs, g)


def product(prune, x=0, weight=1):
    """Bilinear in x and W: the gradient of W is that of the pruned x; all others are exact."""

    def reference(call, inputs, g):
        grads = list(plain(call, inputs, g))
        hat = inputs[x].detach()
        hat = prune(hat if hat.dim() > 1 else hat[None]).view_as(hat)
        grads[weight] = plain(call, [hat if i == x else t for i, t in enumerate(inputs)], g)[weight]
        return grads

    return reference


def unbatched(call, inputs, g):
    """A convolution of one sample."""
    x, w = inputs
    hat = single(x.detach()[None])[0]
    return plain(call, inputs, g)[0], plain(call, (hat, w), g)[1]


def padded(call, inputs, g):
    """One whose padding is uneven: it is made before the input is pruned."""
    x, w = inputs
    hat = single(F.pad(x.detach(), (1, 1, 1, 2))[None])
    return plain(call, inputs, g)[0], plain(F.conv2d, (hat, w), g[None])[1]


def two_activations(call, inputs, g):
    a, b = inputs
    return plain(call, (a, half(b)), g)[0], plain(call, (half(a), b), g)[1]


def rounded(call, inputs, g):
    """g · f' at the input in float16."""
    return plain(call, [t.detach().half().double() for t in inputs], g)


def scaled_and_rounded(factor, call):
    """The same where the case scales its input by ``factor`` first."""

    def reference(_, inputs, g):
        (x,) = inputs
        return [factor * plain(call, [(factor * x.detach()).half().double()], g)[0]]

    return reference


def norm(weighted, centred):
    def reference(_, inputs, g):
        x, eps = inputs[0].detach(), 1e-5 if centred else torch.finfo(D).eps
        dims = -1 if weighted else (-2, -1)
        mean = x.mean(dims, keepdim=True) if centred else 0 * x
        rstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
        hat = (single(x) - mean) * rstd
        h = g * inputs[1].detach() if weighted else g
        inner = hat * (h * hat).mean(dims, keepdim=True) + (h.mean(dims, keepdim=True) if centred else 0)
        grads = [rstd * (h - inner)]
        if weighted:
            grads.append((g * hat).sum((0, 1)))
        return [*grads, g.sum((0, 1))] if weighted and centred else grads

    return reference


def softmax(_, inputs, g):
    p = half(torch.softmax(inputs[0].detach(), 1))
    return [p * (g - (g * p).sum(1, keepdim=True))]


def attention(_, inputs, g, mask=None, causal=False, scale=0.5):
    """dV = P̂ᵀ g, dP = g V̂ᵀ, dS = P̂ ∘ (dP − Σ dP ∘ P̂), dQ = s dS K̂, dK = s dSᵀ Q̂; all of four dimensions."""
    q, k, v = (t.detach() for t in inputs[:3])
    shapes = [q.shape, k.shape, v.shape]
    q, k, v, g = (
        t.reshape(-1, *((1,) * (3 - t.dim())), *t.shape[-3:]) if t.dim() != 3 else t[None] for t in (q, k, v, g)
    )
    times = q.shape[1] // k.shape[1]
    wide = lambda t: t.repeat_interleave(times, 1)  # noqa: E731
    s = scale * q @ wide(k).mT
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    p, q, k, v = half(torch.softmax(s, -1)), half(q), half(k), half(v)
    dp = g @ wide(v).mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    fold = lambda t: t.unflatten(1, (-1, times)).sum(2)  # noqa: E731
    grads = [scale * ds @ wide(k), fold(scale * ds.mT @ q), fold(p.mT @ g)]
    grads = [t.reshape(shape) for t, shape in zip(grads, shapes, strict=True)]
    return grads if len(inputs) == 3 else [*grads, ds.sum(0)]


def eight(x):
    """Every element as a whole number of 127ths of the largest of its 128 neighbours."""
    flat, out = x.detach().flatten(), []
    for block in flat.float().split(128):
        scale = (block.abs().max() / 127).bfloat16().float()
        out.append((block / scale).round().clamp(-127, 127) * scale)
    return torch.cat(out).double().view_as(x)


def eight_bit_product(call, inputs, g):
    a, b = inputs
    return (g * eight(b)).sum_to_size(a.shape), (g * eight(a)).sum_to_size(b.shape)


def gated(act):
    def reference(_, inputs, g):
        gate, up = (eight(t).requires_grad_() for t in inputs)
        return torch.autograd.grad(act(gate) * up, (gate, up), g)

    return reference


def rms_chain(_, inputs, g):
    x = inputs[0].detach()
    r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    hat = half(x * r)
    return [r * (g - hat * (g * hat).mean(-1, keepdim=True))]


REFERENCES = {
    "linear": product(half),
    "linear one row": product(half),
    "addmm": product(half, 1, 2),
    "matmul by a weight": product(half),
    "steps of scores": lambda call, inputs, g: torch.autograd.grad(call(*inputs), inputs, g),
    "conv1d": product(single),
    "conv2d": product(single),
    "conv2d same": padded,
    "conv3d": product(single),
    "conv_transpose1d": product(single),
    "conv_transpose2d": product(single),
    "conv_transpose3d": unbatched,
    "layer_norm": norm(True, True),
    "layer_norm plain": norm(False, True),
    "rms_norm": norm(True, False),
    "softmax": softmax,
    "matmul": two_activations,
    "silu in place": scaled_and_rounded(2.0, F.silu),
    "hardswish": scaled_and_rounded(3, F.hardswish),
    "hardswish in place": scaled_and_rounded(3, F.hardswish),
    "mul": eight_bit_product,
    "mul by a small one": eight_bit_product,
    "mul by a weight": product(half),
    "rms chain": rms_chain,
    "gated": gated(F.silu),
    "gated by gelu": gated(lambda x: F.gelu(x, approximate="tanh")),
    "sdpa": attention,
    "sdpa causal": functools.partial(attention, causal=True, scale=0.3),
    "sdpa mask": lambda call, inputs, g: attention(call, inputs, g, mask=inputs[3].detach()),
    "sdpa boolean mask": functools.partial(
        attention, mask=torch.arange(6) < torch.tensor([[4], [6]])[:, None, None]
    ),
    "sdpa grouped": attention,
    "sdpa five dimensions": attention,
    **dict.fromkeys(
        ("gelu", "gelu tanh", "silu", "mish", "softplus", "sigmoid", "tanh", "gelu_new", "quick_gelu"), rounded
    ),
    **dict.fromkeys(
        ("batch_norm", "batch_norm frozen", "group_norm", "group_norm plain", "relu", "relu6", "hardtanh", "leaky_relu",
         "relu in place", "relu_", "hardsigmoid", "hardsigmoid in place", "max_pool2d", "max_pool2d dilated",
         "avg_pool2d", "adaptive_avg_pool2d", "mul broadcast", "dropout", "contiguous", "reshape", "pad", "to", "div",
         "linear, then cross_entropy"),
        exact,
    ),
}  # fmt: skip
ALL = {**CASES, **MORE}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", ALL)
def test_gradients_are_those_of_the_reference(case):
    call, make = ALL[case]
    inputs = make()
    with Razor(KEEP, mode="paper"):
        out = call(*inputs)
    g = torch.randn_like(out)
    expected = REFERENCES[case](call, inputs, g)
    for a, b in zip(torch.autograd.grad(out, inputs, g), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_operation_of_the_table_has_a_reference():
    met = set()
    names = {call: operation.name for operation in OPERATIONS for call in operation.calls}

    def noting(rule, call):
        def noted(*args, **kwargs):
            met.add(names[call])
            return rule(*args, **kwargs)

        return noted

    for call, make in ALL.values():
        with Razor(KEEP, mode="paper") as razor:
            razor._rules = {call: noting(rule, call) for call, rule in razor._rules.items()}
            call(*make())
    assert met == set(names.values())
