"""LTE on models that are not ours: what is adapted, what is refused by name, what is said to be left out."""

import warnings

import lte
import pytest
import torch
from lte import LTEConfig, Merger, inject, merge, merged_state_dict, unload
from lte.injection import lte_layers
from small_models import Doubled, Own, mixtral
from torch import nn
from torch.nn.utils import parametrizations

TWO = LTEConfig(heads=2, rank=2, alpha=4.0)


@pytest.fixture
def plain_bfloat16():
    """Without oneDNN, whose bfloat16 products end the process on processors that announce AMX and lack it."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def quietly(model, config=TWO):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inject(model, config)


def train(model, batch, loss_of, steps=3, every=2, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    merger = Merger(model.train(), every)
    for _ in range(steps):
        loss_of(model(**batch) if isinstance(batch, dict) else model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        merger.step()
    return model


def square(out):
    return (getattr(out, "logits", out)).float().square().mean()


def encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_encoder_in_evaluation_uses_the_heads(activation, masked):
    """Its fast path reads linear1.weight and linear2.weight, where unmerged heads are not."""
    plain = encoder(activation=activation).eval()
    model = encoder(activation=activation)
    model.load_state_dict(plain.state_dict())
    inject_said(model)
    x = torch.randn(4, 5, 16)
    train(model, x, square, every=0)
    model.eval()
    mask = torch.arange(5) >= torch.tensor([5, 3, 4, 5])[:, None] if masked else None
    with torch.no_grad():
        before = plain(x, src_key_padding_mask=mask)
        plain.load_state_dict(merged_state_dict(model))
        expected, found = plain(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask)
        keep = torch.ones(4, 5, dtype=torch.bool) if mask is None else ~mask
        torch.testing.assert_close(found[keep], expected[keep], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[keep], before[keep], atol=1e-3)
        unload(model)
        assert model.layers[0].activation_relu_or_gelu == plain.layers[0].activation_relu_or_gelu > 0
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected, rtol=1e-5, atol=1e-5)


def inject_said(model):
    """nn.MultiheadAttention's own projections cannot have heads, and that is said."""
    with pytest.warns(UserWarning, match=r"(\d+)% of the weights of the blocks have no heads") as said:
        inject(model, TWO)
    text = str(said[0].message)
    assert "layers.*.self_attn.in_proj_weight, layers.*.self_attn.out_proj.weight" in text
    assert text.startswith("50%")  # 4·16² of 4·16² + 2·16·32
    assert "trained whole, one for all heads" in text


def test_batch_second_is_refused_and_not_cut_along_the_sequence():
    def model():
        return nn.Transformer(16, 2, 1, 1, 32, dropout=0.0)

    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.linear1 .*batch_first=False.*sequential"):
        inject(model(), TWO)
    quietly(model(), LTEConfig(heads=2, rank=2, mode="sequential"))
    quietly(nn.Transformer(16, 2, 1, 1, 32, batch_first=True))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)

    with pytest.warns(UserWarning, match=r"blocks\.0 has a MultiheadAttention with batch_first=False"):
        inject(nn.ModuleDict({"blocks": nn.ModuleList([Own()])}), TWO)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "bfloat16", "4bit"])
def test_gpt2_of_the_hub(base):
    """transformers' Conv1D keeps (in, out); trained, merged and put back, it is the same function."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        inject(model, LTEConfig(heads=2, rank=2, alpha=4.0, base=base))
    assert sum(isinstance(m, lte.LTEConv1D) for m in model.modules()) == 8
    assert lte.without_heads(model) == (0.0, [])
    tokens = torch.randint(0, 30, (4, 8))
    start = {n: p.clone() for n, p in merged_state_dict(model).items()}
    train(model, {"input_ids": tokens}, square, steps=5)
    model.eval()
    logits = model(input_ids=tokens).logits
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(plain(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.transformer.h[0].mlp.c_fc.weight, start["transformer.h.0.mlp.c_fc.weight"])
    merge(model)
    torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-5)
    unload(model)
    assert type(model.transformer.h[0].mlp.c_fc) is type(plain.transformer.h[0].mlp.c_fc)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("replicas", [("embeddings",), ()])
def test_unload_keeps_ties_dtypes_and_copies(replicas):
    from memtrain_common.models.gpt import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=6, vocab_size=11, n_layer=1, n_head=2, n_embd=8)).bfloat16()
    names = dict(model.named_parameters()).keys()
    vectors = ("norms",) if replicas else ()
    inject(model, LTEConfig(heads=2, rank=2, replicas=replicas, vectors=vectors))
    expected = merged_state_dict(model)
    unload(model)
    assert dict(model.named_parameters()).keys() == names
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].bfloat16())


class SharedBias(nn.Module):
    """Two linear layers, a norm each, and a plain parameter's owner that share biases."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.last = nn.LayerNorm(6), nn.LayerNorm(6)
        self.second.bias = self.head.bias = self.first.bias
        self.last.bias = self.norm.bias

    def forward(self, x):
        return self.head(self.last(self.second(self.norm(self.first(x)).relu())))


@pytest.mark.parametrize("to", [None, torch.float64])
def test_biases_of_several_layers_stay_one(to):
    model = SharedBias()
    names = dict(model.named_parameters()).keys()
    inject(model, LTEConfig(heads=2, rank=2, alpha=4.0, exclude=("head",), trainable=("biases",)))
    if to is not None:
        model.to(to)
    x = torch.randn(4, 6, dtype=to)
    train(model, {"x": x}, lambda y: y.square().mean())
    expected = model.eval()(x)
    unload(model)
    assert model.first.bias is model.second.bias
    if to is None:  # else the layers have their old dtype again, and the others the new one
        assert dict(model.named_parameters()).keys() == names
    torch.testing.assert_close(model.float()(x.float()), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(vectors=("biases",)), "first shares its bias with second.bias, head.bias"),
        (dict(vectors=("norms",)), "norm shares its bias with last.bias .*leave norms out of vectors"),
    ],
)
def test_heads_of_a_vector_that_two_layers_share_are_refused(config, said):
    model = SharedBias()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=said):
        inject(model, LTEConfig(heads=2, rank=2, **config))
    assert dict(model.named_modules()) == before


def test_a_model_with_only_its_task_head_to_adapt_is_refused():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    def model():
        return nn.ModuleDict({"blocks": nn.ModuleList([Quantized()]), "score": nn.Linear(8, 2)})

    with pytest.raises(ValueError, match=r"only score would get heads.*\(Quantized\).*nothing to do"):
        inject(model(), TWO)
    with pytest.warns(UserWarning, match=r"100% .*blocks\.\*\.weight"):
        inject(model(), LTEConfig(heads=2, rank=2, targets=("score",)))  # who names it gets it


def test_experts_are_counted_and_named():
    model = mixtral(experts=4)
    raw = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n or n.endswith("gate.weight"))
    whole = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1)
    with pytest.warns(UserWarning, match=rf"{raw / whole:.0%} of the weights of the blocks .*experts\.gate_up_proj"):
        inject(model, TWO)
    assert lte.without_heads(model, ("experts", "gate")) == (0.0, [])


def test_a_subclass_that_answers_as_a_linear_layer_has_heads():
    model = nn.Sequential(nn.Sequential(Own(6, 6)), nn.Sequential(Doubled(6, 6)), nn.Sequential(nn.Linear(6, 0)))
    x, state = torch.randn(4, 6), torch.get_rng_state()
    base = model[0](x)
    assert lte.without_heads(model) == (0.5, ["*.*.weight"])
    assert torch.equal(torch.get_rng_state(), state)
    quietly(model)
    assert list(lte_layers(model)) == ["0.0"]
    torch.testing.assert_close(model[0](x), base)
    train(model[0], x, square)
    unload(model)
    assert type(model[0][0]) is Own


def test_heads_that_no_backward_pass_reaches_are_named_once():
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    model = timm.models.beit.Beit(**sizes)
    inject(model, LTEConfig(heads=2, rank=2, exclude=("head", "patch_embed.proj")))
    with pytest.warns(UserWarning, match=r"did not reach heads of blocks\.0\.attn\.qkv, blocks\.1\.attn\.qkv,") as said:
        train(model, torch.randn(4, 3, 32, 32), square)
    assert sum("did not reach" in str(w.message) for w in said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other = inject(timm.models.beit.Beit(**sizes), LTEConfig(heads=2, rank=2, exclude=("head", "proj", "qkv")))
        train(other, torch.randn(4, 3, 32, 32), square)


def test_a_layer_fed_by_a_table_of_positions_is_refused_by_name():
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=4, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, num_classes=3)
    model = timm.models.swin_transformer_v2.SwinTransformerV2(**sizes)
    quietly(model, LTEConfig(heads=2, rank=2, exclude=("head.fc",)))
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.attn\.cpb_mlp\.0 meets 1 rows.* batch of 4.*exclude"):
        model(torch.randn(4, 3, 32, 32))
    model.eval()
    model(torch.randn(4, 3, 32, 32))
    model = timm.models.swin_transformer_v2.SwinTransformerV2(**sizes)
    quietly(model, LTEConfig(heads=2, rank=2, exclude=("head.fc", "cpb_mlp.0", "cpb_mlp.2")))
    train(model, torch.randn(4, 3, 32, 32), square)


def test_a_table_as_long_as_chunks_is_refused_too():
    """Eight positions could be cut into two chunks of four; they are no batch of three."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.positions, self.body = nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.body(x + self.positions(self.table))

    model = inject(Positions(), LTEConfig(heads=2, rank=2))
    with pytest.raises(ValueError, match="positions meets 8 rows, no multiple of the batch of 6"):
        model(torch.randn(6, 8, 4))


@pytest.mark.parametrize(
    ("norm", "match"),
    [
        (parametrizations.weight_norm, "WeightNorm computes it.*remove_parametrizations"),
        (parametrizations.spectral_norm, "SpectralNorm computes it.*remove_parametrizations"),
        (nn.utils.spectral_norm, "SpectralNorm computes it.*remove_spectral_norm"),
        (nn.utils.weight_norm, "WeightNorm computes it.*remove_weight_norm"),
    ],
)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(6, 6, 3)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_is_refused_by_name(norm, match, layer):
    def model():
        return nn.ModuleDict({"made": norm(layer()), "own": nn.Linear(6, 6)})

    with pytest.raises(ValueError, match=rf"made has no weight of its own, _?{match}"):
        inject(model(), TWO)
    inject(model(), LTEConfig(heads=2, rank=2, exclude=("made",)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "4bit"])
def test_heads_stay_float32_when_the_model_is_cast(dtype, base, plain_bfloat16):
    """A step of 1e-4 on a factor of 1 would be lost in bfloat16, and a tenth of small merges."""
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 16))
    inject(model, LTEConfig(heads=2, rank=2, alpha=2.0, trainable=("biases",), vectors=("biases",), base=base))
    model.to(dtype)
    whole = {n: t.dtype for n, t in model.state_dict().items() if "lora_" in n or "merged_" in n}
    assert set(whole.values()) == {torch.float32}
    assert model[0].weight is None or model[0].weight.dtype == (torch.bfloat16 if base == "bfloat16" else torch.float32)
    assert model[2].weight.dtype == dtype
    x = torch.randn(4, 3, 16, dtype=dtype)
    before = model[0].lora_A.detach().clone()
    train(model, x, square, lr=1e-4)
    moved = (model[0].lora_A - before).abs()
    assert 0.5e-4 < moved.median() < 4e-4
    assert model(x).dtype == dtype
    y = model.eval()(x)
    assert y.dtype == dtype
    merge(model)
    assert torch.equal(model(x), y) or torch.allclose(model(x).float(), y.float(), atol=1e-2)
    double = model.double()  # and the other way: float64 where W is kept as it is
    assert double[0].lora_A.dtype == (torch.float64 if base == "float32" else torch.float32)


def test_convolutions_and_norms_are_cast_too(plain_bfloat16):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8))
    inject(model, LTEConfig(heads=2, rank=2, vectors=("norms", "biases"))).to(torch.bfloat16)
    assert model[0].weight.dtype == model[3].weight.lora_B.dtype == torch.float32
    x = torch.randn(4, 3, 4, 4, dtype=torch.bfloat16)
    train(model, x, square)
    assert model(x).dtype == model.eval()(x).dtype == torch.bfloat16


def pictures_tower(kind):
    """One block of a vision model, which casts its pictures to the type of its first weight."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    prefix, model = {"clip": ("CLIPVision", "Model"), "dinov2": ("Dinov2", "Model"), "vit": ("ViT", "Model")}[kind]
    return getattr(transformers, prefix + model)(getattr(transformers, f"{prefix}Config")(**sizes))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "4bit"])
@pytest.mark.parametrize("kind", ["clip", "dinov2", "vit"])
def test_a_bfloat16_model_that_casts_to_the_type_of_a_weight(kind, base, when, plain_bfloat16):
    model, x = pictures_tower(kind).eval(), torch.randn(4, 3, 16, 16)
    model = model.bfloat16() if when == "before" else model
    whole = model(pixel_values=x).last_hidden_state.detach()
    inject(model, LTEConfig(heads=2, rank=2, alpha=4.0, base=base)).to(torch.bfloat16)
    answer = model(pixel_values=x).last_hidden_state
    assert answer.dtype == torch.bfloat16
    if base != "4bit":
        torch.testing.assert_close(answer.float(), whole.float(), rtol=0, atol=0.1)
    train(model, {"pixel_values": x}, lambda out: out.last_hidden_state.float().square().mean(), steps=1)
    assert model(pixel_values=x).last_hidden_state.dtype == torch.bfloat16
    model.float()
    assert model(pixel_values=x).last_hidden_state.dtype == torch.float32


def test_a_halved_master_does_not_halve_a_float32_model():
    """As T5's last layer of a block, whose input is cast to the type of its weight."""

    class Casts(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).to(self[1].weight.dtype))

    plain = Casts(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    x = torch.randn(4, 8)
    expected = plain(x)
    model = inject(plain, LTEConfig(heads=2, rank=2, base="bfloat16"))
    assert model(x).dtype == torch.float32
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-2)


class Codes(nn.Linear):
    """A quantized layer that answers, as bitsandbytes' and others' do."""

    def __init__(self, n, m, dtype):
        super().__init__(n, m)
        self.weight = nn.Parameter((self.weight.data * 50).to(dtype), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 50, self.bias)


class Wrapped(torch.Tensor):
    """A weight that is made of other tensors, as torchao's."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        plain = [a.inner.float() if isinstance(a, Wrapped) else a for a in args]
        return func(*plain, **(kwargs or {}))


def wrapped(n, m):
    layer = nn.Linear(n, m)
    layer.weight = nn.Parameter(Wrapped(torch.ones(m, n, dtype=torch.int8)), requires_grad=False)
    return layer


def plain_codes(n, m):
    layer = nn.Linear(n, m)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        lambda n, m: Codes(n, m, torch.int8),
        lambda n, m: Codes(n, m, torch.float8_e4m3fn),
        plain_codes,
        wrapped,
        lambda n, m: nn.Linear(n, m, dtype=torch.complex64),
    ],
    ids=["int8", "float8", "float8 in a plain layer", "made of others", "complex"],
)
def test_weights_that_no_delta_can_be_added_to_have_no_heads(layer):
    model = nn.ModuleList([nn.ModuleDict({"own": nn.Linear(4, 4), "codes": layer(4, 4)}) for _ in range(2)])
    before, trains = [m["codes"] for m in model], model[0]["codes"].weight.requires_grad
    with pytest.raises(ValueError, match=r"0\.codes has a weight that deltas cannot be added to .* plain tensor"):
        inject(model, LTEConfig(heads=2, rank=2, targets=("own", "codes")))
    assert type(model[0]["own"]) is nn.Linear
    with pytest.raises(ValueError, match=r"0\.codes has a weight that deltas cannot be added to"):
        inject(model, LTEConfig(heads=2, rank=2, exclude=("own",)))
    with pytest.warns(
        UserWarning, match=r"50% of the weights of the blocks have no heads: \*\.codes\.weight; they are (.*)"
    ) as said:
        inject(model, TWO)
    assert str(said[0].message).endswith("they are " + ("trained whole, one for all heads" if trains else "frozen"))
    assert list(lte_layers(model)) == ["0.own", "1.own"]
    assert [m["codes"] for m in model] == before
    x = torch.randn(4, 4)
    train(model[0]["own"], x, square)
    unload(model)
    assert type(model[0]["own"]) is nn.Linear


def test_codes_of_a_model_that_is_frozen_whole_stay_frozen():
    model = nn.Sequential(nn.Linear(4, 4), Codes(4, 4, torch.int8)).requires_grad_(False)
    inject(model, LTEConfig(heads=2, rank=2, exclude=("1",)))
    assert not model[1].weight.requires_grad
    assert model[1].bias.requires_grad  # "skipped" layers are trained
    train(model, torch.randn(4, 4), square)


def test_a_sequence_first_encoder_is_refused_beside_what_is_not_known():
    """A warning of one attention ends no search: what follows it is surely cut along the sequence."""

    class Own(nn.Module):
        def __init__(self, later):
            super().__init__()
            self.cross, self.fc, self.later = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), later

    with (
        warnings.catch_warnings(record=True) as said,
        pytest.raises(
            ValueError, match=r"later\.layers\.0\.linear1 is in a TransformerEncoderLayer with batch_first=False"
        ),
    ):
        inject(Own(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)), TWO)
    assert not [w for w in said if "has a MultiheadAttention" in str(w.message)]
    with pytest.warns(UserWarning, match="batch_first=False") as said:
        inject(Own(Own(nn.Linear(8, 8))), TWO)
    assert sum("has a MultiheadAttention" in str(w.message) for w in said) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            dict(targets=("fc", "vproj")),
            "targets names vproj, but no layer that can have heads is called so in this Mod",
        ),
        (dict(targets=("fc", "wte")), "targets names wte, but no layer that can have heads"),
        (dict(exclude=("lm_head", "wpe", "out")), "exclude names wpe, but nothing is called so in this ModuleDict"),
        (dict(exclude=("out", "lm_head", *"abcdefgh")), "exclude names a, b, c, d, e, f and 2 more, but nothing"),
    ],
)
def test_words_that_nothing_is_called_by_are_named(words, said):
    def model():
        return nn.ModuleDict({"wte": nn.Embedding(4, 4), "fc": nn.Linear(4, 4), "out": nn.Linear(4, 4)})

    with pytest.warns(UserWarning, match=said):
        inject(model(), LTEConfig(heads=2, rank=2, **words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model(), TWO)
        inject(model(), LTEConfig(heads=2, rank=2, targets=("fc",), exclude=("lm_head", "wte", "out.weight")))
