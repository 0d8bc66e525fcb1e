"""Labelled images in splits: files in a folder or a zip, decoded when they are asked for, or arrays in memory.

An :class:`ImageSet` of 100,000 photographs costs their names, or, of small images, their bytes.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ...errors import UserError
from ..fingerprint import by_file_or_folder
from ..order import stratified
from .tree import Tree

SPLITS = ("train", "val", "test")
MULTI_LABEL = "multi-label, binary-class"
Pixels = NDArray[np.uint8]


class Images(Protocol):
    """A sequence of images, each (H, W, 3) bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Pixels: ...

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Images":
        """Those of the rows, in their order."""
        ...

    def join(self, other: Any) -> "Images":
        """These and then those of the same source."""
        ...

    def digests(self) -> dict[str, str]:
        """Hashes of all content, by a file's name, or "" for all of them."""
        ...

    def stamps(self) -> Iterator[bytes]:
        """Bytes by which the versions without :meth:`digests` told images from others: of files, names and sizes."""
        ...


class ArrayImages:
    """Pictures of one size in memory: bytes (N, H, W) of grey, or (N, H, W, 3).

    Raises:
        ValueError: for another shape or other numbers, whose range nothing says.
    """

    def __init__(self, array: Pixels) -> None:
        if array.dtype != np.uint8 or not (array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3)):
            raise ValueError(
                f"pictures must be uint8 (N, H, W) or (N, H, W, 3), not {array.dtype} {array.shape}: scale them so"
            )
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Pixels:
        image = self.array[i]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "ArrayImages":
        return ArrayImages(self.array[np.asarray(rows, np.int64)])

    def join(self, other: "ArrayImages") -> "ArrayImages":
        return ArrayImages(np.concatenate([self.array, other.array]))

    def digests(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for part in self.stamps():
            digest.update(part)
        return {"": digest.hexdigest()}

    def stamps(self) -> Iterator[bytes]:
        yield str(self.array.shape).encode()
        yield np.ascontiguousarray(self.array).tobytes()


class FileImages:
    """Pictures in files, by their names within a folder or a zip."""

    def __init__(self, tree: Tree, names: Sequence[str]) -> None:
        self.tree, self.names = tree, tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Pixels:
        try:
            return decode(self.tree.read(self.names[i]), self.tree.where(self.names[i]))
        except UserError as error:
            raise UserError(f"{error}; mend or remove the file") from None

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "FileImages":
        return FileImages(self.tree, [self.names[i] for i in rows])

    def join(self, other: "FileImages") -> "FileImages":
        return FileImages(self.tree, self.names + other.names)

    def digests(self) -> dict[str, str]:
        return dict(zip(self.names, self.tree.digests(self.names), strict=True))

    def stamps(self) -> Iterator[bytes]:
        for name in self.names:
            yield f"{name}\0{self.tree.stamp(name)}\0".encode()


def decode(content: bytes, where: str, *, scale: int = 1) -> Pixels:
    """A picture's file as (H, W, 3) bytes; grey of 16 bits is scaled to 8.

    Args:
        content: the file.
        where: what an error calls it.
        scale: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster and reads every byte still.

    Raises:
        UserError: if it is no picture, is cut short, or has numbers whose range is not known.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            if scale > 1:
                picture.draft("RGB", (picture.width // scale, picture.height // scale))
            if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
                return _from_16_bits(np.asarray(picture))  # which Pillow would cut off at 255
            if picture.mode in ("I", "F"):
                kind = "floating-point numbers" if picture.mode == "F" else "signed numbers or ones of 32 bits"
                raise ValueError(f"it holds {kind}, whose range nothing says; write it in 8 or 16 bits without sign")
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{where} is not a picture that can be read: {reason}") from None


def _from_16_bits(grey: NDArray[Any]) -> Pixels:
    """Grey of 0 to 65,535 (H, W) as (H, W, 3) bytes of 0 to 255."""
    eight = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.repeat(eight[..., None], 3, axis=-1)


@dataclass(frozen=True)
class ImageSplit:
    """Pictures with their labels."""

    images: Images
    labels: NDArray[np.int64]
    """(N,) classes, or (N, labels) of 0 and 1."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray[Any]) -> "ImageSplit":
        """The rows, by index or by a mask."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return ImageSplit(self.images.take(rows), self.labels[rows])

    def join(self, other: "ImageSplit") -> "ImageSplit":
        """This split and then another of the same source."""
        return ImageSplit(self.images.join(other.images), np.concatenate([self.labels, other.labels]))


@dataclass(frozen=True)
class ImageSet:
    """Pictures and labels in the splits train, val and test; val may be missing where all of it is trained on."""

    name: str
    task: str
    """MedMNIST's words: multi-class, ordinal-regression, binary-class, or multi-label, binary-class."""
    classes: tuple[str, ...]
    splits: dict[str, ImageSplit]
    size: int = 0
    """Pixels of an image's side, where all have the same; else 0."""
    file_stem: str = ""
    """MedMNIST's name of the file, of which it makes those of result files: ``breastmnist``, ``breastmnist_64``."""

    @property
    def multi_label(self) -> bool:
        return self.task == MULTI_LABEL

    @cached_property
    def sha256(self) -> str:
        """Hash of labels and images; of files their names and sizes (of a zip's its checksums)."""
        digest = hashlib.sha256()
        for name, split in sorted(self.splits.items()):
            digest.update(f"{name} {split.labels.shape}".encode())
            digest.update(np.ascontiguousarray(split.labels).tobytes())
            for part in split.images.stamps():
                digest.update(part)
        return digest.hexdigest()

    @cached_property
    def arrays_sha256(self) -> str:
        """Hash of all images and labels, of a set in memory; galore-vit's runs know their images by it."""
        digest = hashlib.sha256()
        for split in (self.splits[name] for name in SPLITS):
            assert isinstance(split.images, ArrayImages)
            for array in (split.images.array, split.labels):
                digest.update(str(array.shape).encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The set's name, its classes in the order of a model's outputs, its counts, and :attr:`sha256`."""
        counts = {name: len(self.splits[name]) for name in SPLITS if name in self.splits}
        return {"name": self.name, "task": self.task, "classes": list(self.classes), **counts, "sha256": self.sha256}

    def parts(self) -> dict[str, str]:
        """Hashes of all content of all images, and of their names, labels and order, for a run's ``data``."""
        files: dict[str, str] = {}
        lists = {}
        for name, split in self.splits.items():
            found = split.images.digests()
            files |= {part or f"{name} images": digest for part, digest in found.items()}
            order = hashlib.sha256("\0".join(found).encode("utf-8", "surrogateescape"))
            order.update(str(split.labels.shape).encode() + np.ascontiguousarray(split.labels).tobytes())
            lists[f"{name} labels"] = order.hexdigest()
        return {**by_file_or_folder(files), **lists}


def trained_on_val(found: ImageSet) -> ImageSet:
    """The set with val joined to train, and no val."""
    joined = found.splits["train"].join(found.splits["val"])
    return replace(found, splits={"train": joined, "test": found.splits["test"]})


def fold(found: ImageSet, k: int, folds: int, seed: int = 0) -> ImageSet:
    """The set with part k of train and val together, cut into ``folds`` stratified parts, as val; test stays.

    Raises:
        UserError: if there are fewer images than folds.
    """
    pool = found.splits["train"].join(found.splits["val"])
    if folds > len(pool):
        raise UserError(f"{folds} folds cannot be cut from {len(pool)} images")
    parts = stratified(pool.labels, folds, seed)
    return replace(found, splits={**found.splits, "train": pool.take(parts != k), "val": pool.take(parts == k)})


def in_memory(found: ImageSet, side: int, *, fit: bool = False) -> ImageSet:
    """The set with its files decoded once and kept as arrays.

    Args:
        side: pixels of each image's side. Arrays stay as they are.
        fit: scale the shorter side to it (bilinear) and cut the middle out, where a file has another size.

    Raises:
        UserError: naming an image that cannot be read, or, without ``fit``, one of another size.
    """
    from PIL import Image, ImageOps

    splits = {}
    for name, split in found.splits.items():
        if not isinstance(split.images, FileImages):
            return found
        array = np.empty((len(split), side, side, 3), np.uint8)
        for i in tqdm(range(len(split)), desc=f"reading {name}", leave=False, delay=1, disable=None):
            image = split.images[i]
            if image.shape[:2] != (side, side):
                if not fit:
                    what = f"{split.images.names[i]} has {image.shape[1]}×{image.shape[0]} pixels"
                    raise UserError(f"{what}, not {side}×{side}")
                way = Image.Resampling.BILINEAR
                image = np.asarray(ImageOps.fit(Image.fromarray(image), (side, side), way))
            array[i] = image
        splits[name] = ImageSplit(ArrayImages(array), split.labels)
    return replace(found, splits=splits, size=side)


def check_classes(images: ImageSet) -> None:
    """Refuse a split in which a class is absent: there the AUC is undefined, and nothing can be learnt of it.

    Raises:
        UserError: naming the class and the split.
    """
    for split, content in images.splits.items():
        labels, n = content.labels, len(content.labels)
        for c, name in enumerate(images.classes):
            column = labels[:, c] if labels.ndim == 2 else labels == c
            if not column.any() or column.all():
                what = f"label {name}" if images.multi_label else f"class {name}"
                how = "is absent from" if not column.any() else "is the only one in"
                raise UserError(
                    f"{what} of {images.name} {how} the {n} {split} images, where AUC is then undefined: give the "
                    "split more images, or leave the class out everywhere"
                )
