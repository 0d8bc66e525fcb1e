"""Six sets of photographs on which pretrained models are tuned, read from the folders that their publishers ship.

Each reader takes the set's own folder or one around it, finds the official train and test lists (Aircraft and Flowers
have val as well; of the others a tenth of train validates), and decodes nothing yet.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .folders import tenth
from .image_set import FileImages, ImageSet, ImageSplit
from .tree import Tree

Rows = list[tuple[str, int]]
"""A picture's path within the set's folder, and its class."""


def aircraft(data_dir: Path) -> ImageSet:
    """FGVC-Aircraft (Maji et al., 2013): 100 variants; ``data/images_variant_{train,val,test}.txt``."""
    root = _folder(data_dir, "data/variants.txt", "fgvc-aircraft-2013b", "FGVC-Aircraft")
    classes = [line.strip() for line in _lines(root / "data/variants.txt")]
    number = {name: i for i, name in enumerate(classes)}
    splits = {}
    for split in ("train", "val", "test"):
        path = root / f"data/images_variant_{split}.txt"
        pairs = [_words(line, 1, path, n) for n, line in enumerate(_lines(path), 1)]
        unknown = next((v for _, v in pairs if v not in number), None)
        if unknown is not None:
            raise UserError(f"{path} names the variant {unknown!r}, which {root / 'data/variants.txt'} lacks")
        splits[split] = [(f"data/images/{image}.jpg", number[variant]) for image, variant in pairs]
    return _set("aircraft", root, splits, classes)


def cars(data_dir: Path) -> ImageSet:
    """Stanford Cars (Krause et al., 2013): 196 models; annotations are MATLAB files in ``devkit``."""
    root = _folder(data_dir, "devkit/cars_meta.mat", "stanford_cars", "Stanford Cars")
    classes = [str(c) for c in _mat(root / "devkit/cars_meta.mat", "class_names").tolist()]
    labelled = [root / f"{place}cars_test_annos_withlabels.mat" for place in ("", "devkit/")]
    test = next((p for p in labelled if p.is_file()), labelled[0])
    splits = {}
    for split, path in (("train", root / "devkit/cars_train_annos.mat"), ("test", test)):
        try:
            splits[split] = [
                (f"cars_{split}/{a['fname']}", int(a["class"]) - 1) for a in np.atleast_1d(_mat(path, "annotations"))
            ]
        except (IndexError, ValueError, TypeError) as error:
            raise UserError(f"{path} has no file names with classes ({error}): the one with labels is needed") from None
    return _set("cars", root, splits, classes)


def cub200(data_dir: Path) -> ImageSet:
    """Caltech-UCSD Birds-200-2011 (Wah et al., 2011): 200 species; lists by the image's number."""
    root = _folder(data_dir, "train_test_split.txt", "CUB_200_2011", "CUB-200-2011")

    def table(name: str) -> dict[str, str]:
        return dict(_words(line, 1, root / name, n) for n, line in enumerate(_lines(root / name), 1))

    images, labels, trains = table("images.txt"), table("image_class_labels.txt"), table("train_test_split.txt")
    classes = [name.partition(".")[2] or name for name in table("classes.txt").values()]
    splits: dict[str, Rows] = {"train": [], "test": []}
    for number, path in images.items():
        if number not in labels or number not in trains:
            raise UserError(f"{root} has no class or no split for the image {number} of images.txt")
        label = _number(labels[number], root / "image_class_labels.txt")
        splits["train" if trains[number] == "1" else "test"].append((f"images/{path}", label - 1))
    return _set("cub200", root, splits, classes)


def flowers102(data_dir: Path) -> ImageSet:
    """Oxford Flowers-102 (Nilsback and Zisserman, 2008): ``imagelabels.mat`` and ``setid.mat``, 10 + 10 a class."""
    root = _folder(data_dir, "setid.mat", "flowers-102", "Flowers-102")
    labels = np.atleast_1d(_mat(root / "imagelabels.mat", "labels"))  # by the image's number less one, from 1
    splits = {}
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        numbers = [int(i) for i in np.atleast_1d(_mat(root / "setid.mat", key))]
        if max(numbers) > len(labels):
            raise UserError(f"{root}/setid.mat names the image {max(numbers)}, and imagelabels.mat has {len(labels)}")
        splits[split] = [(f"jpg/image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in numbers]
    return _set("flowers102", root, splits, [str(i) for i in range(1, int(labels.max()) + 1)])


def food101(data_dir: Path) -> ImageSet:
    """Food-101 (Bossard et al., 2014): ``meta/{train,test}.txt``; train's labels are noisy by intention."""
    root = _folder(data_dir, "meta/classes.txt", "food-101", "Food-101")
    classes = [line.strip() for line in _lines(root / "meta/classes.txt")]
    number = {name: i for i, name in enumerate(classes)}
    splits = {}
    for split in ("train", "test"):
        path = root / f"meta/{split}.txt"
        names = [line.strip() for line in _lines(path)]
        unknown = next((n for n in names if n.partition("/")[0] not in number), None)
        if unknown is not None:
            raise UserError(f"{path} names {unknown!r}, whose class meta/classes.txt lacks")
        splits[split] = [(f"images/{name}.jpg", number[name.partition("/")[0]]) for name in names]
    return _set("food101", root, splits, classes)


def pets(data_dir: Path) -> ImageSet:
    """Oxford-IIIT Pet (Parkhi et al., 2012): 37 breeds; ``annotations/{trainval,test}.txt``: name, class, …"""
    root = _folder(data_dir, "annotations/trainval.txt", "oxford-iiit-pet", "Oxford-IIIT Pet")
    names: dict[int, str] = {}
    splits = {}
    for split, file in (("train", "trainval"), ("test", "test")):
        path = root / f"annotations/{file}.txt"
        rows: Rows = []
        for n, line in enumerate(_lines(path), 1):
            image, label, *_ = _words(line, 3, path, n)
            rows.append((f"images/{image}.jpg", _number(label, path) - 1))
            names[rows[-1][1]] = image.rpartition("_")[0]
        splits[split] = rows
    return _set("pets", root, splits, [names.get(i, str(i)) for i in range(max(names) + 1)])


READERS: dict[str, Callable[[Path], ImageSet]] = {
    "aircraft": aircraft,
    "cars": cars,
    "cub200": cub200,
    "flowers102": flowers102,
    "food101": food101,
    "pets": pets,
}


def _folder(data_dir: Path, marker: str, usual: str, title: str) -> Path:
    """The set's folder: ``data_dir`` or one in it, told by a file that it must have."""
    for folder in (data_dir, data_dir / usual):
        if (folder / marker).is_file():
            return folder
    raise UserError(f"{data_dir} has neither {marker} nor {usual}/{marker}: --data-dir must be the folder of {title}")


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path} is empty")
    return found


def _words(line: str, cuts: int, path: Path, number: int) -> list[str]:
    words = line.strip().split(None, cuts)
    if len(words) != cuts + 1:
        raise UserError(f"{path}, line {number}: {line.strip()!r} has {len(words)} words instead of {cuts + 1}")
    return words


def _number(text: str, path: Path) -> int:
    if not text.isdecimal():
        raise UserError(f"{path}: the class {text!r} is not a number")
    return int(text)


def _mat(path: Path, key: str) -> Any:
    """One variable of a MATLAB file, without its empty dimensions. scipy reads numbers and text, and runs nothing."""
    from scipy.io import loadmat

    if not path.is_file():
        raise UserError(f"{path} is not there")
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy's reader fails on damaged bytes by whatever comes first
        raise UserError(f"{path} is damaged or no MATLAB file: {error}") from None
    if key not in content:
        raise UserError(f"{path} has no {key!r}")
    return content[key]


def _set(name: str, root: Path, splits: dict[str, Rows], classes: Iterable[str]) -> ImageSet:
    """The set, with val cut from train where there is none."""
    tree, titles = Tree(root), tuple(classes)
    made = {}
    for split, rows in splits.items():
        missing = next((path for path, _ in rows if not tree.holds(path)), None)
        if missing is not None:
            raise UserError(f"{tree.where(missing)} is not there, though the {split} list of {name} names it")
        labels = np.array([label for _, label in rows], np.int64)
        if labels.size and not 0 <= labels.min() <= labels.max() < len(titles):
            raise UserError(f"the {split} list of {root} has a class outside of 1 to {len(titles)}")
        made[split] = ImageSplit(FileImages(tree, [path for path, _ in rows]), labels)
    if "val" not in made:
        made |= tenth(made["train"])
    return ImageSet(name, "multi-class", titles, made)
