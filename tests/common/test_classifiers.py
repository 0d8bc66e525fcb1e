"""Classifiers by name: shapes, weights, normalisation, refusals; ResNet-20 with its real weights on real pictures."""

import numpy as np
import pytest
import torch
from image_files import google_file
from memtrain_common.data.images.batches import IMAGENET, Normalize, evaluation_batches
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError
from memtrain_common.models.classifiers import (
    CNNS,
    MODELS,
    build_classifier,
    classification_loss,
    logits_of,
    usual_size,
)
from memtrain_common.models.vit import build_vit


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-mini", "resnet18", "mobilenet_v2", "resnet20"])
def test_logits_and_loss(name):
    found = build_classifier(name, 5, image_size=32)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    logits = logits_of(found.model, x)
    assert logits.shape == (2, 5)
    expected = torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1)
    found.model.eval()
    assert classification_loss(found.model.train(), (x, y), label_smoothing=0.1).shape == expected.shape
    assert found.model.get_submodule(found.head).weight.shape[0] == 5
    assert found.normalize == (Normalize() if name.startswith("vit") else IMAGENET)


def test_the_loss_is_the_mean_of_the_labels_likelihoods():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x, y = torch.randn(4, 3, 2, 2), torch.tensor([0, 2, 1, 1])
    by_hand = -model(x).log_softmax(-1)[torch.arange(4), y].mean()
    assert torch.allclose(classification_loss(model, (x, y)), by_hand)
    several = torch.tensor([[1.0, 0, 1]] * 4)
    p = model(x).sigmoid()
    by_hand = -(several * p.log() + (1 - several) * (1 - p).log()).mean()
    assert torch.allclose(classification_loss(model, (x, several)), by_hand)


def test_sizes():
    assert usual_size("resnet50") == usual_size("vit-b-16") == 224
    assert usual_size("resnet20") == 32
    assert usual_size("vit-mini") == 0
    assert usual_size("vit-mini", "ViT-B_16.npz") == 224
    assert len(MODELS) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet20"])
@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped"])
def test_weights_of_a_cnn(tmp_path, name, form):
    from safetensors.torch import save_file

    source = build_classifier(name, 5).model.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(source, path)
    elif form == "pth":
        torch.save(source, path)
    else:
        torch.save({"state_dict": {f"module.{n}": t for n, t in source.items()}, "epoch": 3}, path)
    same = build_classifier(name, 5, weights=str(path))
    assert same.head_kept
    assert all(torch.equal(t, source[n]) for n, t in same.model.state_dict().items())
    other = build_classifier(name, 4, weights=str(path))
    assert not other.head_kept
    for n, t in other.model.state_dict().items():
        assert n.startswith(CNNS[name]) or torch.equal(t, source[n])


class Runs:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return (print, ("a pickle was run",))


def test_refused_weights(tmp_path, capsys):
    state = build_classifier("resnet20", 5).model.state_dict()
    with pytest.raises(UserError, match="is not there"):
        build_classifier("resnet20", 5, weights=str(tmp_path / "none.pth"))
    torch.save({**state, "layer2.0.conv1.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    with pytest.raises(UserError, match=r"layer2\.0\.conv1\.weight is \(3,\), not \(32, 16, 3, 3\)"):
        build_classifier("resnet20", 5, weights=str(tmp_path / "shape.pth"))
    torch.save({n: t for n, t in state.items() if n != "bn1.weight"}, tmp_path / "lacks.pth")
    with pytest.raises(UserError, match=r"it has no bn1\.weight"):
        build_classifier("resnet20", 5, weights=str(tmp_path / "lacks.pth"))
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match="it has more, which that lacks"):
        build_classifier("resnet20", 5, weights=str(tmp_path / "more.pth"))
    torch.save({"state_dict": Runs()}, tmp_path / "runs.pth")
    with pytest.raises(UserError, match="holds more than tensors"):
        build_classifier("resnet20", 5, weights=str(tmp_path / "runs.pth"))
    assert "a pickle was run" not in capsys.readouterr().out
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        build_classifier("resnet20", 5, weights=str(tmp_path / "tensor.pth"))
    with pytest.raises(UserError, match="there are none of resnet20"):
        build_classifier("resnet20", 5, weights="imagenet")
    with pytest.raises(UserError, match="no known model"):
        build_classifier("resnet19", 5)


def test_googles_file(tmp_path):
    source = build_vit("mini", image_size=32, patch_size=8, classes=5)
    google_file(tmp_path / "a.npz", source)
    found = build_classifier("vit-s-16", 5, weights=str(tmp_path / "a.npz"), image_size=32)
    assert found.head_kept
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(logits_of(found.model.eval(), x), source.eval()(x).logits, atol=1e-6)
    wrong = {"Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel": np.zeros((96, 7), np.float32)}
    google_file(tmp_path / "b.npz", source, **wrong)
    with pytest.raises(UserError, match=r"vit\.layers\.1\.mlp\.fc1\.weight is \(7, 96\), not \(384, 96\)"):
        build_classifier("vit-s-16", 5, weights=str(tmp_path / "b.npz"), image_size=32)


@pytest.mark.slow
def test_resnet20_with_its_published_weights_knows_real_pictures(real_data):
    """81.0 % of the test pictures as JPEG files, by the data's own description; here of every 20th."""
    weights = next((real_data / "weights" / "resnet_cifar10").glob("*.th"))
    found = build_classifier("resnet20", 10, weights=str(weights))
    assert found.head_kept
    test = load_images("folder", str(next((real_data / "cifar10").glob("*.zip"))), bad="unchecked").splits["test"]
    part = test.take(np.arange(0, 10000, 20))
    right = 0
    with torch.no_grad():
        for x, y in evaluation_batches(part, 32, recipe="none", normalize=found.normalize, batch=250):
            right += int((logits_of(found.model.eval(), x).argmax(-1) == y).sum())
    assert 0.77 < right / 500 < 0.85


def test_a_vit_whose_size_is_not_asked_for_has_that_of_its_weights(tmp_path):
    build_classifier("vit-mini", 3, image_size=12).model.save_pretrained(tmp_path)
    found = build_classifier("vit-mini", 3, weights=str(tmp_path))
    assert found.image_size == 12
    assert found.head_kept
    assert logits_of(found.model, torch.zeros(2, 3, 12, 12)).shape == (2, 3)
