"""ViTs from every kind of file give the same answers as the model that the file was made of."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_files import google_file
from memtrain_common.errors import UserError
from memtrain_common.measuring.memory import SavedActivations
from memtrain_common.models.classifiers import logits_of
from memtrain_common.models.vit import SIZES, build_vit, load_vit, patch_for, resize_positions
from memtrain_common.models.vit_model import ViT, ViTConfig
from safetensors.torch import load_file, save_file
from torch import nn


@pytest.fixture
def model(monkeypatch):
    """128 wide with heads of 64, as the published models have them."""
    monkeypatch.setitem(SIZES, "tiny", (128, 2, 2))
    torch.manual_seed(0)
    vit = build_vit("tiny", image_size=8, patch_size=4, classes=5).eval()
    with torch.no_grad():
        for p in vit.parameters():
            p.normal_(0, 0.2)
    return vit


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def logits(model, pixels):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


def timm_file(path, model):
    """The model's tensors as timm's vision transformers name them."""
    pairs = [("vit.embeddings.cls_token", "cls_token"), ("vit.embeddings.position_embeddings", "pos_embed"),
             ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"), ("vit.layernorm.", "norm."),
             ("classifier", "head"), ("vit.layers.", "blocks."), ("layernorm_before", "norm1"),
             ("layernorm_after", "norm2"), ("attention.o_proj", "attn.proj")]  # fmt: skip
    state, out = model.state_dict(), {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{c}_proj")] for c in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor.contiguous()
    save_file(out, path)
    return path


def test_from_a_folder_of_transformers(tmp_path, model, pixels):
    model.save_pretrained(tmp_path / "new")
    found, kept = load_vit(tmp_path / "new", image_size=8, classes=5)
    assert kept
    assert torch.allclose(logits(found, pixels), logits(model, pixels), atol=1e-5)


def test_from_a_folder_with_the_names_before_version_5(tmp_path, model, pixels):
    olds = [("vit.layers.", "vit.encoder.layer."), (".q_proj.", ".attention.query."), (".k_proj.", ".attention.key."),
            (".v_proj.", ".attention.value."), (".o_proj.", ".output.dense."), (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense.")]  # fmt: skip
    out = {}
    for name, tensor in model.state_dict().items():
        for new, old in olds:
            name = name.replace(new, old)
        out[name] = tensor.contiguous()
    assert "vit.encoder.layer.0.attention.attention.query.weight" in out
    save_file(out, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 2}))
    found, _ = load_vit(tmp_path, image_size=8, classes=5)
    assert torch.allclose(logits(found, pixels), logits(model, pixels), atol=1e-5)


@pytest.mark.parametrize(("make", "name"), [(google_file, "ViT.npz"), (timm_file, "vit.safetensors")])
def test_from_google_and_timm(tmp_path, model, pixels, make, name):
    path = make(tmp_path / name, model)
    found, kept = load_vit(path, image_size=8, classes=5)
    assert kept
    assert torch.allclose(logits(found, pixels), logits(model, pixels), atol=1e-4)
    other, kept = load_vit(path, image_size=8, classes=3)  # a head of another size is made anew
    assert not kept
    assert logits(other, pixels).shape == (3, 3)
    theirs = model.state_dict()
    same = [n for n, t in other.state_dict().items() if "classifier" not in n and torch.equal(t, theirs[n])]
    assert len(same) == len(theirs) - 2


class Timm:
    """The part of timm that is used, with the small model's weights in place of published ones."""

    def __init__(self, folder, model):
        self.tensors = load_file(timm_file(folder / "named.safetensors", model))

    def create_model(self, name, pretrained):
        if name != "vit_small":
            raise RuntimeError(f"Unknown model ({name})")
        assert pretrained
        attention = SimpleNamespace(attn=SimpleNamespace(num_heads=2))
        return SimpleNamespace(state_dict=lambda: self.tensors, blocks=[attention])


def test_from_timm_by_name(tmp_path, model, pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", Timm(tmp_path, model))
    found, kept = load_vit(Path("timm:vit_small"), image_size=8, classes=5)
    assert kept
    assert torch.allclose(logits(found, pixels), logits(model, pixels), atol=1e-4)
    with pytest.raises(UserError, match=r"no weights named nothing: Unknown model"):
        load_vit(Path("timm:nothing"), image_size=8, classes=5)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs the package timm"):
        load_vit(Path("timm:vit_small"), image_size=8, classes=5)


def test_a_vit_of_timm_itself(pixels, monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=64, depth=2, num_heads=4, num_classes=5
    )
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: theirs)
    found, kept = load_vit(Path("timm:vit_tiny_patch16_224"), image_size=8, classes=5)
    assert kept
    with torch.no_grad():
        assert torch.allclose(logits(found, pixels), theirs.eval()(pixels), atol=1e-5)


def test_positions_for_another_image_size(tmp_path, model):
    path = google_file(tmp_path / "ViT.npz", model)
    found, _ = load_vit(path, image_size=16, classes=5)
    assert logits(found, torch.zeros(1, 3, 16, 16)).shape == (1, 5)
    flat = torch.ones(1, 5, 3)
    flat[:, 0] = 7  # the class token's stays
    resized = resize_positions(flat, 4)
    assert resized.shape == (1, 17, 3)
    assert resized[0, 0].eq(7).all()
    assert torch.allclose(resized[0, 1:], torch.ones(16, 3))


def test_patches():
    assert [patch_for(n) for n in (8, 28, 32, 64, 128, 224, 2)] == [2, 7, 8, 16, 16, 16, 1]
    with pytest.raises(UserError, match="do not fill"):
        build_vit("mini", image_size=28, patch_size=5, classes=2)


def test_refused_files(tmp_path, model):
    def load(path):
        return load_vit(path, image_size=8, classes=5)

    with pytest.raises(UserError, match="holds no ViT"):
        load(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"PK broken")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "bad.npz")
    (tmp_path / "bad.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "bad.safetensors")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="not a ViT: it has no cls"):
        load(tmp_path / "other.npz")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="'bert' model"):
        load(tmp_path / "bert")
    with pytest.raises(UserError, match="do not fill images of 9"):
        load_vit(google_file(tmp_path / "ViT.npz", model), image_size=9, classes=5)


class BaseVit(nn.Module):
    """LoRA-ViT's ``base_vit``, written from its layers' names and the order of their calls."""

    def __init__(self, dim=128, depth=2, heads=2, classes=5, tokens=5, patch=4):
        super().__init__()
        self.heads = heads
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positional_embedding = nn.ParameterDict({"pos_embedding": torch.zeros(1, tokens, dim)})
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch)
        self.transformer = nn.ModuleDict({"blocks": nn.ModuleList(self.block(dim) for _ in range(depth))})
        self.pre_logits = nn.Linear(dim, dim)  # in the files of 21,843 classes; not used
        self.norm, self.fc = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)

    @staticmethod
    def block(dim):
        attn = nn.ModuleDict({f"proj_{x}": nn.Linear(dim, dim) for x in "qkv"})
        pwff = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        norms = {f"norm{i}": nn.LayerNorm(dim, eps=1e-6) for i in (1, 2)}
        return nn.ModuleDict({"attn": attn, "proj": nn.Linear(dim, dim), "pwff": pwff, **norms})

    def forward(self, x):
        x = self.patch_embedding(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positional_embedding["pos_embedding"]
        for b in self.transformer["blocks"]:
            y = b["norm1"](x)
            q, k, v = (b["attn"][f"proj_{n}"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
            y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + b["proj"](y.transpose(1, 2).flatten(2))
            y = b["norm2"](x)
            x = x + b["pwff"]["fc2"](nn.functional.gelu(b["pwff"]["fc1"](y)))
        return self.fc(self.norm(x)[:, 0])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_base_vits_weights_give_its_answers(tmp_path, pixels, suffix):
    theirs = BaseVit()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.2)
    path = tmp_path / f"B_16{suffix}"
    (torch.save if suffix == ".pth" else save_file)(theirs.state_dict(), path)
    ours, kept = load_vit(path, image_size=8, classes=5)
    assert kept
    torch.testing.assert_close(logits(ours, pixels), theirs(pixels).detach(), rtol=1e-4, atol=1e-4)
    larger, kept = load_vit(path, image_size=16, classes=9)
    assert not kept
    assert logits(larger, torch.randn(2, 3, 16, 16)).shape == (2, 9)


def test_a_pth_that_holds_more_than_tensors_is_refused(tmp_path):
    path = tmp_path / "B_16.pth"
    torch.save({"class_token": torch.zeros(1), "more": SimpleNamespace()}, path)
    with pytest.raises(UserError, match="more than tensors"):
        load_vit(path, image_size=8, classes=5)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"damaged"):
        load_vit(path, image_size=8, classes=5)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_model_is_transformers_vit_to_the_bit(attention, dropout, tmp_path):
    """First weights, answers, gradients and bytes saved for the backward pass, and the folders of either."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=8,
                 patch_size=4, num_labels=5, hidden_dropout_prob=dropout, layer_norm_eps=1e-6)  # fmt: skip
    torch.manual_seed(0)
    ours = ViT(ViTConfig(**sizes))
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, attention_probs_dropout_prob=0.0, attn_implementation=attention)
    theirs = transformers.ViTForImageClassification(config)
    ours.set_attn_implementation(attention)
    state = theirs.state_dict()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert all(torch.equal(t, state[n]) for n, t in ours.state_dict().items())
    x, saved = torch.randn(3, 3, 8, 8), []
    for model in (ours, theirs):
        torch.manual_seed(1)
        with SavedActivations(model) as activations:
            out = logits_of(model.train(), x)
        saved.append(sum(activations.by_layer().values()))
        out.square().sum().backward()
    assert saved[0] == saved[1]
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours", attn_implementation=attention)
    assert torch.equal(read.eval()(x).logits, ours.eval()(x).logits)
    again, kept = load_vit(tmp_path / "theirs", image_size=0, classes=5)
    assert kept
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())


def test_pictures_of_another_size_are_refused():
    model = build_vit("mini", image_size=8, patch_size=4, classes=2)
    with pytest.raises(ValueError, match=r"pictures have 6×8 pixels, and the model takes 8"):
        model(torch.zeros(1, 3, 6, 8))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-3])
def test_a_folders_epsilon_is_the_models(tmp_path, pixels, eps):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4,
        num_labels=5, layer_norm_eps=eps,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.02)  # so small that the norms feel ε
    theirs.save_pretrained(tmp_path / "vit")
    ours, kept = load_vit(tmp_path / "vit", image_size=0, classes=5)
    assert kept
    assert torch.equal(logits(ours, pixels), logits(theirs, pixels))
    path = tmp_path / "vit" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "relu"}))
    with pytest.raises(UserError, match="has the activation 'relu'"):
        load_vit(tmp_path / "vit", image_size=0, classes=5)
