"""Labelled pictures in folders named for their classes, on disk or in a zip."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..order import stratified
from ..splits import SPLIT_WORDS
from .image_set import SPLITS, FileImages, ImageSet, ImageSplit
from .tree import PICTURES, Tree


def picture_folder(path: Path, say: Callable[[str], None] = print) -> ImageSet:
    """``path/train/CLASS/*.png``, likewise val and test; or ``path/CLASS/*.png``, cut 8 : 1 : 1.

    A split may have another usual name (valid, validation or dev for val). Where there is train and test but no val, a
    tenth of train validates. In a zip the same; folders around the whole are passed over.

    Args:
        say: told how many files were left out, and which.

    Raises:
        UserError: if the folders are not so, naming which.
    """
    tree = Tree(path)
    top = ""
    while len(inside := tree.folders(top)) == 1 and inside[0] not in SPLITS:
        top = f"{top}/{inside[0]}" if top else inside[0]
    at = f"{top}/" if top else ""
    roots = {split: at + name for split, name in _named_splits(inside, path).items()}
    if not roots:
        roots = {"all": top}
    elif not {"train", "test"} <= roots.keys():
        raise UserError(f"{path} has {' and '.join(roots)}, and needs train and test (val may be cut from train)")
    names = {split: tree.folders(root) for split, root in roots.items()}
    classes = next(iter(names.values()))
    for split, found in names.items():
        if found != classes:
            other = sorted(set(found) ^ set(classes))
            raise UserError(
                f"{tree.where(roots[split])} and {tree.where(next(iter(roots.values())))} differ in the class "
                f"{other[0]!r}"
            )
    if len(classes) < 2:
        raise UserError(f"{path} has no two folders of pictures side by side, and there must be one for each class")
    splits = {split: _split(tree, root, classes) for split, root in roots.items()}
    _say_left_out(tree, splits, [f"{root}/{name}/".lstrip("/") for root in roots.values() for name in classes], say)
    if "all" in splits:
        parts = stratified(splits["all"].labels, 10, seed=0)
        whole = splits["all"]
        splits = {"train": whole.take(parts > 1), "val": whole.take(parts == 0), "test": whole.take(parts == 1)}
    elif "val" not in splits:
        splits |= tenth(splits["train"])
    if empty := next((name for name, split in splits.items() if not len(split)), None):
        raise UserError(f"{path} has too few pictures for {empty}: give ten a class, or folders train, val, test")
    untrained = sorted(set(range(len(classes))) - set(splits["train"].labels.tolist()))
    if untrained:
        raise UserError(
            f"{path} has too few pictures of {classes[untrained[0]]!r}, of which none is left for train: give ten a "
            "class, or folders train, val, test"
        )
    task = "binary-class" if len(classes) == 2 else "multi-class"
    return ImageSet(path.resolve().name.removesuffix(".zip"), task, tuple(classes), splits)


def _say_left_out(tree: Tree, splits: dict[str, ImageSplit], places: list[str], say: Callable[[str], None]) -> None:
    """Name the pictures that lie elsewhere than in a class's own folder, and what else lies in or below those."""
    read = {name for split in splits.values() for name in split.images.names}  # type: ignore[attr-defined]
    inside = tuple(places)
    others = [n for n in tree.files() if n not in read and (n.startswith(inside) or n.lower().endswith(PICTURES))]
    if others:
        which = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        say(
            f"left out {len(others):,} file{'s' * (len(others) > 1)} of {tree.root.name}: {which}; "
            f"pictures are read in a class's own folder, with the endings {', '.join(PICTURES)}"
        )


def _named_splits(inside: list[str], path: Path) -> dict[str, str]:
    """The folders that are splits: train, val and test, and others of a usual name where train and test are there; else
    they may be classes."""
    found = {split: split for split in SPLITS if split in inside}
    usual = {split: [n for n in inside if SPLIT_WORDS.get(n.lower()) == split] for split in SPLITS}
    for split, names in usual.items() if usual["train"] and usual["test"] else ():
        if split not in found and len(names) > 1:
            raise UserError(f"{path} has {' and '.join(names)}, which mean the same split: leave one of them")
        if names:
            found.setdefault(split, names[0])
    return found


def tenth(train: ImageSplit) -> dict[str, ImageSplit]:
    """A tenth of every class of train as val, the rest as train; the same for every seed."""
    parts = stratified(train.labels, 10, seed=0)
    return {"train": train.take(parts > 0), "val": train.take(parts == 0)}


def _split(tree: Tree, root: str, classes: list[str]) -> ImageSplit:
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        place = f"{root}/{name}" if root else name
        found = tree.pictures(place)
        if not found:
            raise UserError(f"{tree.where(place)} holds no picture ({', '.join(PICTURES)})")
        names += found
        labels += [label] * len(found)
    return ImageSplit(FileImages(tree, names), np.array(labels, np.int64))
