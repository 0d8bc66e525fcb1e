"""Weights that a forward reads without calling their module: attention's projections, stacked experts, timm's qkv."""

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from lora_xs import (
    LoRAXSConfig,
    LoRAXSError,
    add,
    check_called,
    coverage,
    describe_adapter,
    disable,
    export_peft,
    inject,
    load_adapter,
    merge,
    param_groups,
    remove,
    rows,
    save_adapter,
    set_active,
    uncalled,
    unmerge,
)
from lora_xs.layer import layers
from torch import nn
from torch.nn import functional as F


class Experts(nn.Module):
    """Stacked experts as transformers has them: gate and up (n×2h×d), down (n×d×h), chosen by a router outside."""

    def __init__(self, n=3, d=6, h=5, transposed=False):
        super().__init__()
        up, down = (n, 2 * h, d), (n, d, h)
        if transposed:
            up, down = (n, d, 2 * h), (n, h, d)
        self.transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))

    def forward(self, x, chosen):
        """x (b×d), chosen (b) → (b×d)"""
        up, down = self.gate_up_proj[chosen], self.down_proj[chosen]
        if self.transposed:
            up, down = up.mT, down.mT
        gate, value = torch.einsum("boi,bi->bo", up, x).chunk(2, -1)
        return torch.einsum("boi,bi->bo", down, torch.tanh(gate) * value)


class Reader(nn.Module):
    """As timm's BEiT: it multiplies by the weight of a module that it never calls."""

    def __init__(self, d=6):
        super().__init__()
        self.qkv = nn.Linear(d, d)
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight).tanh())


class Block(nn.Module):
    def __init__(self, d=6, transposed=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.router = nn.Linear(d, 3)
        self.experts = Experts(d=d, transposed=transposed)
        self.reader = Reader(d)

    def forward(self, x):
        """(b×t×d) → (b×t×d)"""
        x = x + self.attention(x, x, x, need_weights=False)[0]
        flat = x.flatten(0, 1)
        weight, chosen = self.router(flat).softmax(-1).max(-1, keepdim=True)
        x = x + (weight * self.experts(flat, chosen[:, 0])).view(x.shape)
        return x + self.reader(x)


class Model(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.layers = nn.ModuleList(Block(transposed=transposed) for _ in range(2))
        self.classifier = nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


STACKS = ["experts.gate_up_proj", "experts.down_proj"]
EVERYTHING = ["attention.in_proj_weight", "attention.out_proj", *STACKS, "router", "reader.qkv", "reader.proj"]
CONFIG = LoRAXSConfig(2, alpha=3, through_weight=("qkv",))


@pytest.fixture(params=[False, True], ids=["out×in", "in×out"])
def model(request):
    torch.manual_seed(3)
    return Model(transposed=request.param).double()


@pytest.fixture
def x():
    return torch.randn(3, 4, 6, dtype=torch.float64)


def test_all_linear_is_all_that_is_linear(model):
    inject(model, CONFIG)
    names = [layer.name for _, layer in layers(model)]
    assert sorted(names) == sorted(f"layers.{i}.{name}" for i in range(2) for name in EVERYTHING)
    assert coverage(model).missing == {}
    assert coverage(model).part == 0


def test_the_update_equals_dense_weights_and_merging(model, x, train_r):
    plain, names = copy.deepcopy(model), set(dict(model.named_parameters()))
    train_r(inject(model, CONFIG))
    assert names <= set(dict(model.named_parameters()))  # a weight keeps its name
    with torch.no_grad():
        for module, layer in layers(model):
            own = dict((m, n) for n, m in model.named_modules())[module]
            W = plain.get_submodule(own).get_parameter(layer.parameter)
            # The slow reference: each matrix's own sum.
            A, B, R = (t.view(-1, *t.shape[-2:]) for t in (layer.A, layer.B, layer.R["default"]))
            sums = [3 / 2 * b @ r @ a for a, b, r in zip(A, B, R, strict=True)]
            sums = [s.t() for s in sums] if "T" in layer.kind.name else sums
            W.add_(torch.stack(sums).view(W.shape))
    want = plain(x)
    assert (want - model(x)).abs().max() < 1e-12
    with disable(model):
        assert not torch.equal(model(x), want)
    before = {n: p.clone() for n, p in model.named_parameters()}
    merge(model)
    torch.testing.assert_close(model(x), want)
    unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(model(x), want)


def test_bases_are_each_matrix_own(model):
    plain = copy.deepcopy(model)
    inject(model, CONFIG)
    for i in range(3):
        W = plain.layers[1].experts.gate_up_proj[i]
        W = W.t() if plain.layers[1].experts.transposed else W
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        layer = model.layers[1].experts.lora_xs["gate_up_proj"]
        torch.testing.assert_close((layer.B[i] @ layer.A[i]), (U[:, :2] * S[:2]) @ Vh[:2])


def test_gradients_are_the_projected_gradients_of_the_weights(model, x):
    full = copy.deepcopy(model)
    full(x).pow(2).sum().backward()
    inject(model, LoRAXSConfig(2, alpha=3, through_weight=("qkv",), r_std=0.0))
    model(x).pow(2).sum().backward()
    for module, layer in layers(model):
        own = dict((m, n) for n, m in model.named_modules())[module]
        dW = layer.kind.to_matrix(full.get_submodule(own).get_parameter(layer.parameter).grad)
        torch.testing.assert_close(layer.R["default"].grad, 3 / 2 * layer.B.mT @ dW @ layer.A.mT)
    groups = param_groups(model)
    assert sum(p.numel() for p in groups[0]["params"]) == 2 * (5 * 4 + 2 * 3 * 4)


@pytest.mark.slow
def test_files_adapters_and_taking_off(model, x, train_r, tmp_path):
    plain = copy.deepcopy(model)
    train_r(inject(model, CONFIG))
    want = model(x)
    save_adapter(model, tmp_path)
    info = describe_adapter(tmp_path)
    assert info.trained == 2 * (5 * 4 + 2 * 3 * 4)
    assert not info.stored_bases
    again = load_adapter(copy.deepcopy(plain), tmp_path)
    assert torch.equal(again(x), want)
    save_adapter(again, tmp_path / "again")
    assert (tmp_path / "again/adapter.safetensors").read_bytes() == (tmp_path / "adapter.safetensors").read_bytes()
    add(again, "second")
    load_adapter(again, tmp_path, name="third")
    set_active(again, "second")
    assert not torch.equal(again(x), want)
    set_active(again, "third")
    assert torch.equal(again(x), want)
    with rows_refused():
        rows(again, ["second"] * 3).__enter__()
    with pytest.raises(LoRAXSError, match=r"in_proj_weight is adapted through its weight.*merge"):
        export_peft(again, tmp_path / "peft")
    twin = copy.deepcopy(again)
    assert torch.equal(twin(x), want)
    remove(again)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in again.modules())
    with torch.no_grad():
        assert torch.equal(again(x), plain(x))
    assert torch.equal(twin(x), want)
    other = copy.deepcopy(plain)
    other.layers[1].experts.down_proj.data[2] += 1e-9
    with pytest.raises(LoRAXSError, match=r"layers\.1\.experts\.down_proj differs"):
        load_adapter(other, tmp_path)


def rows_refused():
    return pytest.raises(LoRAXSError, match="through its weight, which is one for all rows")


def test_an_exception_in_the_forward_leaves_the_weights_as_they_were(model, x):
    inject(model, CONFIG)
    want = model(x)
    with pytest.raises(AssertionError, match="embedding dimension"):
        model(x[..., :5])
    with pytest.raises(RuntimeError):  # in the experts' forward
        model.layers[0].experts(x.flatten(0, 1)[:, :5], torch.zeros(12, dtype=torch.int64))
    for module, layer in layers(model):
        assert layer.parameter not in module.__dict__
    assert torch.equal(model(x), want)


def test_checkpointing_recomputes_with_the_adapter(model, x, train_r):
    train_r(inject(model, CONFIG))
    model(x).sum().backward()
    want = [p.grad.clone() for p in param_groups(model)[0]["params"]]
    model.zero_grad()
    h = x
    for layer in model.layers:
        h = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False)
    model.classifier(h.mean(1)).sum().backward()
    for p, grad in zip(param_groups(model)[0]["params"], want, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert not any(layer.parameter in module.__dict__ for module, layer in layers(model))


@pytest.mark.slow
def test_compiled(x):
    torch.manual_seed(0)
    model = nn.Sequential(Reader(), Reader()).double()
    inject(model, LoRAXSConfig(2, through_weight=("qkv",), r_std=0.3))
    want = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    compiled(x).sum().backward()
    assert model[0].qkv.lora_xs["weight"].R["default"].grad.abs().max() > 0


def test_half_precision_and_autocast(x, train_r):
    torch.manual_seed(1)
    model = train_r(inject(Model().double(), CONFIG), scale=0.1)
    want = model(x)
    half = Model().to(torch.bfloat16)
    half.load_state_dict(remove(copy.deepcopy(model)).state_dict())
    inject(half, CONFIG)
    for (_, a), (_, b) in zip(layers(half), layers(model), strict=True):
        a.R["default"].data.copy_(b.R["default"])
    got = half(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 0.1 * want.norm()
    got.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in param_groups(half)[0]["params"])
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x.float()) - want).norm() < 0.1 * want.norm()


def test_dropout_through_a_weight_is_refused(model):
    with pytest.raises(LoRAXSError, match=r"dropout acts on A x, and layers\.0\.attention\.in_proj_weight"):
        inject(model, LoRAXSConfig(2, dropout=0.1))


# -- nothing untrained without a word ---------------------------------------------------------------------------------


def test_a_weight_read_by_its_parent_is_named_once_after_the_first_backward_pass(model, x):
    inject(model, LoRAXSConfig(2))
    with pytest.warns(UserWarning, match=r'nothing at layers\.\*\.reader\.qkv \(2\).*through_weight=\("qkv",\)'):
        model(x).sum().backward()
    assert uncalled(model) == ["layers.0.reader.qkv", "layers.1.reader.qkv"]
    with pytest.raises(LoRAXSError, match="never calls these modules"):
        check_called(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()  # once


@pytest.mark.parametrize("way", ["loaded", "a second one", "loaded beside another"])
def test_it_is_named_for_adapters_that_were_loaded_or_added_too(model, x, tmp_path, way):
    plain = copy.deepcopy(model)
    inject(model, LoRAXSConfig(2))
    if way == "a second one":
        add(model, "b")
        set_active(model, "b")
    else:
        save_adapter(model, tmp_path)
        if way == "loaded":
            model = plain
        load_adapter(model, tmp_path, name="b")
        if way != "loaded":
            set_active(model, "b")
    with pytest.warns(UserWarning, match=r"nothing at layers\.\*\.reader\.qkv \(2\)"):
        model(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_active(model, "b")
        model(x).sum().backward()  # once


def test_a_model_whose_targets_are_all_reached_hears_nothing(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, CONFIG)
        model(x).sum().backward()
    check_called(model)


def test_an_expert_without_tokens_is_no_fault(x):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return self.experts[1](x)

    model = inject(Routed().double(), LoRAXSConfig(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
    assert uncalled(model) == []


def test_experts_that_targets_by_name_leave_out_are_counted_and_named(model):
    with pytest.warns(UserWarning, match=r"(\d+) % of the weights of the blocks have no adapter: .*experts") as said:
        inject(model, LoRAXSConfig(2, targets=("router", "proj")))
    (message,) = [str(w.message) for w in said]
    assert "layers.*.experts.gate_up_proj" in message
    assert "qkv" not in message  # its user has not named it
    n = sum(p.numel() for p in model.layers.parameters() if p.ndim >= 2 and p.requires_grad is False)
    assert coverage(model).missing["layers.*.experts.down_proj"] == 2 * 3 * 6 * 5
    assert n > 0


def test_what_all_linear_cannot_adapt_is_counted_and_named():
    model = nn.Sequential(nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(32, 4)))
    with pytest.warns(UserWarning, match=r"43 % of the weights of the blocks have no adapter: \*\.\*"):
        inject(model, LoRAXSConfig(2))
    assert coverage(model).part == 96 / (96 + 128)


def test_experts_and_projections_by_name(model):
    inject(model, LoRAXSConfig(2, targets=("experts.gate_up_proj", "experts.down_proj", "in_proj_weight", "out_proj")))
    assert len(layers(model)) == 8
    with pytest.raises(LoRAXSError, match="name its in_proj_weight and out_proj"):
        inject(Model(), LoRAXSConfig(2, targets=("attention",)))


def test_pickling_leaves_the_hooks_alone(model, x, tmp_path):
    inject(model, CONFIG)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))


# -- real classes -----------------------------------------------------------------------------------------------------


def tiny(name):
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0,
    }  # fmt: skip
    more = {
        "Mixtral": {"num_local_experts": 3},
        "Qwen3Moe": {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "head_dim": 8},
        "GptOss": {"num_local_experts": 3, "head_dim": 8, "num_experts_per_tok": 2},
        "Mamba": {"state_size": 4, "time_step_rank": 4},
    }[name]
    if name == "Mamba":
        common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**common, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_experts_of_transformers(name, train_r, tmp_path):
    torch.manual_seed(0)
    base = tiny(name)
    for p in base.parameters():
        p.data.normal_(std=0.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*no adapter: model\.layers\.\*\.mlp\.(gate|router)$")  # tiny here
        model = inject(copy.deepcopy(base), LoRAXSConfig(2))
    stacks = [layer for _, layer in layers(model) if layer.A.ndim == 3]
    assert len(stacks) == 4
    assert all(layer.kind.name == ("StackT" if name == "GptOss" else "Stack") for layer in stacks)
    train_r(model)
    ids = torch.randint(1, 40, (2, 7))
    got = model(ids).logits
    got.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in param_groups(model)[0]["params"])
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base, tmp_path)(ids).logits, got)
    merge(model, keep=False)
    torch.testing.assert_close(model(ids).logits, got, rtol=1e-4, atol=1e-5)


def test_llama4_experts_are_known_as_transposed():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = transformers.Llama4TextConfig(hidden_size=16, intermediate_size=24, num_local_experts=3)
    blocks = nn.ModuleList([modeling.Llama4TextExperts(config)])
    blocks[0].gate_up_proj.data.normal_()
    blocks[0].down_proj.data.normal_()
    inject(blocks, LoRAXSConfig(2))
    assert [layer.kind.name for _, layer in layers(blocks)] == ["StackT", "StackT"]
    assert [tuple(layer.B.shape) for _, layer in layers(blocks)] == [(3, 48, 2), (3, 16, 2)]


def test_mamba_says_what_it_does_not_train():
    model = tiny("Mamba")
    ids = torch.randint(1, 40, (2, 7))
    with pytest.warns(UserWarning, match="no adapter: .*conv1d"):
        inject(model, LoRAXSConfig(2))
    with pytest.warns(UserWarning, match=r"nothing at backbone\.layers\.\*\.mixer\.dt_proj \(2\)"):
        model(ids).logits.sum().backward()
    remove(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no adapter")
        inject(model, LoRAXSConfig(2, through_weight=("dt_proj",)))
    model(ids).logits.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in param_groups(model)[0]["params"])


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_qkv_of_timm(name):
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 28, "patch_size": 14, "num_classes": 3}
    model = timm.create_model(name, **sizes)
    image = torch.randn(2, 3, 28, 28)
    config = {
        "targets": ("qkv", "proj") if "beit" in name else ("q_proj", "k_proj", "v_proj", "proj"),
        "head": ("head",),
    }
    names = [n for n, _ in model.named_modules()]
    if not any(n.endswith("q_proj") for n in names):
        config["targets"] = ("qkv", "proj")
    inject(model, LoRAXSConfig(2, exclude=("patch_embed.proj",), **config))
    with pytest.warns(UserWarning, match=r"nothing at blocks\.\*\.attn\.qkv \(2\)"):
        model(image).sum().backward()
    remove(model)
    inject(model, LoRAXSConfig(2, exclude=("patch_embed.proj",), through_weight=("qkv",), **config))
    model.zero_grad()
    model(image).sum().backward()
    check_called(model)
    assert all(p.grad.abs().max() > 0 for p in param_groups(model)[0]["params"])


def test_torch_transformer_layers_learn_their_attention(train_r):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    train_r(inject(model, LoRAXSConfig(2)))
    assert len(layers(model)) == 8
    want = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), want)
    merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)


def test_a_padded_batch_in_evaluation(train_r):
    """nn.TransformerEncoder then makes a nested tensor of it."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = train_r(inject(nn.TransformerEncoder(layer, 2), LoRAXSConfig(2)))
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    want = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        got = model.eval()(x, src_key_padding_mask=padding)
    for row, length in ((0, 5), (1, 3)):
        torch.testing.assert_close(got[row, :length], want[row, :length])


def test_a_weight_of_zeros_is_named_since_its_adapter_can_train_nothing():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match=r"^\* have weights of zeros, .* train nothing"):
        inject(model, LoRAXSConfig(rank=2), cache=False)
    model(torch.randn(3, 6)).square().sum().backward()
    assert not model[1].lora_xs.R["default"].grad.any()


def test_a_head_of_several_layers_is_trained_and_saved_part_by_part(tmp_path):
    """torchvision's classifiers: a container calls whatever is added to it, so that nothing may be."""

    def build():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        head = nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
        return nn.Sequential(OrderedDict(features=body, classifier=head))

    model, x = inject(build(), LoRAXSConfig(rank=2), cache=False), torch.randn(3, 6)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if n.startswith("classifier")} == {
        f"classifier.{part}.{leaf}" for part in ("1", "3.0") for leaf in ("weight", "bias")
    }
    with torch.no_grad():
        for p in (p for group in param_groups(model) for p in group["params"]):
            p.normal_()
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(build(), tmp_path).eval()(x), model.eval()(x))
