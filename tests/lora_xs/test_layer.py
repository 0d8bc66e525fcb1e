"""The update of each kind of module against the dense W + (α/r)·B R A."""

import copy

import pytest
import torch
from lora_xs import LoRAXSConfig, LoRAXSError, inject, merge, remove, trained
from lora_xs.layer import layers
from small_models import Doubled, Own
from torch import nn

TARGETS = ("embed", "conv", "up", "down")


def dense(model):
    """The slow reference: a copy without adapters whose weights hold the update."""
    plain = remove(copy.deepcopy(model))
    with torch.no_grad():
        for module, layer in layers(model):
            weight = module.get_parameter(layer.parameter)
            holder = dict(plain.named_modules())[dict((m, n) for n, m in model.named_modules())[module]]
            update = layer.kind.from_matrix(layer.delta("default"), weight.shape)
            holder.get_parameter(layer.parameter).add_(update.reshape(weight.shape))
    return plain


def test_every_kind_equals_dense_weights(mixed, inputs, train_r):
    model = mixed.double()
    before = model(inputs[0], inputs[1].double())
    inject(model, LoRAXSConfig(rank=3, alpha=5, targets=TARGETS, rank_pattern={"down": 2}))
    train_r(model)
    after = model(inputs[0], inputs[1].double())
    torch.testing.assert_close(after, dense(model)(inputs[0], inputs[1].double()), rtol=1e-12, atol=1e-12)
    for target in TARGETS:  # and each of them matters
        layer = model.get_submodule(target).lora_xs
        layer.R["default"].data.zero_()
        assert not torch.equal(model(inputs[0], inputs[1].double()), after)
        after = model(inputs[0], inputs[1].double())
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck(mixed, target):
    model = inject(mixed.double(), LoRAXSConfig(rank=2, targets=(target,), r_std=0.5))
    module = model.get_submodule(target)
    R = module.lora_xs.R["default"]
    x = {
        "embed": torch.randint(0, 31, (2, 3)),
        "conv": torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True),
        "up": torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True),
        "down": torch.randn(3, 17, dtype=torch.float64, requires_grad=True),
    }[target]

    def run(matrix, value):
        return torch.func.functional_call(module, {"lora_xs.R.default": matrix}, (value,))

    assert torch.autograd.gradcheck(run, (R, x))


def test_gradient_of_r_is_the_projected_gradient_of_w(mixed, inputs):
    """dL/dR = (α/r)·Bᵀ (dL/dW) Aᵀ, with dL/dW from a model whose W is trained."""
    model = mixed.double()
    ids, image = inputs[0], inputs[1].double()
    full = copy.deepcopy(model)
    full(ids, image).pow(2).sum().backward()
    inject(model, LoRAXSConfig(rank=3, alpha=7, targets=TARGETS, r_std=0.0))
    model(ids, image).pow(2).sum().backward()
    for _, layer in layers(model):
        dW = layer.kind.to_matrix(full.get_submodule(layer.name).weight.grad)
        expected = 7 / 3 * layer.B.t() @ dW @ layer.A.t()
        torch.testing.assert_close(layer.R["default"].grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(mixed, inputs, train_r, dtype):
    """As near to float64 as the dense model in the same precision is, up to a small factor."""
    exact = copy.deepcopy(mixed).double()
    model = inject(mixed.to(dtype), LoRAXSConfig(rank=3, targets=TARGETS))
    train_r(model)
    layer = model.down.lora_xs
    assert layer.A.dtype == layer.B.dtype == dtype
    assert layer.R["default"].dtype == torch.float32
    inject(exact, LoRAXSConfig(rank=3, targets=TARGETS))
    for (_, a), (_, b) in zip(layers(exact), layers(model), strict=True):
        a.R["default"].data.copy_(b.R["default"])
    want = exact(inputs[0], inputs[1].double())
    naive = (merge(copy.deepcopy(model))(inputs[0], inputs[1].to(dtype)) - want).abs().max()
    got = model(inputs[0], inputs[1].to(dtype))
    assert got.dtype == dtype
    assert (got - want).abs().max() < 3 * naive + 1e-3
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained(model)["R"])


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(mixed, inputs, train_r, base):
    model = inject(mixed, LoRAXSConfig(rank=3, targets=TARGETS))
    train_r(model)
    want = model(*inputs)
    if base is torch.bfloat16:
        R = [layer.R for _, layer in layers(model)]
        model.to(base)
        for r in R:  # stay in float32, as inject leaves them on a bf16 base
            r.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(inputs[0], inputs[1].to(base))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    got.float().pow(2).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in trained(model)["R"])


def test_embedding_keeps_its_dtype_under_autocast():
    model = inject(nn.Sequential(nn.Embedding(9, 6)), LoRAXSConfig(rank=2, targets=("0",), r_std=1.0))
    ids = torch.arange(9)
    want = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_only_r_and_head_train(mixed, inputs):
    model = inject(mixed, LoRAXSConfig(rank=3, targets=TARGETS))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{t}.lora_xs.R.default" for t in TARGETS} | {"classifier.weight", "classifier.bias"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups = trained(model)
    assert not groups["bases"]
    optimizer = torch.optim.AdamW([{"params": groups["R"]}, {"params": groups["head"], "lr": 1e-2}], lr=1e-1)
    out = model(*inputs)
    out.pow(2).sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names
    assert not torch.equal(model(*inputs), out)


def test_train_bases(mixed, inputs):
    model = inject(mixed, LoRAXSConfig(rank=3, targets=("down",), train_bases=True, r_std=0.1))
    model(*inputs).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in trained(model)["bases"])
    assert len(trained(model)["bases"]) == 2


def saved_bytes(model, *args):
    """Bytes of what autograd keeps, parameters aside, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*args)
    return sum(s.nbytes() for s in kept.values())


def test_a_linear_keeps_only_z():
    """x (64×128) has 32 KiB; z = A x (64×4) has 1 KiB, and R·(α/r) 64 bytes."""
    model = inject(nn.Sequential(nn.Linear(128, 96)), LoRAXSConfig(rank=4))
    x = torch.randn(64, 128, requires_grad=True)
    assert saved_bytes(model, x) == 64 * 4 * 4 + 4 * 4 * 4


def test_dropout_is_of_width_r_and_off_in_eval(mixed, inputs):
    model = inject(mixed, LoRAXSConfig(rank=3, targets=TARGETS, dropout=0.5, r_std=1.0)).eval()
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))


@pytest.mark.slow
def test_deepcopy_and_compile(mixed, inputs, train_r):
    model = train_r(inject(mixed, LoRAXSConfig(rank=3, targets=TARGETS)))
    twin = copy.deepcopy(model)
    want = model(*inputs)
    assert torch.equal(twin(*inputs), want)
    train_r(model)
    assert not torch.equal(model(*inputs), want)
    assert torch.equal(twin(*inputs), want)  # the copy's hooks belong to the copy
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert twin.down.lora_xs.R["default"].grad is not None


def test_gradient_checkpointing(mixed, inputs, train_r):
    model = train_r(inject(mixed, LoRAXSConfig(rank=3, targets=TARGETS)))
    model(*inputs).sum().backward()
    want = [p.grad.clone() for p in trained(model)["R"]]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, *inputs, use_reentrant=False).sum().backward()
    for p, grad in zip(trained(model)["R"], want, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_transformer_encoder_fast_path_sees_the_adapter():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    inject(layer, LoRAXSConfig(rank=2, targets=("linear1", "linear2"), r_std=1.0))
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x))
    merge(layer)
    torch.testing.assert_close(fast, layer(x))


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 3


class Asking(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_subclass_that_answers_as_a_linear_layer_is_adapted(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(Own(40, 24)).to(dtype), torch.randn(5, 40, dtype=dtype)
    state = torch.get_rng_state()
    base = model(x)
    inject(model, LoRAXSConfig(rank=4, r_std=1.0), cache=False)
    assert torch.equal(torch.get_rng_state(), state)
    answer = model(x)
    assert not torch.equal(answer, base)
    merge(model)
    torch.testing.assert_close(model(x), answer, rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0.1)
    with pytest.raises(LoRAXSError, match=r"0 is a Own, whose forward is not that of nn\.Linear"):
        inject(nn.Sequential(Own(4, 4, device="meta")), LoRAXSConfig(rank=2), cache=False)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.LayerNorm(4), "is a LayerNorm"),
        (nn.MultiheadAttention(4, 2).out_proj, "never calls it"),
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (Scaled(4, 4), "whose forward"),
        (Doubled(4, 4), "is a Doubled, whose forward"),
        (Asking(4, 4), "is a Asking, whose forward"),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused(module, message):
    with pytest.raises(LoRAXSError, match=message):
        inject(nn.Sequential(module), LoRAXSConfig(rank=2, targets=("0",)))
