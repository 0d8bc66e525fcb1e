"""Image sets and their batches: counts, splits, pixels, purity, refusals."""

import numpy as np
import pytest
import torch
from image_files import image_folder, random_file
from memtrain_common.data.images.images import ImageBatches, fold, load_images, to_pixels
from memtrain_common.data.images.medmnist import Split
from memtrain_common.data.order import stratified
from memtrain_common.errors import UserError


def test_digits_are_all_there_once():
    images = load_images("digits")
    counts = {name: len(s.images) for name, s in images.splits.items()}
    assert counts == {"train": 1197, "val": 200, "test": 400}
    rows = np.concatenate([s.images.reshape(len(s.images), -1) for s in images.splits.values()])
    from sklearn.datasets import load_digits

    theirs = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, theirs))
    assert images.sha256 == load_images("digits").sha256


def test_a_multi_label_set(tmp_path):
    random_file(tmp_path, "chestmnist", 20)
    images = load_images("chestmnist", str(tmp_path), verify=False)
    assert images.multi_label
    assert len(images.classes) == 14
    pixels, labels = ImageBatches(images.splits["train"], 4, 28, 0, multi_label=True)(0)
    assert pixels.shape == (4, 3, 28, 28)
    assert labels.dtype == torch.float32
    assert labels.shape == (4, 14)


def test_folders_in_splits_and_without(tmp_path):
    three = load_images("folder", str(image_folder(tmp_path / "three", 5)), 8)
    assert {n: len(s.images) for n, s in three.splits.items()} == {"train": 10, "val": 10, "test": 10}
    assert three.classes == ("cat", "dog")
    assert three.task == "binary-class"
    assert three.splits["test"].images.shape == (10, 8, 8, 3)
    bright = [three.splits["val"].images[three.splits["val"].labels == c].mean() for c in (0, 1)]
    assert bright[0] < 60 < 100 < bright[1]  # labels belong to their pictures
    two = load_images("folder", str(image_folder(tmp_path / "two", 20, splits=("train", "test"))), 8)
    assert {n: len(s.images) for n, s in two.splits.items()} == {"train": 36, "val": 4, "test": 40}
    flat = image_folder(tmp_path / "flat", 20, splits=("all",), classes=("a", "b", "c")) / "all"
    one = load_images("folder", str(flat), 8)
    assert {n: len(s.images) for n, s in one.splits.items()} == {"train": 48, "val": 6, "test": 6}
    assert all(set(s.labels) == {0, 1, 2} for s in one.splits.values())


def test_refused_folders(tmp_path):
    with pytest.raises(UserError, match="needs --data-dir"):
        load_images("folder")
    with pytest.raises(UserError, match="not a folder"):
        load_images("folder", str(tmp_path / "none"))
    with pytest.raises(UserError, match="two at least"):
        load_images("folder", str(tmp_path))
    lacking = image_folder(tmp_path / "lacking", 2)
    (lacking / "val" / "dog").rename(lacking / "val" / "wolf")
    with pytest.raises(UserError, match="differ in the class 'dog'"):
        load_images("folder", str(lacking))
    broken = image_folder(tmp_path / "broken", 2)
    (broken / "train" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png is not a picture"):
        load_images("folder", str(broken))
    empty = image_folder(tmp_path / "empty", 2)
    for path in (empty / "test" / "dog").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="holds no picture"):
        load_images("folder", str(empty))
    no_test = image_folder(tmp_path / "no_test", 2, splits=("train", "val"))
    with pytest.raises(UserError, match="needs train and test"):
        load_images("folder", str(no_test))


def test_pixels():
    grey = np.array([[[0, 255], [255, 0]]], np.uint8)
    x = to_pixels(grey, 4)
    assert x.shape == (1, 3, 4, 4)
    assert torch.equal(x[0, 0], x[0, 2])
    assert x[0, 0, :2, :2].eq(-1).all()
    assert x[0, 0, :2, 2:].eq(1).all()
    colour = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3)).astype(np.uint8)
    assert torch.allclose(to_pixels(colour, 5)[1, 2, 3, 4], torch.tensor(colour[1, 3, 4, 2] / 127.5 - 1).float())


def split(n=20):
    draw = np.random.default_rng(0)
    return Split(draw.integers(1, 256, (n, 8, 8)).astype(np.uint8), np.arange(n))


@pytest.mark.parametrize("augment", ["none", "flip", "flip-shift"])
def test_batches_are_a_function_of_seed_and_number_and_shared_by_processes(augment):
    def batches(**more):
        return ImageBatches(split(), 6, 8, 3, augment=augment, **more)

    whole, labels = batches()(5)
    again = batches()(5)
    assert torch.equal(whole, again[0])
    halves = [batches(rank=r, world_size=2)(5) for r in (0, 1)]
    assert torch.equal(torch.stack([h[1] for h in halves], 1).flatten(), labels)
    assert torch.equal(torch.stack([h[0] for h in halves], 1).flatten(0, 1), whole)
    seen = torch.cat([batches()(i)[1] for i in range(10)])
    assert (seen.bincount() == 3).all()  # three epochs


def test_augmentation_moves_and_mirrors_what_is_there():
    content = split()
    mirrored, moved = 0, 0
    for number in range(10):
        plain, labels = ImageBatches(content, 6, 8, 3)(number)
        flipped, same = ImageBatches(content, 6, 8, 3, augment="flip")(number)
        shifted, _ = ImageBatches(content, 6, 8, 3, augment="flip-shift")(number)
        assert torch.equal(labels, same)
        for a, b, c in zip(plain, flipped, shifted, strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
            mirrored += int(not torch.equal(a, b))
            moved += int(not torch.equal(b, c))
            places = [torch.nn.functional.pad(b, (1, 1, 1, 1), value=-1)[:, y : y + 8, x : x + 8]
                      for y in range(3) for x in range(3)]  # fmt: skip
            assert any(torch.equal(c, place) for place in places)
    assert 15 < mirrored < 45
    assert moved > 40


def test_stratified_parts_are_even_in_every_class():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    parts = stratified(labels, 5, seed=1)
    for c, n in enumerate((10, 6, 4)):
        assert (np.bincount(parts[labels == c], minlength=5) == n).all()
    assert not np.array_equal(parts, stratified(labels, 5, seed=2))


def test_folds_validate_on_everything_once():
    images = load_images("digits")
    seen = []
    for k in range(4):
        part = fold(images, k, 4)
        assert len(part.splits["train"].images) + len(part.splits["val"].images) == 1397
        assert part.splits["test"] is images.splits["test"]
        seen += [
            bytes(i) + bytes([y]) for i, y in zip(part.splits["val"].images, part.splits["val"].labels, strict=True)
        ]
    both = [images.splits["train"], images.splits["val"]]
    assert sorted(seen) == sorted(bytes(i) + bytes([y]) for s in both for i, y in zip(s.images, s.labels, strict=True))
    with pytest.raises(UserError, match="2000 folds"):
        fold(images, 0, 2000)
