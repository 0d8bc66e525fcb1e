"""Every set of labelled images by its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from ...errors import UserError
from ..order import epoch_order
from .cifar import read_cifar
from .damaged import Bad, without_damaged
from .folders import picture_folder
from .image_set import ArrayImages, ImageSet, ImageSplit, in_memory, trained_on_val
from .medmnist import read_medmnist
from .medmnist_sets import SETS
from .transfer_sets import READERS

CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}
NAMES = ("digits", "folder", *CIFAR, *READERS, *SETS)
_TORCHVISION = {"aircraft": "FGVCAircraft", "flowers102": "Flowers102", "food101": "Food101", "pets": "OxfordIIITPet"}


def load_images(
    name: str,
    data_dir: str = "",
    *,
    size: int = 28,
    fit: bool = False,
    validate: Literal["auto", "none"] = "auto",
    bad: Bad = "refuse",
    verify: bool = True,
    say: Callable[[str], None] = print,
) -> ImageSet:
    """A set of :data:`NAMES`.

    Args:
        name: "digits" come with scikit-learn; every other set needs its files.
        data_dir: where they lie, in the set's public form; for "folder" a folder or zip of pictures by class.
        size: pixels of a MedMNIST file (28, 64, 128 or 224).
        fit: decode files now, to ``size``: :func:`memtrain_common.data.images.image_set.in_memory`.
        validate: "auto" keeps the set's own val or a tenth of train; "none" trains on those too.
        bad: what to do about damaged pictures: :func:`memtrain_common.data.images.damaged.without_damaged`.
        verify: compare a MedMNIST file's MD5 with the published one.
        say: told what was left out.

    Raises:
        UserError: naming what is missing or damaged.
    """
    if name not in NAMES:
        raise UserError(f"{name!r} is no known set of pictures: choose one of {', '.join(NAMES)}")
    if name == "digits" and data_dir:
        raise UserError("the digits come with scikit-learn: leave --data-dir out, or name another --data")
    if name != "digits" and not data_dir:
        what = {"folder": "of pictures"} | dict.fromkeys(SETS, f"that holds {name}.npz")
        raise UserError(f"--data {name} needs --data-dir, the folder {what.get(name, 'with its files')}")
    folder = Path(data_dir)
    if name == "digits":
        found = digits()
    elif name == "folder":
        found = picture_folder(folder, say)
    elif name in SETS:
        found = read_medmnist(name, folder, size, verify=verify)
    elif name in CIFAR:
        found = read_cifar(name, folder, say)
    else:
        found = READERS[name](folder)
    found = in_memory(found, size, fit=True) if fit else without_damaged(found, bad, say)
    return trained_on_val(found) if validate == "none" else found


def digits() -> ImageSet:
    """scikit-learn's 1797 handwritten digits of 8×8 pixels: 1197 for training, 200 to validate, 400 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 16 levels of grey
    whole = ImageSplit(ArrayImages(images), found.target.astype(np.int64))
    order = epoch_order(0, 0, len(images))
    cuts = {"train": order[:1197], "val": order[1197:1397], "test": order[1397:]}
    return ImageSet("digits", "multi-class", tuple(map(str, range(10))), {k: whole.take(v) for k, v in cuts.items()}, 8)


def fetch(name: str, data_dir: str) -> None:
    """Download a set into ``data_dir``, where :func:`load_images` finds it; what is there already stays.

    Raises:
        UserError: if no source of the set is known, or it cannot be reached, or its checksum is wrong.
    """
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import download_url
    except ImportError:
        raise UserError(f"--download of {name} needs the package torchvision: pip install torchvision") from None
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
