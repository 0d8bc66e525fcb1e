"""Every operation: plain autograd at keep = 1, below it the formulas with a slowly pruned x̂."""

import math

import pytest
import torch
import torch.nn.functional as F
from backrazor import OPERATIONS, Razor, describe
from backrazor.ops.pointwise import ACTIVATIONS
from memtrain_common.measuring.prediction import fake_step
from slow import paper_pruned, pruned

D = torch.float64


def leaf(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=D)).requires_grad_()


def positive(*shape):
    return (torch.rand(*shape, dtype=D) + 0.5).requires_grad_()


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(*shape, dtype=D))


CASES = {
    "linear": (F.linear, lambda: (leaf(3, 5, 7), leaf(4, 7), leaf(4))),
    "linear one row": (F.linear, lambda: (leaf(7), leaf(4, 7))),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), lambda: (leaf(4), leaf(5, 7), parameter(7, 4))),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1), lambda: (leaf(2, 4, 9), leaf(6, 4, 3), leaf(6))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 2), lambda: (leaf(2, 4, 7, 6), leaf(6, 2, 3, 3), leaf(6))),
    "conv2d same": (lambda x, w: F.conv2d(x, w, padding="same"), lambda: (leaf(4, 7, 6), leaf(6, 4, 4, 3))),
    "conv3d": (F.conv3d, lambda: (leaf(2, 2, 4, 5, 4), leaf(3, 2, 2, 3, 2))),
    "conv_transpose1d": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1),
        lambda: (leaf(2, 4, 9), leaf(4, 6, 3), leaf(6)),
    ),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, (1, 0), 2, 2),
        lambda: (leaf(2, 4, 7, 6), leaf(4, 3, 3, 3), leaf(6)),
    ),
    "conv_transpose3d": (F.conv_transpose3d, lambda: (leaf(2, 4, 3, 4), leaf(2, 3, 2, 3, 2))),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (7,), w, b), lambda: (leaf(3, 5, 7), leaf(7), leaf(7))),
    "layer_norm plain": (lambda x: F.layer_norm(x, (5, 7)), lambda: (leaf(3, 5, 7),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (7,), w), lambda: (leaf(3, 5, 7), leaf(7))),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, torch.zeros(4, dtype=D), torch.ones(4, dtype=D), w, b, True),
        lambda: (leaf(3, 4, 5, 2), leaf(4), leaf(4)),
    ),
    "batch_norm frozen": (
        lambda x, w, b: F.batch_norm(x, torch.full((4,), 0.3, dtype=D), torch.full((4,), 2.0, dtype=D), w, b, False),
        lambda: (leaf(3, 4, 5), leaf(4), leaf(4)),
    ),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), lambda: (leaf(3, 6, 5, 2), leaf(6), leaf(6))),
    "group_norm plain": (lambda x: F.group_norm(x, 3), lambda: (leaf(3, 6, 5),)),
    "softmax": (lambda x: F.softmax(x, 1), lambda: (leaf(3, 5, 7),)),
    "matmul": (lambda a, b: torch.matmul(a * 1.0, b * 1.0), lambda: (leaf(2, 3, 5, 4), leaf(3, 4, 6))),
    "gelu": (F.gelu, lambda: (leaf(40),)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda: (leaf(40),)),
    "silu": (F.silu, lambda: (leaf(40),)),
    "silu in place": (lambda x: F.silu(x * 2.0, inplace=True), lambda: (leaf(40),)),
    "hardswish": (lambda x: F.hardswish(3 * x), lambda: (leaf(40),)),
    "hardswish in place": (lambda x: F.hardswish(3 * x, True), lambda: (leaf(40),)),
    "hardsigmoid": (lambda x: F.hardsigmoid(3 * x), lambda: (leaf(40),)),
    "hardsigmoid in place": (lambda x: F.hardsigmoid(3 * x, inplace=True), lambda: (leaf(40),)),
    "mish": (F.mish, lambda: (leaf(40),)),
    "softplus": (lambda x: F.softplus(x, 2.0), lambda: (leaf(40),)),
    "sigmoid": (torch.sigmoid, lambda: (leaf(40),)),
    "tanh": (torch.tanh, lambda: (leaf(40),)),
    "relu": (F.relu, lambda: (leaf(40),)),
    "relu6": (lambda x: F.relu6(3 * x), lambda: (leaf(40),)),
    "hardtanh": (lambda x: F.hardtanh(x, -0.7, 1.1), lambda: (leaf(40),)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), lambda: (leaf(40),)),
    "relu in place": (lambda x: F.relu(x * 2.0, inplace=True), lambda: (leaf(40),)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), lambda: (leaf(2, 3, 7, 8),)),
    "max_pool2d dilated": (lambda x: F.max_pool2d(x, (2, 3), 1, (1, 1), 2, True), lambda: (leaf(2, 3, 7, 8),)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1), lambda: (leaf(2, 3, 7, 8),)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), lambda: (leaf(2, 3, 7, 8),)),
    "mul": (lambda a, b: torch.mul(a * 1.0, b * 1.0), lambda: (leaf(5, 70), leaf(5, 70))),
    "mul by a small one": (lambda a, b: torch.mul(a * 1.0, b * 1.0), lambda: (leaf(5, 70), leaf(70))),
    "mul broadcast": (lambda a, b: torch.mul(a * 1.0, b * 1.0), lambda: (leaf(5, 1, 7), leaf(4, 7))),
    "rms chain": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), lambda: (leaf(5, 70),)),
    "gelu_new": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda: (leaf(5, 70),),
    ),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda: (leaf(5, 70),)),
    "gated": (lambda x, u: F.silu(x) * u, lambda: (leaf(5, 70), leaf(5, 70))),
    "gated by gelu": (lambda x, u: u * F.gelu(x, approximate="tanh"), lambda: (leaf(5, 70), leaf(5, 70))),
    "sdpa": (F.scaled_dot_product_attention, lambda: (leaf(2, 3, 5, 4), leaf(2, 3, 6, 4), leaf(2, 3, 6, 4))),
    "sdpa causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        lambda: (leaf(2, 5, 4), leaf(2, 5, 4), leaf(2, 5, 3)),
    ),
    "sdpa mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        lambda: (leaf(2, 3, 5, 4), leaf(2, 3, 6, 4), leaf(2, 3, 6, 4), leaf(3, 5, 6)),
    ),
    "sdpa boolean mask": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, torch.arange(6) < torch.tensor([[4], [6]])[:, None, None]
        ),
        lambda: (leaf(2, 3, 5, 4), leaf(2, 3, 6, 4), leaf(2, 3, 6, 4)),
    ),
    "sdpa grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda: (leaf(2, 4, 5, 4), leaf(2, 2, 6, 4), leaf(2, 2, 6, 4)),
    ),
    "sdpa five dimensions": (
        F.scaled_dot_product_attention,
        lambda: (leaf(2, 2, 3, 5, 4), leaf(2, 2, 3, 6, 4), leaf(2, 2, 3, 6, 4)),
    ),
}


def same(out, plain, case):
    """The same bits; PyTorch itself has another kernel for attention in five dimensions."""
    if case == "sdpa five dimensions":
        torch.testing.assert_close(out, plain, rtol=1e-13, atol=1e-13)
    else:
        assert torch.equal(out, plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", ["low-bit", "pruned", "paper"])
@pytest.mark.parametrize("case", CASES)
def test_keep_1_is_plain_autograd(case, mode):
    call, make = CASES[case]
    inputs = make()
    plain = call(*inputs)
    g = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, g)
    with Razor(1, mode=mode):
        out = call(*inputs)
    same(out, plain, case)
    for a, b in zip(expected, torch.autograd.grad(out, inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["linear", "conv2d", "layer_norm", "rms_norm", "batch_norm", "gelu", "sdpa mask", "mul"]
)
def test_gradcheck(case):
    call, make = CASES[case]

    def through(*inputs):
        with Razor(1):
            return call(*inputs)

    assert torch.autograd.gradcheck(through, make())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["low-bit", "pruned"])
@pytest.mark.parametrize("case", CASES)
def test_the_forward_pass_is_exact_and_frozen_inputs_get_nothing(case, mode):
    call, make = CASES[case]
    inputs = make()
    with Razor(0.2, mode=mode):
        out = call(*inputs)
    same(out, call(*inputs), case)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)
    for chosen in range(len(inputs)):
        some = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(inputs)]
        with Razor(0.2, mode=mode):
            out = call(*some)
        out.sum().backward()
        assert [t.grad is not None for t in some] == [i == chosen for i in range(len(inputs))]


KEEP = 0.25


def gradients(call, inputs, g, mode="pruned", **settings):
    with Razor(KEEP, mode=mode, **settings):
        out = call(*inputs)
    return torch.autograd.grad(out, inputs, g)


@pytest.mark.parametrize("mode", ["pruned", "paper"])
def test_linear_and_conv_use_the_pruned_input_for_the_weight_alone(mode):
    prune = pruned if mode == "pruned" else paper_pruned
    x, w, b, g = leaf(3, 90, 7), leaf(4, 7), leaf(4), torch.randn(3, 90, 4, dtype=D)
    dx, dw, db = gradients(F.linear, (x, w, b), g, mode=mode)
    torch.testing.assert_close(dx, g @ w)
    torch.testing.assert_close(db, g.sum((0, 1)))
    torch.testing.assert_close(dw, torch.einsum("bno,bni->oi", g, prune(x, KEEP)), rtol=1e-5, atol=1e-5)
    x, w, b = leaf(2, 4, 9, 8), leaf(6, 4, 3, 3), leaf(6)
    g = torch.randn(2, 6, 7, 6, dtype=D)
    dx, dw, db = gradients(F.conv2d, (x, w, b), g, mode=mode)
    hat = prune(x, KEEP) if mode == "pruned" else paper_pruned(x, KEEP, torch.float32)
    expected = torch.zeros_like(w)
    for i in range(3):
        for j in range(3):
            expected[:, :, i, j] = torch.einsum("nohw,nchw->oc", g, hat[:, :, i : i + 7, j : j + 6])
    torch.testing.assert_close(dw, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, torch.nn.grad.conv2d_input(x.shape, w, g))
    torch.testing.assert_close(db, g.sum((0, 2, 3)))


def norm_reference(g, normalised, rstd, weight, centred):
    h = g * weight
    inner = normalised * (h * normalised).mean(-1, keepdim=True)
    if centred:
        inner = inner + h.mean(-1, keepdim=True)
    return rstd * (h - inner), (g * normalised).sum((0, 1))


def test_norms_prune_the_normalised_input():
    x, w, b, g = leaf(3, 40, 16), leaf(16), leaf(16), torch.randn(3, 40, 16, dtype=D)
    rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    hat = pruned((x - x.mean(-1, keepdim=True)) * rstd, KEEP)
    dx, dw, db = gradients(lambda x, w, b: F.layer_norm(x, (16,), w, b), (x, w, b), g)
    expected = norm_reference(g, hat, rstd, w, True)
    torch.testing.assert_close(dx, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, g.sum((0, 1)))
    rstd = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    hat = pruned(x * rstd, KEEP)
    dx, dw = gradients(lambda x, w: F.rms_norm(x, (16,), w, 1e-5), (x, w), g)
    expected = norm_reference(g, hat, rstd, w, False)
    torch.testing.assert_close(dx, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, expected[1], rtol=1e-5, atol=1e-5)


def test_batch_norm_rounds_the_normalised_input_to_16_levels():
    x, w, b, g = leaf(4, 5, 9, 8), leaf(5), leaf(5), torch.randn(4, 5, 9, 8, dtype=D)
    mean = x.mean((0, 2, 3), keepdim=True)
    rstd = (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).rsqrt()
    normal = (x - mean) * rstd
    levels = (torch.arange(16, dtype=D) - 7.5) * 0.3352
    hat = levels[(normal.unsqueeze(-1) - levels).abs().argmin(-1)]
    assert 0.07 < (hat - normal).norm() / normal.norm() < 0.15  # 0.107 for normal numbers
    dx, dw, _ = gradients(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (x, w, b), g)
    total, projection = g.sum((0, 2, 3), keepdim=True), (g * hat).sum((0, 2, 3), keepdim=True)
    count = g.numel() / 5
    expected = rstd * w.view(1, 5, 1, 1) * (g - total / count - hat * projection / count)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, projection.flatten(), rtol=1e-5, atol=1e-5)


def test_paper_layer_norm_prunes_x_itself():
    x, w, b, g = leaf(3, 40, 16), leaf(16), leaf(16), torch.randn(3, 40, 16, dtype=D)
    mean, rstd = x.mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    hat = (paper_pruned(x, KEEP, torch.float32) - mean) * rstd
    dx, dw, db = gradients(lambda x, w, b: F.layer_norm(x, (16,), w, b), (x, w, b), g, mode="paper")
    expected = norm_reference(g, hat, rstd, w, True)
    torch.testing.assert_close(dx, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, g.sum((0, 1)))


def attention_reference(q, k, v, g, scale, prune, prune_p):
    """The facts' formulas: P̂, V̂, Q̂, K̂ pruned, scores not kept."""
    p = torch.softmax(scale * q @ k.mT, -1)
    p, q, k, v = prune_p(p, KEEP), prune(q, KEEP), prune(k, KEEP), prune(v, KEEP)
    dp = g @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    return scale * ds @ k, scale * ds.mT @ q, p.mT @ g


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("mode", ["pruned", "paper"])
def test_attention_uses_what_the_formulas_say(mode, written_out):
    q, k, v = leaf(2, 3, 24, 8), leaf(2, 3, 20, 8), leaf(2, 3, 20, 8)
    g = torch.randn(2, 3, 24, 8, dtype=D)
    scale = 8**-0.5

    def by_hand(q, k, v):
        q, k, v = q * 1.0, k * 1.0, v * 1.0  # leaves would be weights
        return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale, dim=-1), v)

    call = by_hand if written_out else F.scaled_dot_product_attention
    values = {"values": "fp32"} if mode == "pruned" else {}
    prune = (lambda x, keep: pruned(x, keep, torch.float32)) if mode == "pruned" else paper_pruned

    def prune_p(p, keep):  # scaled_dot_product_attention forms P for one of these samples at a time
        return prune(p, keep) if written_out else torch.cat([prune(sample, keep) for sample in p.split(1)])

    expected = attention_reference(q, k, v, g, scale, prune, prune_p)
    for a, b in zip(gradients(call, (q, k, v), g, mode=mode, **values), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_paper_gelu_is_dense_float16():
    x, g = leaf(3, 200), torch.randn(3, 200, dtype=D)
    (dx,) = gradients(F.gelu, (x,), g, mode="paper")
    rounded = x.detach().half().double()
    phi = torch.exp(-rounded.square() / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(
        dx, g * (0.5 * (1 + torch.erf(rounded / math.sqrt(2))) + rounded * phi), rtol=1e-5, atol=1e-5
    )


BOUNDS = {2: 1 / 6, 3: 1 / 10, 4: 1 / 22}
UNIT = {2: 1 / 6, 3: 1 / 14, 4: 1 / 30}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("call", "bounds"),
    [
        (F.gelu, BOUNDS),
        (F.silu, BOUNDS),
        (F.mish, BOUNDS),
        (F.hardswish, {2: 1 / 6, 3: 1 / 6, 4: 1 / 14}),
        (F.softplus, UNIT),
        (torch.tanh, UNIT),
        (torch.sigmoid, {b: e / 4 for b, e in UNIT.items()}),
    ],
)
def test_derivative_codes_stay_within_their_bound(call, bounds, bits):
    x = torch.linspace(-12, 12, 100_001, dtype=D).requires_grad_()
    with Razor(0.1, mode="pruned", derivative_bits=bits):
        y = call(x)
    (coded,) = torch.autograd.grad(y.sum(), x)
    (true,) = torch.autograd.grad(call(x).sum(), x)
    assert (coded - true).abs().max() <= bounds[bits] + 1e-9
    assert (coded - true).abs().max() > 0.5 * bounds[bits]  # the bound is not idle
    assert coded[0].abs() < 1e-9  # switched off
    assert len(coded.unique()) <= 1 << (max(bits, 3) if call is F.hardswish else bits)


def test_dropout_keeps_the_same_units_and_one_bit_each():
    x = leaf(50, 40)
    torch.manual_seed(3)
    plain = F.dropout(x, 0.3)
    torch.manual_seed(3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t), Razor(0.1):
        out = F.dropout(x, 0.3)
    assert torch.equal(out, plain)
    assert sum(t.nbytes for t in kept) == 50 * 40 / 8
    g = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, x, g)[0], torch.autograd.grad(plain, x, g)[0])


def test_attention_dropout_is_that_of_the_forward_pass():
    q, k, v = leaf(2, 3, 8, 4), leaf(2, 3, 8, 4), leaf(2, 3, 8, 8)
    v.data.copy_(torch.eye(8, dtype=D).expand(2, 3, 8, 8))  # then the output is the dropped P
    with Razor(1):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    p = torch.softmax(0.5 * q @ k.mT, -1)
    mask = (out != 0).double() / 0.6
    torch.testing.assert_close(out, p * mask)
    g = torch.randn_like(out)
    expected = torch.autograd.grad((p * mask) @ v, (q, k, v), g)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_table_names_every_operation_once_and_says_why():
    rows = describe()
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert all(row[f] for row in rows for f in ("exact", "approximate", "keeps", "why"))
    calls = [call for operation in OPERATIONS for call in operation.calls]
    assert len(set(calls)) == len(calls)
    assert set(ACTIVATIONS) - {"quick_gelu"} <= set(calls)


@pytest.mark.parametrize("p_drop", [0.0, 0.1])
def test_attention_holds_nothing_but_what_it_saves(p_drop):
    """On fake tensors every tensor that lives is counted, saved for the backward pass or not."""
    with fake_step() as live:
        q, k, v = (torch.empty(2, 2, 96, 16, requires_grad=True) for _ in range(3))
        before = live.bytes
        with Razor(0.1):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p_drop)
        saved = sum(t.nbytes for t in out.grad_fn.saved_tensors)
        assert live.bytes - before == saved + out.nbytes
