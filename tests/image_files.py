"""Files of images as their publishers lay them out, small and random."""

import numpy as np
from memtrain_common.medmnist_sets import SETS
from PIL import Image


def random_file(folder, flag, n, seed=0):
    """An npz of a set's form with n samples a split, every class present; returns the test labels."""
    known, draw = SETS[flag], np.random.default_rng(seed)
    arrays = {}
    for split in ("train", "val", "test"):
        if known.task.startswith("multi-label"):
            labels = draw.integers(0, 2, (n, known.classes))
            labels[:2] = [[0], [1]]
        else:
            labels = draw.permutation(np.arange(n) % known.classes)[:, None]
        shape = (n, 28, 28) if known.channels == 1 else (n, 28, 28, 3)
        arrays |= {f"{split}_images": draw.integers(0, 256, shape).astype(np.uint8)}
        arrays |= {f"{split}_labels": labels.astype(np.uint8)}
    np.savez(folder / f"{flag}.npz", **arrays)
    return arrays["test_labels"]


def image_folder(folder, n, classes=("cat", "dog"), splits=("train", "val", "test"), size=9, seed=0):
    """``folder/split/class/i.png``: n images a class and split, each class brighter than the one before."""
    draw = np.random.default_rng(seed)
    for split in splits:
        for c, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(n):
                low = 200 * c // len(classes)
                pixels = draw.integers(low, low + 50, (size, size + 2, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder
