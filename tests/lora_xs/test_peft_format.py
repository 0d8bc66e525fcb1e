"""Exported adapters run in PEFT and in transformers; PEFT's and the official code's files run here."""

import copy
import json
from collections import OrderedDict

import pytest
import torch
from lora_xs import (
    CAUSAL_LM_TARGETS,
    ROBERTA_TARGETS,
    LoRAXSConfig,
    LoRAXSError,
    describe_adapter,
    export_peft,
    import_peft,
    inject,
    save_adapter,
    trained,
)
from lora_xs.layer import layers
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def run(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def exported(roberta, train_r, tmp_path):
    """A base model, ids, an adapted copy (unequal ranks and scales, a moved head), and its PEFT folder."""
    base = roberta()
    ids = torch.randint(3, 60, (3, 9))
    model = copy.deepcopy(base)
    config = LoRAXSConfig(
        4,
        16,
        ROBERTA_TARGETS,
        rank_pattern={"query": 3, "0.output.dense": 5},
        alpha_pattern={"1.attention.self.value": 2},
    )
    train_r(inject(model, config), scale=0.5)
    for p in trained(model)["head"]:
        p.data.add_(0.1)
    return base, ids, model, export_peft(model, tmp_path / "peft")


def test_peft_gives_the_same_logits(exported):
    base, ids, model, folder = exported
    want = run(model, ids)
    assert (want - run(base, ids)).abs().max() > 0.1
    close(run(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval(), ids), want)


def test_transformers_load_adapter_gives_the_same_logits(llama, train_r, tmp_path):
    base = llama()
    ids = torch.randint(0, 61, (3, 9))
    model = train_r(inject(copy.deepcopy(base), LoRAXSConfig(4, 8, CAUSAL_LM_TARGETS)), scale=0.5)
    want = run(model, ids)
    assert (want - run(base, ids)).abs().max() > 0.1
    base.load_adapter(str(export_peft(model, tmp_path)))
    close(run(base, ids), want)


def test_peft_with_conv1d_and_embedding(train_r, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    base = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (2, 8))
    targets = ("c_attn", "c_proj", "wte")
    model = train_r(inject(copy.deepcopy(base), LoRAXSConfig(4, targets=targets)), scale=0.5)
    want = run(model, ids)
    assert (want - run(base, ids)).abs().max() > 0.1
    folder = export_peft(model, tmp_path)
    close(run(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval(), ids), want)
    close(run(import_peft(base, folder), ids), want)


def test_peft_with_conv2d(mixed, inputs, train_r, tmp_path):
    base = copy.deepcopy(mixed)
    base.conv.padding_mode = mixed.conv.padding_mode = "zeros"
    base.config = mixed.config = {"model_type": "custom"}
    model = train_r(inject(mixed, LoRAXSConfig(3, targets=("conv", "down"))), scale=0.5)
    folder = export_peft(model, tmp_path)
    close(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(*inputs), model(*inputs))
    close(import_peft(base, folder)(*inputs), model(*inputs))


def picture_model(**options):
    """One convolution and a head, in eval mode; PEFT asks every model for a config."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, **{"kernel_size": 3, **options})
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)).eval()
    model.config = {"model_type": "custom"}
    return model


PEFT_CONVOLVES_OTHERWISE = [
    ({"padding": 1, "padding_mode": "reflect"}, "0 is a Conv2d with padding_mode='reflect', and PEFT's LoRA pads"),
    ({"padding": "same", "padding_mode": "circular"}, "0 is a Conv2d with padding_mode='circular', and PEFT's LoRA"),
    ({"padding": "same", "dilation": 2}, r"0 is a Conv2d with dilation=\(2, 2\), and PEFT's LoRA convolves without it"),
    ({"padding": (2, 1), "dilation": (2, 1)}, r"0 is a Conv2d with dilation=\(2, 1\)"),
]


@pytest.mark.parametrize(("options", "message"), PEFT_CONVOLVES_OTHERWISE)
def test_convolutions_that_peft_computes_otherwise_are_refused(tmp_path, options, message):
    model = inject(picture_model(**options), LoRAXSConfig(2, targets=("0",), head=("3",)))
    with pytest.raises(LoRAXSError, match=f"{message}.*: merge the adapter instead"):
        export_peft(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    peft.get_peft_model(picture_model(**options), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(LoRAXSError, match=f"theirs cannot be imported: {message}"):
        import_peft(picture_model(**options), tmp_path / "theirs", bases="file")


@pytest.mark.parametrize(
    "options",
    [
        {"padding_mode": "reflect"},  # without padding there is nothing to reflect
        {"kernel_size": (3, 1), "dilation": (1, 2), "padding": (1, 0)},
        {"stride": 2, "padding": (1, 2)},
        {"padding": "same"},
    ],
)
def test_convolutions_that_peft_computes_alike(train_r, tmp_path, options):
    model = train_r(inject(picture_model(**options), LoRAXSConfig(2, targets=("0",), head=("3",))))
    folder, x = export_peft(model, tmp_path), torch.randn(2, 3, 8, 8)
    close(peft.PeftModel.from_pretrained(picture_model(**options), folder).eval()(x), model(x))
    close(import_peft(picture_model(**options), folder)(x), model(x))


def test_a_lora_of_a_grouped_convolution_is_refused(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs = peft.get_peft_model(picture_model(groups=3), config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(LoRAXSError, match="0 is a Conv2d with 3 groups"):
        import_peft(picture_model(groups=3), tmp_path, bases="file")


def model_with_two_places(shared_head=False):
    torch.manual_seed(0)
    layer, head = nn.Linear(8, 8), nn.Linear(8, 8)
    parts = [layer, nn.ReLU(), head if shared_head else layer, nn.ReLU(), head]
    model = nn.Sequential(*parts).eval()
    model.config = {"model_type": "custom"}
    return model


@pytest.mark.parametrize("shared_head", [False, True])
def test_a_module_at_two_places_is_refused(train_r, tmp_path, shared_head):
    """PEFT puts its layer, or its copy of the head, at the first of them."""
    head, what = ("2", r"2 stands at several places of the model \(2, 4\)") if shared_head else ("4", r"0 .*\(0, 2\)")
    model = train_r(inject(model_with_two_places(shared_head), LoRAXSConfig(2, targets=("0",), head=(head,))))
    with pytest.raises(LoRAXSError, match=f"{what}, and PEFT adapts the first of them alone: merge the adapter"):
        export_peft(model, tmp_path / "ours")
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=[head], init_lora_weights=False)
    peft.get_peft_model(model_with_two_places(shared_head), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(LoRAXSError, match=f"theirs cannot be imported: {what}"):
        import_peft(model_with_two_places(shared_head), tmp_path / "theirs", bases="file")


def test_a_block_at_two_places_is_the_same_in_peft(train_r, tmp_path):
    """Its parts stand at one place each: within it."""

    def make():
        torch.manual_seed(0)
        block = nn.Sequential(OrderedDict(query=nn.Linear(8, 8), act=nn.Tanh()))
        model = nn.Sequential(block, block, nn.Linear(8, 3)).eval()
        model.config = {"model_type": "custom"}
        return model

    model, x = train_r(inject(make(), LoRAXSConfig(2, targets=("query",), head=("2",)))), torch.randn(4, 8)
    folder = export_peft(model, tmp_path)
    close(peft.PeftModel.from_pretrained(make(), folder).eval()(x), model(x))
    close(import_peft(make(), folder)(x), model(x))


def test_import_gives_back_r_itself(exported, tmp_path):
    base, ids, model, folder = exported
    again = import_peft(copy.deepcopy(base), folder)
    close(run(again, ids), run(model, ids))
    for (_, a), (_, b) in zip(layers(model), layers(again), strict=True):
        torch.testing.assert_close(a.R["default"], b.R["default"], rtol=1e-4, atol=1e-4)
        assert a.scale("default") == b.scale("default")
    assert sum(p.numel() for p in trained(again)["head"]) == sum(p.numel() for p in trained(model)["head"])
    save_adapter(again, tmp_path / "xs")
    assert not describe_adapter(tmp_path / "xs").stored_bases


@pytest.mark.parametrize("rslora", [False, True])
def test_any_lora_of_peft_is_imported_exactly_with_its_own_bases(llama, tmp_path, rslora):
    base = llama()
    ids = torch.randint(0, 61, (3, 9))
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], rank_pattern={r"0\.self_attn\.q_proj": 2},
        alpha_pattern={"down_proj": 5}, use_rslora=rslora, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    want = run(theirs, ids)
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(LoRAXSError, match=r"lies outside the SVD bases .*bases=\"file\""):
        import_peft(copy.deepcopy(base), tmp_path / "peft")
    ours = import_peft(copy.deepcopy(base), tmp_path / "peft", bases="file")
    close(run(ours, ids), want)
    for _, layer in layers(ours):
        torch.testing.assert_close(layer.B.t() @ layer.B, torch.eye(layer.rank), rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "xs")
    assert describe_adapter(tmp_path / "xs").stored_bases


@pytest.mark.parametrize("form", ["{}_lora_latent_mapping.weight", "{}.default_lora_latent_mapping.weight"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_checkpoints_of_the_official_code(roberta, tmp_path, form, suffix):
    """Its layout: PEFT 0.10 names, A from TruncatedSVD of Wᵀ, and R under a name that PEFT does not know."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    base = roberta()
    ids = torch.randint(3, 60, (3, 9))
    want = copy.deepcopy(base)
    tensors = {}
    for name, module in base.named_modules():
        if name.endswith((".query", ".value")):
            W = module.weight.detach()  # out×in
            svd = decomposition.TruncatedSVD(4, n_iter=10, random_state=42)
            US = torch.from_numpy(svd.fit_transform(W.t().numpy()))  # in×r: of Wᵀ
            A, B = US.t().contiguous(), torch.from_numpy(svd.components_.copy()).t().contiguous()
            R = torch.randn(4, 4) * 0.5
            key = f"base_model.model.{name}"
            tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, form.format(key): R}
            with torch.no_grad():
                want.get_submodule(name).weight.add_(16 / 4 * B @ R @ A)
    for name, p in want.classifier.named_parameters():
        tensors[f"base_model.model.classifier.{name}"] = p.data.add_(0.1).clone()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    file = tmp_path / f"adapter_model.{suffix}"
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    close(run(import_peft(copy.deepcopy(base), tmp_path, bases="file"), ids), run(want, ids))
    if form.startswith("{}_"):  # exact bases of so small a weight are the same subspace
        again = import_peft(base, tmp_path)
        close(run(again, ids), run(want, ids))
        assert all(layer.regenerable for _, layer in layers(again))


def test_pickled_code_is_not_run(roberta, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    torch.save({"x": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises(LoRAXSError, match="cannot be read safely"):
        import_peft(roberta(), tmp_path)


def break_settings(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_imported_is_refused(exported, llama):
    base, _, model, folder = exported
    with pytest.raises(LoRAXSError, match="another model: this one has no module roberta"):
        import_peft(llama(), folder)
    with pytest.raises(LoRAXSError, match="needs a plain base model"):
        import_peft(model, folder)
    with pytest.raises(LoRAXSError, match='bases must be "svd", "official", "file" or "auto"'):
        import_peft(base, folder, bases="qr")
    for changes, message in (
        ({"use_dora": True}, "uses use_dora"),
        ({"alora_invocation_tokens": [3, 4]}, "uses alora_invocation_tokens, which is more than B·A"),
        ({"use_qalora": True}, "uses use_qalora"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4', which changes the base weights too: save it with"),
        ({"init_lora_weights": "olora"}, "olora', which changes the base weights"),
        ({"a_setting_of_tomorrow": 3}, "uses a_setting_of_tomorrow"),
        ({"bias": "all"}, "trains biases"),
        ({"peft_type": "VERA"}, "holds a VERA adapter"),
    ):
        before = (folder / "adapter_config.json").read_text()
        break_settings(folder, **changes)
        with pytest.raises(LoRAXSError, match=message):
            import_peft(base, folder)
        (folder / "adapter_config.json").write_text(before)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(LoRAXSError, match="truncated"):
        import_peft(base, folder)
    file.write_bytes(whole)
    tensors = load_file(file)
    missing = next(k for k in tensors if k.endswith("lora_B.weight"))
    save_file({k: v for k, v in tensors.items() if k != missing}, file)
    with pytest.raises(LoRAXSError, match="has no lora_B for roberta"):
        import_peft(base, folder)
    save_file({**tensors, "base_model.model.x.lora_magnitude_vector": torch.ones(2)}, file)
    with pytest.raises(LoRAXSError, match="lora_magnitude_vector, which is neither"):
        import_peft(base, folder)
    file.unlink()
    with pytest.raises(LoRAXSError, match="has neither"):
        import_peft(base, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoRAXSError, match="is not JSON"):
        import_peft(base, folder)
    assert not any("lora_xs" in n for n, _ in base.named_parameters())


def test_a_head_inside_the_encoder_is_that_module_alone(roberta, tmp_path):
    base = roberta()
    config = LoRAXSConfig(2, targets=("query",), head=("encoder.layer.1.output.dense", "classifier"))
    folder = export_peft(inject(copy.deepcopy(base), config), tmp_path)
    again = import_peft(copy.deepcopy(base), folder)
    trained_names = {n for n, p in again.named_parameters() if p.requires_grad and ".R." not in n}
    want = {
        n for n, _ in base.named_parameters() if n.startswith(("classifier.", "roberta.encoder.layer.1.output.dense."))
    }
    assert trained_names == want
