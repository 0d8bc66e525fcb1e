"""MeLo adapters: what is trained, the scale, the file, merging, several tasks."""

import json
import warnings

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from galore_vit.melo import MeLo, adapted, add_melo, add_task, projections  # noqa: E402
from galore_vit.melo_file import _checksum, read_melo, write_melo  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def vit(labels=3, seed=0, blocks=2):
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4,        num_channels=1, num_labels=labels,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture
def images():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(config, labels=3, blocks=2):
    """A model whose adapter and head moved away from their start."""
    model = add_melo(vit(labels, blocks=blocks), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def test_query_value_and_head_are_trained_and_nothing_else(images):
    model = add_melo(vit(), MeLo())
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len([n for n in moved if "lora_" in n]) == 2 * 2 * 2
    assert {n.rsplit(".", 1)[-1] for n in moved if "lora_" not in n} == {"weight", "bias"}
    assert all("lora_" in n or "classifier" in n for n in moved)
    assert torch.equal(model(images).logits, vit()(images).logits)  # B is zero
    assert all(B.count_nonzero() == 0 and A.count_nonzero() == A.numel() for A, B in adapted(model, "default"))


def test_the_scale_is_a_float(images):
    """α = 4, r = 8: the published integer division gives 0, and one step would then move no adapter."""
    assert MeLo(8, 4.0).scale == 0.5
    model = add_melo(vit(), MeLo(8, 4.0))
    model(images).logits.square().sum().backward()
    assert all(B.grad.norm() > 0 for _, B in adapted(model, "default"))
    [(_, query), *_] = projections(model)
    assert query.scaling["default"] == 0.5


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": float("inf")}, {"rank": 0}, {"rank": 1.5}])
def test_refused_settings(bad):
    with pytest.raises(ValueError, match=r"alpha|rank"):
        MeLo(**bad)


def test_refused_layers():
    with pytest.raises(ValueError, match="no block 7"):
        add_melo(vit(), MeLo(layers=(0, 7)))
    with pytest.raises(ValueError, match="query and value"):
        add_melo(torch.nn.Linear(3, 3), MeLo())


def tuned_by_peft(**words):
    """The same, of a configuration of PEFT's own over the names of `vit`."""
    peft = pytest.importorskip("peft")
    names = [name for name, _ in projections(vit())]
    words = {"target_modules": names, "modules_to_save": ["classifier"], **words}
    model = peft.get_peft_model(vit(), peft.LoraConfig(r=4, lora_alpha=8, **words))
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model.eval(), names


@pytest.mark.parametrize(
    "words",
    [{}, {"use_rslora": True}, {"alpha_pattern": {".*": 64}}, {"rank_pattern": {".*": 2}}, {"scale_by": 3.0}],
)
def test_a_file_states_the_scale_that_the_layers_have(tmp_path, images, words):
    """Of PEFT's own configurations too; its `lora_alpha` and `r` may say another."""
    factor = words.pop("scale_by", 1.0)
    model, _ = tuned_by_peft(**words)
    for _, layer in projections(model):
        layer.scaling["default"] *= factor
    write_melo(model, tmp_path / "a.st")
    back = read_melo(vit(), tmp_path / "a.st").eval()
    assert torch.allclose(back(images).logits, model(images).logits, atol=1e-6)
    assert not torch.allclose(back(images).logits, vit()(images).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (lambda first, key: {"alpha_pattern": {first: 64}}, r"differ in their scale \(2.0, 16.0\)"),
        (lambda first, key: {"rank_pattern": {first: 2}}, r"differ in their rank \(2, 4\)"),
        (lambda first, key: {"use_dora": True}, "uses DoRA or another variant"),
        (lambda first, key: {"lora_bias": True}, r"has .*lora_B\.default\.bias, and a MeLo file holds"),
        (lambda first, key: {"bias": "lora_only"}, "trains biases"),
        (lambda first, key: {"target_modules": [first, key]}, r"has .*(key|k_proj)\.lora_A"),
        (lambda first, key: {"modules_to_save": ["classifier", "layernorm"]}, r"has .*layernorm.*modules_to_save"),
    ],
)
def test_what_no_file_can_state_is_refused_at_writing(tmp_path, words, said):
    first = projections(vit())[0][0]
    key = first.replace("q_proj", "k_proj").replace("query", "key")
    model, _ = tuned_by_peft(**words(first, key))
    with pytest.raises(ValueError, match=said):
        write_melo(model, tmp_path / "a.st")
    assert not (tmp_path / "a.st").exists()


@pytest.mark.parametrize("layers", [None, (1,)])
def test_a_file_brings_back_adapter_and_whole_head(tmp_path, images, layers):
    model = trained(MeLo(3, 5.0, layers))
    path = tmp_path / "task.safetensors"
    write_melo(model, path)
    again = read_melo(vit(), path).eval()
    assert torch.equal(again(images).logits, model(images).logits)
    assert not torch.equal(model(images).logits, vit()(images).logits)
    keys = load_file(path)
    count = 4 if layers is None else 2
    assert set(keys) == {f"w_{x}_{i:03d}" for x in "ab" for i in range(count)} | {
        "fc_16in_3out",
        "fc_16in_3out_bias",
    }
    assert keys["w_a_000"].shape == (3, 16)
    assert keys["w_b_000"].shape == (16, 3)


@pytest.mark.parametrize("layers", [None, (3, 11), tuple(range(10))])
def test_a_file_of_many_blocks(tmp_path, images, layers):
    """From twenty adapted layers on PEFT's configuration names their suffixes alone, in which no block is left."""
    model = trained(MeLo(2, 4.0, layers), blocks=12)
    path = tmp_path / "t.safetensors"
    write_melo(model, path)
    assert torch.equal(read_melo(vit(blocks=12), path).eval()(images).logits, model(images).logits)
    written = json.loads(safe_open(path, "pt").metadata()["melo"])["layers"]
    assert written == list(layers or range(12))
    if layers is None:  # a file as earlier versions wrote it
        settings = json.dumps({"rank": 2, "alpha": 4.0, "layers": []})
        save_file(load_file(path), path, metadata={"melo": settings, "sha256": _checksum(load_file(path), settings)})
        assert torch.equal(read_melo(vit(blocks=12), path).eval()(images).logits, model(images).logits)


def test_a_file_read_into_a_model_of_other_classes_and_precision(tmp_path, images):
    write_melo(trained(MeLo(2), labels=5), tmp_path / "t.safetensors")
    model = read_melo(vit(labels=2).bfloat16(), tmp_path / "t.safetensors")
    assert model(images.bfloat16()).logits.shape == (4, 5)
    model = read_melo(vit(labels=2), tmp_path / "t.safetensors")
    assert model(pixel_values=images, labels=torch.tensor([0, 4, 2, 1])).loss.isfinite()


def test_a_head_without_bias(tmp_path, images):
    def build():
        model = vit()
        model.classifier = torch.nn.Linear(16, 3, bias=False)
        return model

    model = add_melo(build(), MeLo(2)).eval()
    write_melo(model, tmp_path / "t.safetensors")
    assert torch.equal(read_melo(build(), tmp_path / "t.safetensors").eval()(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="holds a head with no bias, and the model's has one"):
        read_melo(vit(), tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: add_melo(vit(), MeLo(2), "v1.0"), "a word without dots, not 'v1.0'"),
        (lambda: add_melo(trained(MeLo(2)), MeLo(2)), "has adapters already"),
        (lambda: add_task(vit(), MeLo(2), "b", 3), "has no MeLo yet"),
        (lambda: add_task(trained(MeLo(2)), MeLo(2), "b", 0), "classes must be a whole number of at least 1"),
        (lambda: read_melo(vit(), "."), "is a folder"),
        (lambda: add_melo(Unnumbered(), MeLo(2)), "query lies in no numbered block"),
    ],
)
def test_refused_in_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call()


class Unnumbered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value, self.classifier = (torch.nn.Linear(4, 4) for _ in range(3))


def test_order_is_query_then_value_block_by_block(tmp_path):
    model = trained(MeLo(2))
    write_melo(model, tmp_path / "t.safetensors")
    keys = load_file(tmp_path / "t.safetensors")
    names = [n for n, m in projections(model)]
    assert [n.split(".")[-1][0] for n in names] == ["q", "v", "q", "v"]
    for i, (_, module) in enumerate(projections(model)):
        assert torch.equal(keys[f"w_a_{i:03d}"], module.lora_A["default"].weight)


def test_a_published_file_needs_alpha_and_says_that_the_bias_is_missing(tmp_path, images):
    model = trained(MeLo(2, 6.0))
    path = tmp_path / "t.safetensors"
    write_melo(model, path)
    published = {k: v for k, v in load_file(path).items() if not k.endswith("_bias")}
    save_file(published, str(path), metadata={"author": "somebody"})  # what others add says nothing of our checksum
    with pytest.raises(ValueError, match="give alpha"):
        read_melo(vit(), path)
    with pytest.warns(UserWarning, match="no head bias"):
        again = read_melo(vit(), path, alpha=6.0).eval()
    bias = model.get_base_model().classifier.modules_to_save["default"].bias
    assert torch.allclose(again(images).logits + bias, model(images).logits, atol=1e-6)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"x": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match="no MeLo file"):
        read_melo(vit(), path, alpha=1.0)
    write_melo(trained(MeLo(2)), path)
    with pytest.raises(ValueError, match="own alpha"):
        read_melo(vit(), path, alpha=1.0)
    gap = {k: v for k, v in load_file(path).items() if k != "w_b_002"}
    save_file(gap, str(path))
    with pytest.raises(ValueError, match="w_b_002"):
        read_melo(vit(), path, alpha=1.0)


def test_merging_changes_no_output(images):
    model = trained(MeLo(2, 6.0))
    before = model(images).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(images).logits, before, atol=1e-6)
    assert not any("lora" in n for n, _ in merged.named_parameters())


def test_tasks_switch_over_one_backbone(tmp_path, images):
    first, second = trained(MeLo(2)), trained(MeLo(4, 8.0), labels=5)
    write_melo(first, tmp_path / "a.safetensors")
    write_melo(second, tmp_path / "b.safetensors")
    both = read_melo(vit(), tmp_path / "a.safetensors", "a")
    both = read_melo(both, tmp_path / "b.safetensors", "b").eval()
    for _ in range(2):
        both.set_adapter("a")
        assert torch.equal(both(images).logits, first(images).logits)
        both.set_adapter("b")
        assert torch.equal(both(images).logits, second(images).logits)
    with pytest.raises(ValueError, match="already"):
        read_melo(both, tmp_path / "a.safetensors", "a")


def test_a_new_task_begins_untrained(images):
    model = trained(MeLo(2))
    add_task(model, MeLo(2), "next", classes=7)
    model.set_adapter("next")
    assert model(images).logits.shape == (4, 7)
    assert all(B.count_nonzero() == 0 for _, B in adapted(model, "next"))
    with pytest.raises(ValueError, match="no adapter for task 'other'"):
        adapted(model, "other")


class Reading(torch.nn.Module):
    """A block that reads its projections' weights, as timm's BEiT does with qkv; or calls them."""

    def __init__(self, calls):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in ("query", "value")})])
        self.classifier, self.calls = torch.nn.Linear(4, 2), calls

    def forward(self, x):
        for layer in self.layers:
            for part in layer.values():
                x = part(x) if self.calls else torch.nn.functional.linear(x, part.weight, part.bias)
        return self.classifier(x)


def test_projections_that_are_never_called_are_named_once():
    x = torch.randn(3, 4)
    model = add_melo(Reading(calls=False), MeLo(2))
    with pytest.warns(UserWarning, match=r"did not call .*layers\.0\.query.*layers\.0\.value.*train nothing"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(x)
        called = add_melo(Reading(calls=True), MeLo(2))
        called.eval()(x)
        called.train()(x)
        called(x)
    assert not any(m._forward_hooks for m in called.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.spectral_norm]
)
def test_a_projection_whose_weight_is_computed_is_refused_by_name(norm):
    model = Reading(calls=True)
    norm(model.layers[0]["value"])
    with pytest.raises(ValueError, match=r"layers\.0\.value has no weight of its own"):
        add_melo(model, MeLo(2))


def test_other_projections_and_heads_are_refused():
    model = Reading(calls=True)
    model.layers[0]["query"] = torch.nn.Bilinear(4, 4, 4)
    with pytest.raises(ValueError, match=r"layers\.0\.query is a Bilinear"):
        add_melo(model, MeLo(2))
    model = Reading(calls=True)
    del model.classifier
    with pytest.raises(ValueError, match="head named classifier, which Reading has not"):
        add_melo(model, MeLo(2))


def test_a_configuration_of_transformers_stays_the_models_own(tmp_path):
    write_melo(trained(MeLo(2)), tmp_path / "three.safetensors")
    model = vit(labels=2)
    config = model.config
    config.other = 3
    read = read_melo(model, tmp_path / "three.safetensors")
    assert read.get_base_model().config is config
    assert read.get_base_model().vit.config is config
    assert (config.num_labels, config.other) == (3, 3)


def test_a_vit_of_ours_takes_a_file_of_other_classes(tmp_path):
    from memtrain_common.models.classifiers import logits_of
    from memtrain_common.models.vit import build_vit

    given = add_melo(build_vit("mini", image_size=8, patch_size=4, classes=3), MeLo())
    write_melo(given, tmp_path / "three.safetensors")
    model = read_melo(build_vit("mini", image_size=8, patch_size=4, classes=2), tmp_path / "three.safetensors")
    assert model.get_base_model().config.num_labels == 3
    assert logits_of(model, torch.zeros(1, 3, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize("further", [False, True])
def test_a_file_for_another_model_changes_nothing(tmp_path, images, further):
    """After the refusal the right file can be read."""
    write_melo(trained(MeLo(2)), tmp_path / "right.safetensors")
    write_melo(trained(MeLo(2), blocks=3), tmp_path / "blocks.safetensors")
    tensors = load_file(tmp_path / "right.safetensors")
    wide = {k: (v.repeat(1, 2) if k.startswith("w_a_") else v).contiguous() for k, v in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    tensors["w_b_001"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    model = read_melo(vit(), tmp_path / "right.safetensors", "first") if further else vit()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for name, said, words in (
        ("blocks", "holds 6 adapters, and the model has 4|no block 2", {}),
        ("wide", r"holds a tensor of \(2, 32\) where the model has \(2, 16\)", {"alpha": 4.0}),
        ("nan", "holds numbers that are NaN", {"alpha": 4.0}),
    ):
        with pytest.raises(ValueError, match=said):
            read_melo(model, tmp_path / f"{name}.safetensors", "second", **words)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    model = read_melo(model, tmp_path / "right.safetensors", "second").eval()
    model.set_adapter("second")
    assert torch.equal(model(images).logits, trained(MeLo(2))(images).logits)


def test_a_model_whose_adapters_lost_their_wrapper_is_told_so():
    inner = add_melo(vit(), MeLo()).get_base_model()
    with pytest.raises(ValueError, match="has an adapter already, though the model is no PeftModel"):
        add_melo(inner, MeLo())


def test_the_head_of_a_task_that_is_not_active_is_not_trained():
    model = trained(MeLo(2))
    add_task(model, MeLo(2), "next", classes=7)
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("next" in n for n in moved)
    model.set_adapter("next")
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("next" in n for n in moved)
    assert any("classifier" in n for n in moved)
