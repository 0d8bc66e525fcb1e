"""Reading MedMNIST files: the real one where it is, and every refusal."""

import os
from pathlib import Path

import numpy as np
import pytest
from image_files import random_file
from memtrain_common.data.images.medmnist import check_labels, file_name, read_medmnist
from memtrain_common.data.images.medmnist_names import NAMES, class_names
from memtrain_common.data.images.medmnist_sets import SETS, SIZES
from memtrain_common.errors import UserError


def test_the_table_is_the_published_one():
    info = pytest.importorskip("medmnist", reason="medmnist is not installed").INFO
    assert len(SETS) == 12
    for flag, known in SETS.items():
        published = info[flag]
        assert known.md5 == tuple(published["MD5" if s == 28 else f"MD5_{s}"] for s in SIZES)
        assert (known.task, known.classes) == (published["task"], len(published["label"]))
        assert known.channels == published["n_channels"]
        assert known.samples == tuple(published["n_samples"][s] for s in ("train", "val", "test"))


def test_breastmnist_itself():
    if "MEMTRAIN_DATA" not in os.environ:
        pytest.skip("MEMTRAIN_DATA names no folder of data sets")
    folder = Path(os.environ["MEMTRAIN_DATA"]) / "medmnist"
    if not (folder / "breastmnist.npz").is_file():
        pytest.skip("the folder of data sets has no medmnist/breastmnist.npz")
    splits = read_medmnist("breastmnist", folder).splits
    assert tuple(map(len, splits.values())) == SETS["breastmnist"].samples
    assert splits["test"].images.array.shape == (156, 28, 28)
    assert splits["test"].labels.mean() == pytest.approx(0.731, abs=1e-3)  # the majority's share


@pytest.mark.parametrize("flag", ["breastmnist", "bloodmnist", "chestmnist"])
def test_ones_own_file_of_the_same_form(tmp_path, flag):
    labels = random_file(tmp_path, flag, 20)
    found = read_medmnist(flag, tmp_path, verify=False).splits["test"]
    assert np.array_equal(found.labels.reshape(20, -1), labels)
    assert found.images.array.shape == ((20, 28, 28, 3) if SETS[flag].channels == 3 else (20, 28, 28))


def test_a_wrong_md5_is_refused(tmp_path):
    random_file(tmp_path, "breastmnist", 20)
    with pytest.raises(UserError, match="published file has 750601b1f35ba3300ea97c75c52ff8f6"):
        read_medmnist("breastmnist", tmp_path)


def rewritten(folder, **changes):
    random_file(folder, "breastmnist", 20)
    arrays = dict(np.load(folder / "breastmnist.npz"))
    arrays.update({k: v for k, v in changes.items() if v is not None})
    for k in [k for k, v in changes.items() if v is None]:
        del arrays[k]
    np.savez(folder / "breastmnist.npz", **arrays)


@pytest.mark.parametrize(("changes", "match"), [
    ({"val_labels": None}, "no val_labels"),
    ({"val_labels": np.zeros((19, 1), np.uint8)}, "19 val labels for 20"),
    ({"val_labels": np.full((20, 1), 2, np.uint8)}, "must lie in 0..1"),
    ({"val_labels": np.zeros((20, 14), np.uint8)}, "14 columns"),
    ({"val_labels": np.zeros((20, 1))}, "whole numbers"),
    ({"val_images": np.zeros((20, 64, 64), np.uint8)}, r"\(N, 28, 28\)"),
    ({"val_images": np.zeros((20, 28, 28))}, "uint8"),
])  # fmt: skip
def test_damaged_contents_are_refused(tmp_path, changes, match):
    rewritten(tmp_path, **changes)
    with pytest.raises(UserError, match=match):
        read_medmnist("breastmnist", tmp_path, verify=False)


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="no MedMNIST 2D set"):
        read_medmnist("mnist", tmp_path)
    with pytest.raises(UserError, match="not 32"):
        read_medmnist("breastmnist", tmp_path, 32)
    with pytest.raises(UserError, match=r"breastmnist_64\.npz"):
        read_medmnist("breastmnist", tmp_path, 64)
    (tmp_path / file_name("breastmnist")).write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="damaged"):
        read_medmnist("breastmnist", tmp_path, verify=False)
    with pytest.raises(UserError, match=r"must lie in 0\.\.6"):
        check_labels(np.array([0, 7]), "multi-class", 7, "labels")


def test_classes_have_the_published_names():
    info = pytest.importorskip("medmnist", reason="medmnist is not installed").INFO
    for name, names in NAMES.items():
        assert list(names) == list(info[name]["label"].values()), name
    assert class_names("breastmnist", ("0", "1")) == ("malignant", "normal, benign")
    assert class_names("breastmnist", ("0",)) == ("0",)  # another file of that form
    assert class_names("pets", ("cat", "dog")) == ("cat", "dog")


def test_a_split_without_pictures_is_refused(tmp_path):
    empty = {"val_images": np.zeros((0, 28, 28), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)}
    rewritten(tmp_path, **empty)
    with pytest.raises(UserError, match="has no pictures in val: a set needs some in each of train, val, test"):
        read_medmnist("breastmnist", tmp_path, verify=False)
