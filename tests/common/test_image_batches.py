"""Recipes against torchvision's transforms, batches as functions of their number, normalisation."""

import itertools
import math

import numpy as np
import pytest
import torch
from image_files import image_folder, random_file
from memtrain_common.data.images.batches import (
    IMAGENET,
    RECIPES,
    ImageBatches,
    Normalize,
    _permutation,
    crop_box,
    evaluation_batches,
    jittered,
    randomly_cropped,
)
from memtrain_common.data.images.folders import picture_folder
from memtrain_common.data.images.image_set import ArrayImages, ImageSplit
from memtrain_common.data.images.sets import load_images
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

DRAW = np.random.default_rng(0)


def photos(tmp_path, n=12):
    """Files of 17×19 pixels: wider than high, and of no size that a recipe asks for."""
    folder = image_folder(tmp_path / "photos", n, size=17)
    return picture_folder(folder).splits["train"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("jitter", ["none", "torch"])
def test_a_batch_is_a_function_of_seed_and_number_and_shared_by_processes(tmp_path, recipe, jitter):
    split = photos(tmp_path)

    def batches(**more):
        return ImageBatches(split, 6, 8, 3, recipe=recipe, jitter=jitter, **more)

    whole, labels = batches()(5)
    assert whole.shape == (6, 3, 8, 8)
    assert whole.is_contiguous()
    assert torch.equal(whole, batches()(5)[0])
    assert not torch.equal(whole, batches()(6)[0])
    halves = [batches(rank=r, world_size=2)(5) for r in (0, 1)]
    assert torch.equal(torch.stack([h[0] for h in halves], 1).flatten(0, 1), whole)
    assert torch.equal(torch.stack([h[1] for h in halves], 1).flatten(), labels)


def torchvisions_box(monkeypatch, image, uniform, area):
    """RandomResizedCrop.get_params with the random numbers given: four a try, of which a try that misfits uses two."""
    stream, drawn = iter(uniform), []

    class Empty:
        def uniform_(self, low, high):
            if len(drawn) == 2:  # the try before did not fit
                drawn.clear()
                next(stream), next(stream)
            drawn.append(0)
            return torch.tensor([low + next(stream) * (high - low)], dtype=torch.float64)

    def randint(low, high, size):
        return torch.tensor([low + int(next(stream) * (high - low))])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_: Empty())
        patch.setattr(torch, "randint", randint)
        return tuple(map(int, transforms.RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3])))


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30), (5, 90), (1, 1), (64, 64)])
def test_a_random_crop_is_torchvisions(monkeypatch, height, width):
    image = Image.fromarray(DRAW.integers(0, 256, (height, width, 3)).astype(np.uint8))
    for area in ((0.05, 1.0), (0.22, 1.0), (0.9, 1.0)):
        for _ in range(5):
            uniform = DRAW.random(45)
            expected = torchvisions_box(monkeypatch, image, uniform, area)
            assert crop_box(height, width, uniform, area) == expected


def test_crops_cover_the_area_that_the_recipe_says():
    for area in ((0.05, 1.0), (0.22, 1.0)):
        parts = []
        for _ in range(300):
            top, left, h, w = crop_box(60, 80, DRAW.random(45), area)
            assert 0 <= top <= 60 - h
            assert 0 <= left <= 80 - w
            assert 0.7 < w / h < 1.4
            parts.append(h * w / 4800)
        assert min(parts) > 0.9 * area[0]
        assert max(parts) > 0.85


def test_the_pixels_of_a_crop_are_torchvisions():
    picture = DRAW.integers(0, 256, (37, 23, 3)).astype(np.uint8)
    uniform = DRAW.random(45)
    image = Image.fromarray(picture)
    box = crop_box(37, 23, uniform, (0.05, 1.0))
    assert np.array_equal(randomly_cropped(picture, uniform, 16, "vit"), F.resized_crop(image, *box, [16, 16]))
    large = image.resize((16, 16))  # bicubic, as Co-Tuning's code resizes
    box = crop_box(16, 16, uniform, (0.08, 1.0))
    assert np.array_equal(randomly_cropped(picture, uniform, 14, "cotuning"), F.resized_crop(large, *box, [14, 14]))


def test_evaluation_is_torchvisions(tmp_path):
    split = photos(tmp_path, 3)
    normal = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tail = [transforms.ToTensor(), normal]
    theirs = {
        "none": transforms.Compose([transforms.Resize((14, 14)), *tail]),
        "vit": transforms.Compose([transforms.Resize((14, 14)), *tail]),
        "cnn": transforms.Compose([transforms.Resize(math.ceil(14 / 0.875)), transforms.CenterCrop(14), *tail]),
    }
    for recipe, transform in theirs.items():
        found = list(evaluation_batches(split, 14, recipe=recipe, normalize=IMAGENET, batch=4))
        assert [len(x) for x, _ in found] == [4, 2]
        whole = torch.cat([x for x, _ in found])
        expected = torch.stack([transform(Image.fromarray(split.images[i])) for i in range(6)])
        assert torch.allclose(whole, expected, atol=1e-6)
        assert torch.equal(torch.cat([y for _, y in found]), torch.from_numpy(split.labels))
    cotuning = next(evaluation_batches(split, 14, recipe="cotuning", normalize=Normalize(), batch=6))[0]
    box = [np.asarray(Image.fromarray(split.images[i]).resize((16, 16)))[1:15, 1:15] for i in range(6)]
    assert torch.allclose(cotuning, Normalize()(np.stack(box)))


def test_colours():
    picture = DRAW.integers(0, 256, (9, 8, 3)).astype(np.uint8)
    image = Image.fromarray(picture)
    u = np.array([0.9, 0.1, 0.3, 0.8, 0.0])  # order 0: brightness, contrast, saturation, hue
    expected = F.adjust_hue(
        F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(image, 1.32), 0.68), 0.84), 0.06
    )  # 1 + 0.4·(2u − 1), and 0.1·(2u − 1)
    assert np.array_equal(jittered(picture, u, "torch"), expected)
    expected = F.adjust_saturation(F.adjust_brightness(image, 1 + 0.8 * 32 / 255), 1 - 0.4 * 0.5)
    assert np.array_equal(jittered(picture, u, "tf"), expected)
    assert sorted(map(_permutation, range(24))) == list(map(list, itertools.permutations(range(4))))


def test_arrays_go_the_short_way_to_the_same_numbers():
    images = DRAW.integers(0, 256, (10, 8, 8)).astype(np.uint8)
    split = ImageSplit(ArrayImages(images), np.arange(10))
    pixels, labels = ImageBatches(split, 4, 8, 0)(1)
    expected = torch.from_numpy(images[labels.numpy()])[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    assert torch.allclose(pixels, expected, atol=1e-6)
    flipped, again = ImageBatches(split, 4, 8, 0, recipe="flip")(1)
    assert torch.equal(labels, again)
    same = [torch.equal(a, b) or torch.equal(a.flip(-1), b) for a, b in zip(pixels, flipped, strict=True)]
    assert all(same)


def test_a_multi_label_set(tmp_path):
    random_file(tmp_path, "chestmnist", 20)
    images = load_images("chestmnist", str(tmp_path), verify=False)
    assert images.multi_label
    assert len(images.classes) == 14
    pixels, labels = ImageBatches(images.splits["train"], 4, 28, 0, multi_label=True)(0)
    assert pixels.shape == (4, 3, 28, 28)
    assert labels.dtype == torch.float32
    assert labels.shape == (4, 14)


def grey_split(n=20):
    draw = np.random.default_rng(0)
    return ImageSplit(ArrayImages(draw.integers(1, 256, (n, 8, 8)).astype(np.uint8)), np.arange(n))


def test_nearest_neighbours_are_the_last_that_is_done(tmp_path):
    content = grey_split()
    for recipe in ("none", "flip", "flip-shift"):
        own, labels = ImageBatches(content, 6, 8, 3, recipe=recipe)(2)
        for size in (16, 13, 5):
            found, same = ImageBatches(content, 6, size, 3, recipe=recipe, resize="nearest")(2)
            rows = torch.arange(size).mul(8).add(4).div(size, rounding_mode="floor")  # of the middle of each pixel
            assert torch.equal(found, own[:, :, rows][..., rows])
            assert torch.equal(same, labels)
    whole = next(evaluation_batches(content, 16, normalize=Normalize(), resize="nearest", batch=20))[0]
    expected = torch.from_numpy(content.images.array).repeat_interleave(2, 1).repeat_interleave(2, 2) / 127.5 - 1
    assert torch.allclose(whole, expected[:, None].expand(-1, 3, -1, -1), atol=1e-6)
    with pytest.raises(ValueError, match="in memory alone"):
        ImageBatches(photos(tmp_path), 6, 8, 3, resize="nearest")(0)


def test_every_image_is_seen_once_an_epoch():
    seen = torch.cat([ImageBatches(grey_split(), 6, 8, 3)(i)[1] for i in range(10)])
    assert (seen.bincount() == 3).all()


def test_augmentation_moves_and_mirrors_what_is_there():
    content = grey_split()
    mirrored, moved = 0, 0
    for number in range(10):
        plain, labels = ImageBatches(content, 6, 8, 3)(number)
        flipped, same = ImageBatches(content, 6, 8, 3, recipe="flip")(number)
        shifted, _ = ImageBatches(content, 6, 8, 3, recipe="flip-shift")(number)
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
