"""Every set of labelled pictures by its name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from ...errors import UserError
from .cifar import read_cifar
from .folders import picture_folder
from .image_set import ArrayPictures, Bad, PictureSet, PictureSplit, without_damaged
from .images import load_images
from .medmnist_sets import SETS
from .transfer_sets import READERS

CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}
NAMES = ("digits", "folder", *CIFAR, *READERS, *SETS)
_TORCHVISION = {"aircraft": "FGVCAircraft", "flowers102": "Flowers102", "food101": "Food101", "pets": "OxfordIIITPet"}


def load_pictures(
    name: str,
    data_dir: str = "",
    *,
    size: int = 28,
    validate: Literal["auto", "none"] = "auto",
    bad: Bad = "refuse",
    verify: bool = True,
    say: Callable[[str], None] = print,
) -> PictureSet:
    """A set of :data:`NAMES`.

    Args:
        name: "digits" come with scikit-learn; every other set needs its files.
        data_dir: where they lie, in the set's public form; for "folder" a folder or zip of pictures by class.
        size: pixels of a MedMNIST file (28, 64, 128 or 224).
        validate: "auto" keeps the set's own val or a tenth of train; "none" trains on those too.
        bad: what to do about damaged pictures: :func:`memtrain_common.data.images.image_set.without_damaged`.
        verify: compare a MedMNIST file's MD5 with the published one.
        say: told what was left out.

    Raises:
        UserError: naming what is missing or damaged.
    """
    if name not in NAMES:
        raise UserError(f"{name!r} is no known set of pictures: choose one of {', '.join(NAMES)}")
    if name == "digits" or name in SETS:
        images = load_images(name, data_dir, size, verify=verify)
        splits = {k: PictureSplit(ArrayPictures(s.images), s.labels) for k, s in images.splits.items()}
        found = PictureSet(name, images.task, images.classes, splits, images.size)
    elif not data_dir:
        raise UserError(f"--data {name} needs --data-dir, the folder with its files")
    elif name == "folder":
        found = picture_folder(Path(data_dir))
    elif name in CIFAR:
        found = read_cifar(name, Path(data_dir))
    else:
        found = READERS[name](Path(data_dir))
    found = without_damaged(found, bad, say)
    return trained_on_val(found) if validate == "none" else found


def trained_on_val(found: PictureSet) -> PictureSet:
    """The set with val joined to train, and no val."""
    train, val = found.splits["train"], found.splits["val"]
    joined = PictureSplit(train.pictures.join(val.pictures), np.concatenate([train.labels, val.labels]))
    return replace(found, splits={"train": joined, "test": found.splits["test"]})


def fetch(name: str, data_dir: str) -> None:
    """Download a set into ``data_dir``, where :func:`load_pictures` finds it; what is there already stays.

    Raises:
        UserError: if no source of the set is known, or it cannot be reached, or its checksum is wrong.
    """
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import download_url
    except ImportError:
        raise UserError(f"--download of {name} needs the package torchvision") from None
    if name not in CIFAR and name not in _TORCHVISION:
        raise UserError(f"--download knows no source of {name}: get its files, and name their folder by --data-dir")
    if not data_dir:
        raise UserError("--download needs --data-dir: the folder where the files shall lie")
    try:
        if name in CIFAR:
            file, md5 = CIFAR[name]
            download_url(f"https://www.cs.toronto.edu/~kriz/{file}", data_dir, md5=md5)
        else:
            getattr(datasets, _TORCHVISION[name])(data_dir, download=True)
    except (OSError, RuntimeError) as error:  # of the network, or of a checksum
        raise UserError(f"{name} could not be downloaded: {error}") from None
