"""Images and batches are, to the last bit, those of the versions before 2026-12: runs of theirs go on as they began.

The digests were taken of the two pipelines that there were: one of images in memory, which galore-vit used, and one of
pictures in files.
"""

import hashlib
import json
import os
import zipfile

import numpy as np
import pytest
from galore_vit.tasks.models import describe
from image_files import random_file
from memtrain_common.data.images.batches import IMAGENET, RECIPES, ImageBatches, Normalize, evaluation_batches
from memtrain_common.data.images.image_set import fold
from memtrain_common.data.images.medmnist_results import official_name
from memtrain_common.data.images.sets import load_images
from PIL import Image

IN_MEMORY = {  # set -> digests of the description and of the batches, as galore-vit has them; name of result files
    "digits": ("6d6d70dec18b4af7", "a3b7cf0469f3893c", "digits"),
    "fold": ("54376838ae7719aa", "333b67868dd2771c", "digits"),
    "chestmnist": ("570388f840b835c4", "041d08e85b065877", "chestmnist"),
    "bloodmnist": ("d2f93605444d37b2", "ad885a1f7fdf4dc0", "bloodmnist"),
    "breastmnist": ("ff7ef14f776a9c73", "e2d9ba60523947fa", "breastmnist"),
    "folder": ("8a8658605c94f660", "ead893aa77556daa", "two-pets"),
    "zip": ("8a8658605c94f660", "ead893aa77556daa", "two-pets"),
    "flat": ("e379885075b086f0", "ec01d7d2956e457d", "all"),
}
AS_PICTURES = {  # set -> digests of the description and of the batches, as backrazor-train and finetune have them
    "digits": ("e98ab1bdb0aa4dec", "42cf5d3d2fa74170"),
    "digits without val": ("a7bd2107929bee00", "eddb12830fe4dd0a"),
    "chestmnist": ("0f26e0f7c1486bbb", "d5ba46a6299f8c08"),
    "bloodmnist": ("e15aac6f45d1a531", "48894a67af6672f8"),
    "breastmnist": ("5cb1e739ceaa11d6", "c23b2acc687eb437"),
    "folder": ("c1f1caa6c30ec5c5", "6793b52625c72545"),
    "folder without val": ("41aaa962123293e7", "d0d715184d62b026"),
    "zip": ("afa795f2516d88e9", "6793b52625c72545"),
    "flat": ("ca1752f3ce558312", "be65cf0fa9040635"),
    "cifar10": ("f3f9e9d60c9ceff0", "a3a3e4b416c00aa8"),
}


def bitmaps(folder, classes=2, n=12, shape=(9, 11), splits=("train", "test")):
    """Pictures whose files are the same bytes under every version of every library."""
    draw = np.random.default_rng(0)
    for split in splits:
        for c in range(classes):
            place = folder / split / f"class_{c}"
            place.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(draw.integers(0, 256, (*shape, 3)).astype(np.uint8)).save(place / f"{i:02d}.bmp")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Set -> its --data and --data-dir."""
    root = tmp_path_factory.mktemp("sets")
    found = {"digits": ("digits", "")}
    for flag, n in (("chestmnist", 20), ("bloodmnist", 24)):
        random_file(root, flag, n)
        found[flag] = (flag, str(root))
    found["folder"] = ("folder", str(bitmaps(root / "two_pets")))
    found["flat"] = ("folder", str(bitmaps(root / "flat", splits=("all",), n=20) / "all"))
    ten = bitmaps(root / "cifar", classes=10, n=10, shape=(32, 32))
    for folder, name, data in ((root / "two_pets", "zip", "folder"), (ten, "cifar10", "cifar10")):
        found[name] = (data, f"{folder}.zip")
        with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
            for file in sorted(folder.rglob("*.bmp")):
                archive.write(file, str(file.relative_to(folder)))
    found["breastmnist"] = ("breastmnist", os.path.join(os.environ.get("MEMTRAIN_DATA", "none"), "medmnist"))
    return found


def load(places, name, **more):
    data, place = places[name]
    if name == "breastmnist" and not os.path.isfile(os.path.join(place, "breastmnist.npz")):
        pytest.skip("MEMTRAIN_DATA names no folder with medmnist/breastmnist.npz")
    return load_images(data, place, verify=name == "breastmnist", **more)


def digest(tensors):
    whole = hashlib.sha256()
    for t in tensors:
        whole.update(f"{t.dtype} {tuple(t.shape)}".encode())
        whole.update(t.contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def of_words(about):
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_MEMORY)
def test_images_in_memory(places, name):
    if name == "fold":
        images = fold(load(places, "digits", fit=True), 2, 5)
    else:
        images = load(places, name, size=8 if name in ("folder", "zip") else 28, fit=True)
    train, test = images.splits["train"], images.splits["test"]
    found = []
    for size in (images.size, images.size + 5, 2 * images.size + 1, images.size - 3):
        for recipe in ("none", "flip", "flip-shift"):
            for number, rank, world in ((0, 0, 1), (3, 1, 2)):
                found += ImageBatches(train, 6, size, 3, recipe=recipe, resize="nearest", rank=rank, world_size=world,
                                      multi_label=images.multi_label)(number)  # fmt: skip
        found.append(next(evaluation_batches(test, size, normalize=Normalize(), resize="nearest", batch=17))[0])
    assert (of_words(describe(images)), digest(found), official_name(images)) == IN_MEMORY[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_PICTURES)
def test_pictures(places, name):
    images = load(places, name.partition(" ")[0], validate="none" if "without" in name else "auto")
    test = images.splits["test"]
    test = test.take(np.arange(min(9, len(test))))
    found = []
    for size in (images.size or 10, 14):
        for recipe in RECIPES:
            for jitter, normalize in (("none", Normalize()), ("tf", IMAGENET)):
                for number, rank, world in ((0, 0, 1), (3, 1, 2)):
                    found += ImageBatches(images.splits["train"], 6, size, 3, recipe=recipe, jitter=jitter,
                                          normalize=normalize, multi_label=images.multi_label,
                                          rank=rank, world_size=world)(number)  # fmt: skip
            for batch in evaluation_batches(test, size, recipe=recipe, normalize=Normalize(), batch=4,
                                            multi_label=images.multi_label):  # fmt: skip
                found += batch
    described = {**images.describe(), "classes": len(images.classes)}  # which were not named then
    assert (of_words(described), digest(found)) == AS_PICTURES[name]
