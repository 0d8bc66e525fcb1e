"""One layer with heads against its formulas written out, in several dtypes and odd shapes."""

import math

import pytest
import torch
from lte import LTEConfig, LTELinear
from lte.layer import HeadedLinear
from torch import nn

SHAPES = [(3, 5, 7, 2), (1, 4, 4, 1), (4, 11, 6, 3), (2, 3, 9, 8)]  # heads, n, m, rank


def layer_of(heads, n, m, rank, *, bias=True, dtype=torch.float64, alpha=3.0, moved=True, **more):
    """A layer whose factors and offsets are all random, as after some training and a merge."""
    layer = LTELinear(nn.Linear(n, m, bias=bias, dtype=dtype), LTEConfig(heads=heads, rank=rank, alpha=alpha, **more))
    if moved:
        with torch.no_grad():
            for t in (layer.lora_B, layer.merged_A, layer.merged_B):
                t.normal_()
    return layer


def written_out(layer, x):
    """y_h = W x_h + b + s (B_h A_h − B'_h A'_h) x_h, one chunk after the other."""
    chunks = []
    for h, chunk in enumerate(x.chunk(layer.heads)):
        delta = layer.lora_B[h] @ layer.lora_A[h] - layer.merged_B[h] @ layer.merged_A[h]
        weight = layer.weight + layer.scale * delta
        chunks.append(nn.functional.linear(chunk, weight, layer.bias))
    return torch.cat(chunks)


@pytest.mark.parametrize(("heads", "n", "m", "rank"), SHAPES)
@pytest.mark.parametrize("middle", [(), (5,), (2, 3)])
def test_folded_product_is_the_written_out_formula(heads, n, m, rank, middle):
    layer = layer_of(heads, n, m, rank)
    x = torch.randn(2 * heads, *middle, n, dtype=torch.float64)
    torch.testing.assert_close(layer(x), written_out(layer, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("owing", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, owing):
    layer = layer_of(2, 3, 5, 2, bias=bias)
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [layer.weight, layer.lora_A, layer.lora_B] + ([layer.bias] if bias else [])
    weight, A, B, *rest = (t.detach().clone().requires_grad_() for t in leaves)
    owed = torch.randn(2, *layer.weight.shape, dtype=torch.float64) if owing else None

    def apply(x, weight, A, B, *rest):
        b = rest[0] if rest else None
        s = layer.scale
        return HeadedLinear.apply(x, weight, b, A, B, layer.merged_A, layer.merged_B, owed, s, s, 1.0)

    assert torch.autograd.gradcheck(apply, (x, weight, A, B, *rest))


def test_each_head_learns_from_its_own_mean_loss():
    """The gradient of head h is that of a model with head h alone, trained on chunk h's mean loss."""
    H = 3
    layer = layer_of(H, 5, 4, 2)
    layer.bias.requires_grad_(False)
    x, target = torch.randn(6, 7, 5, dtype=torch.float64), torch.randn(6, 7, 4, dtype=torch.float64)
    nn.functional.mse_loss(layer(x), target).backward()
    for h in range(H):
        A = layer.lora_A[h].detach().clone().requires_grad_()
        B = layer.lora_B[h].detach().clone().requires_grad_()
        weight = layer.weight + layer.scale * (B @ A - layer.merged_B[h] @ layer.merged_A[h])
        own = nn.functional.mse_loss(nn.functional.linear(x.chunk(H)[h], weight, layer.bias), target.chunk(H)[h])
        own.backward()
        torch.testing.assert_close(layer.lora_A.grad[h], A.grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.lora_B.grad[h], B.grad, rtol=0, atol=1e-12)


def test_shared_parameters_learn_from_the_mean_over_the_batch():
    layer = layer_of(3, 5, 4, 2)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    layer(x).square().mean().backward()
    fast = (x.grad.clone(), layer.bias.grad.clone())
    x.grad = layer.bias.grad = None
    written_out(layer, x).square().mean().backward()
    torch.testing.assert_close(fast, (x.grad, layer.bias.grad), rtol=0, atol=1e-12)


def test_evaluation_uses_the_mean_of_all_unmerged_deltas():
    layer = layer_of(3, 5, 4, 2).eval()
    delta = sum(layer.lora_B[h] @ layer.lora_A[h] - layer.merged_B[h] @ layer.merged_A[h] for h in range(3))
    x = torch.randn(7, 5, dtype=torch.float64)  # 7 rows: evaluation cuts no chunks
    expected = nn.functional.linear(x, layer.weight + layer.scale * delta / 3, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_new_heads_do_not_change_the_function():
    linear = nn.Linear(5, 4)
    x = torch.randn(6, 5)
    before = linear(x)
    layer = LTELinear(linear, LTEConfig(heads=3, rank=2))
    assert torch.equal(layer.eval()(x), before)
    torch.testing.assert_close(layer.train()(x), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["paper", "upstream"])
@pytest.mark.parametrize(("n", "m", "rank"), [(12, 6, 3), (6, 12, 3), (4, 4, 6)])
def test_initial_scale(init, n, m, rank):
    layer = LTELinear(nn.Linear(n, m, dtype=torch.float64), LTEConfig(heads=2, rank=rank, init=init))
    gain = {"paper": m / n, "upstream": n / rank}[init]
    for A in layer.lora_A.detach():
        gram = A @ A.T if rank <= n else A.T @ A
        torch.testing.assert_close(gram, gain * torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-12)
    assert not layer.lora_B.any()


def test_scale_is_not_an_integer_division():
    assert LTEConfig(rank=8, alpha=4).scale == 0.5
    layer = layer_of(2, 5, 4, 3, alpha=1.0, moved=False)
    layer(torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    assert layer.lora_B.grad.abs().max() > 0  # one step moves the output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_get_a_float32_master(dtype):
    layer = layer_of(2, 5, 4, 3, dtype=dtype, moved=False)
    assert layer.weight.dtype == layer.lora_A.dtype == layer.merged_B.dtype == torch.float32


@pytest.mark.slow
def test_many_small_merges_lose_nothing():
    """1,000 merges of a small delta: within 1e-4 of the sum in float64 (a bfloat16 master loses a tenth)."""
    layer = layer_of(2, 16, 12, 3, dtype=torch.bfloat16, moved=False)
    start = layer.weight.double().clone()
    total = torch.zeros_like(start)
    for _ in range(1000):
        with torch.no_grad():
            layer.lora_B += 1e-5 * torch.randn_like(layer.lora_B) + 1e-5
        total += layer.mean_delta().double()
        layer.merge()
    moved = layer.weight.double() - start
    assert (moved - total).norm() / total.norm() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(dtype):
    layer = layer_of(2, 32, 24, 4, dtype=torch.float32)
    x = torch.randn(4, 6, 32)
    exact = written_out(layer, x)
    exact.square().mean().backward()
    grads = [layer.lora_A.grad, layer.lora_B.grad]
    layer.zero_grad()
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    heads = layer.heads  # the written-out loss is a mean over the chunks: each head has 1/H of its own gradient
    for got, expected in zip((layer.lora_A.grad, layer.lora_B.grad), grads, strict=True):
        assert got.dtype == torch.float32
        assert (got - heads * expected).norm() / (heads * expected).norm() < 0.02
    assert (y.float() - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_and_evaluating_under_autocast_keep_the_masters_precision(dtype):
    """A small delta, the difference of two large products: in bfloat16 nothing of it would be left."""
    layer = layer_of(2, 32, 24, 4, dtype=torch.float32)
    with torch.no_grad():
        layer.merged_A.copy_(layer.lora_A)
        layer.merged_B.copy_(layer.lora_B + 1e-4 * torch.randn_like(layer.lora_B))
    exact = layer.mean_delta()
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer.mean_delta(), exact)
        before = layer.weight.clone()
        layer.merge()
    torch.testing.assert_close(layer.weight, before + exact, rtol=0, atol=0)


def test_saves_the_input_and_rank_r_only():
    """Saved for the backward pass: x (shared with the caller), the factors, and u (H, t, r)."""
    from memtrain_common.measuring.memory import SavedActivations

    layer = layer_of(2, 16, 16, 3, bias=False)
    x = torch.randn(4, 5, 16, dtype=torch.float64, requires_grad=True)
    with SavedActivations(layer) as saved:
        y = layer(x)
    assert sum(saved.by_layer().values()) == 8 * (x.numel() + 4 * 5 * 3)
    assert y.requires_grad


def test_refuses_a_batch_that_cannot_be_cut():
    with pytest.raises(ValueError, match="a batch of 4 cannot be cut into 3 equal chunks"):
        layer_of(3, 5, 4, 2)(torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"heads": 0}, "heads must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": math.nan}, "alpha must be positive"),
        ({"trainable": ("embedding",)}, "trainable takes embeddings, norms, biases, skipped"),
        ({"init": "kaiming"}, "init must be"),
    ],
)
def test_refuses_a_wrong_configuration(wrong, words):
    with pytest.raises(ValueError, match=words):
        LTEConfig(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"merge_density": 0.05}])
def test_compiles_whole_and_a_merge_needs_no_recompilation(more):
    """One graph without breaks, the eager result, and the same graph after merges (eager kernels, for speed)."""
    layers = nn.Sequential(*(layer_of(2, 6, 6, 3, dtype=torch.float32, **more) for _ in range(2)))
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 5, 6)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        layers.zero_grad()
        y = layers(x)
        y.square().mean().backward()
        expected = [layer.lora_A.grad.clone() for layer in layers]
        layers.zero_grad()
        torch.testing.assert_close(compiled(x), y, rtol=0, atol=1e-5)
        compiled(x).square().mean().backward()
        for layer, grad in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer.lora_A.grad, grad, rtol=0, atol=1e-5)
            layer.merge()
            with torch.no_grad():
                layer.lora_B += 0.01
                if more:
                    layer.feedback.normal_()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("more", [{}, {"merge_density": 0.1}, {"base": "4bit"}])
@pytest.mark.parametrize("reset", ["none", "B", "all"])
def test_a_layer_merged_by_itself_is_merged_once(reset, more):
    """Where nothing is taken off B A, another merge must not find it there again."""
    layer = LTELinear(nn.Linear(7, 5), LTEConfig(heads=2, rank=2, alpha=3.0, reset=reset, **more))
    before = layer.lora_A.detach().clone()
    nn.init.normal_(layer.lora_B)
    if layer.sparse is not None:
        layer.feedback.normal_()
    x = torch.randn(4, 7)
    answer = layer.eval()(x)
    assert not torch.allclose(answer, nn.functional.linear(x, layer.master(), layer.bias), atol=1e-2)
    for _ in range(2):
        layer.merge()
        torch.testing.assert_close(layer(x), answer, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nn.functional.linear(x, layer.master(), layer.bias), answer, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.train()(x), answer, rtol=1e-4, atol=1e-4)
    assert bool(layer.lora_B.any()) == (reset == "none")
    assert torch.equal(layer.lora_A, before) == (reset != "all")
