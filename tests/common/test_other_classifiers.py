"""Image classifiers of transformers by folder, and of timm by name: size, normalisation, head, weights, refusals."""

import json
import re

import pytest
import timm
import torch
import transformers as tr
from memtrain_common.data.images.batches import IMAGENET, Normalize
from memtrain_common.errors import UserError
from memtrain_common.models.classifiers import build_classifier, logits_of, usual_size
from safetensors.torch import load_file, save_file
from small_models import published_lite0

VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip
CONFIGS = {
    "dinov2": tr.Dinov2Config(**{**VIT, "patch_size": 8}, mlp_ratio=2),
    "deit": tr.DeiTConfig(**VIT, architectures=["DeiTForImageClassification"]),
    "swin": tr.SwinConfig(image_size=16, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=2),
    "convnext": tr.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16),
    "resnet": tr.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
}
HEADS = {"deit": "classifier", "dinov2": "classifier", "swin": "classifier", "convnext": "classifier"}


@pytest.fixture
def folder(tmp_path):
    def make(kind, **processing):
        model = tr.AutoModelForImageClassification.from_config(CONFIGS[kind])
        model.save_pretrained(tmp_path / kind)
        if processing:
            (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(processing))
        return str(tmp_path / kind), model.eval()

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_folder_gives_its_model(folder, kind):
    name, model = folder(kind)
    classes = model.config.num_labels
    same = build_classifier(name, classes, image_size=16)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(logits_of(same.model.eval(), x), model(x).logits)
    assert same.head_kept
    assert same.head == HEADS.get(kind, "classifier.1")
    assert same.normalize == IMAGENET
    other = build_classifier(name, classes + 4, image_size=16)
    assert not other.head_kept
    assert logits_of(other.model, x).shape == (2, classes + 4)
    own = dict(model.named_parameters())
    for n, p in other.model.named_parameters():
        assert n.startswith(f"{other.head}.") or torch.equal(p, own[n])


def test_size_and_normalisation_are_the_models_own(folder):
    name, _ = folder(
        "dinov2", crop_size={"height": 24, "width": 24}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1]
    )
    assert usual_size(name) == 24
    made = build_classifier(name, 3)
    assert (made.image_size, made.normalize) == (24, Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)))
    plain, _ = folder("deit")
    assert usual_size(plain) == 16
    with pytest.raises(UserError, match="takes no pictures of 24 pixels"):
        build_classifier(plain, 3, image_size=24)


def test_a_backbone_alone_gets_a_head(folder, tmp_path):
    _, model = folder("dinov2")
    model.dinov2.save_pretrained(tmp_path / "backbone")
    made = build_classifier("vit-b-16", 5, weights=str(tmp_path / "backbone"), image_size=16)
    assert not made.head_kept
    for n, p in model.dinov2.named_parameters():
        assert torch.equal(made.model.dinov2.get_parameter(n), p)


def test_folders_that_are_none(folder, tmp_path):
    name, _ = folder("convnext")
    with pytest.raises(UserError, match="brings its weights"):
        build_classifier(name, 5, weights="more.pth")
    with pytest.raises(UserError, match="--patch-size 4 would do nothing"):
        build_classifier(name, 5, patch_size=4)
    tr.BertConfig(hidden_size=8).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="no image classifier of that"):
        build_classifier(str(tmp_path / "bert"), 5)
    tensors = load_file(tmp_path / "convnext" / "model.safetensors")
    gone = next(n for n in tensors if "encoder" in n)
    save_file({n: t for n, t in tensors.items() if n != gone}, tmp_path / "convnext" / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(gone)):
        build_classifier(name, 5)
    (tmp_path / "convnext" / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object"):
        build_classifier(name, 5)


def test_a_vit_s_folder_may_stand_as_the_model(tmp_path):
    model = tr.ViTForImageClassification(tr.ViTConfig(**VIT))
    model.save_pretrained(tmp_path)
    made = build_classifier(str(tmp_path), 3)
    x = torch.randn(1, 3, 16, 16)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in made.model.named_parameters())
    assert logits_of(made.model, x).shape == (1, 3)


@pytest.mark.slow
def test_timm_by_name_with_published_weights(tmp_path):
    source = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    torch.save(published_lite0(source), tmp_path / "lite0.pth")
    made = build_classifier("timm:tf_efficientnet_lite0", 1000, weights=str(tmp_path / "lite0.pth"), image_size=64)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(made.model.eval()(x), source(x))
    assert (made.head, made.head_kept) == ("classifier", True)
    assert made.normalize == Normalize()  # as TensorFlow trained it
    assert usual_size("timm:tf_efficientnet_lite0") == 224
    with pytest.raises(UserError, match="give timm:tf_efficientnet_lite0"):
        build_classifier("timm:efficientnet_lite0", 1000, weights=str(tmp_path / "lite0.pth"))
    tensors = torch.load(tmp_path / "lite0.pth") | {"_blocks.40._bn2.weight": torch.ones(3)}
    torch.save(tensors, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"it has _blocks\.40\._bn2\.weight, which that lacks"):
        build_classifier("timm:tf_efficientnet_lite0", 10, weights=str(tmp_path / "more.pth"))


def test_timm_s_own_files_and_unknown_names(tmp_path):
    source = timm.create_model("test_vit", num_classes=7).eval()
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    made = build_classifier("timm:test_vit", 4, weights=str(tmp_path / "vit.safetensors"), image_size=160)
    own = dict(source.named_parameters())
    for n, p in made.model.named_parameters():
        assert n.startswith("head.") or torch.equal(p, own[n])
    with pytest.raises(UserError, match="has no model resnet10_t: it has resnet10t"):
        build_classifier("timm:resnet10_t", 4)
    tensors = source.state_dict()
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"has no norm\.weight"):
        build_classifier("timm:test_vit", 4, weights=str(tmp_path / "vit.safetensors"))
