"""Pictures that are decoded when they are asked for: files in a folder, files in a zip, or arrays in memory.

A :class:`PictureSet` of 100,000 photographs costs their names;
:class:`memtrain_common.data.images.images.ImageSet` holds small pictures of one size as arrays.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ...errors import UserError
from .medmnist import SPLITS

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
MULTI_LABEL = "multi-label, binary-class"
Bad = Literal["refuse", "skip", "unchecked"]
Pixels = NDArray[np.uint8]


class Pictures(Protocol):
    """A sequence of pictures, each (H, W, 3) bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Pixels: ...

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Pictures":
        """Those of the rows, in their order."""
        ...

    def join(self, other: Any) -> "Pictures":
        """These and then those of the same source."""
        ...

    def fingerprint(self) -> Iterator[bytes]:
        """Bytes that differ where the pictures do."""
        ...


class ArrayPictures:
    """Pictures of one size in memory: (N, H, W) grey or (N, H, W, 3)."""

    def __init__(self, images: Pixels) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Pixels:
        image = self.images[i]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "ArrayPictures":
        return ArrayPictures(self.images[np.asarray(rows, np.int64)])

    def join(self, other: "ArrayPictures") -> "ArrayPictures":
        return ArrayPictures(np.concatenate([self.images, other.images]))

    def fingerprint(self) -> Iterator[bytes]:
        yield str(self.images.shape).encode()
        yield np.ascontiguousarray(self.images).tobytes()


class FilePictures:
    """Pictures in files, by their names within a folder or a zip."""

    def __init__(self, tree: "Tree", names: Sequence[str]) -> None:
        self.tree, self.names = tree, tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Pixels:
        return decode(self.tree.read(self.names[i]), self.tree.where(self.names[i]))

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "FilePictures":
        return FilePictures(self.tree, [self.names[i] for i in rows])

    def join(self, other: "FilePictures") -> "FilePictures":
        return FilePictures(self.tree, self.names + other.names)

    def fingerprint(self) -> Iterator[bytes]:
        for name in self.names:
            yield f"{name}\0{self.tree.stamp(name)}\0".encode()


def decode(content: bytes, where: str, *, scale: int = 1) -> Pixels:
    """A picture's file as (H, W, 3) bytes.

    Args:
        content: the file.
        where: what an error calls it.
        scale: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster and reads every byte still.

    Raises:
        UserError: if it is no picture, or is cut short.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            if scale > 1:
                picture.draft("RGB", (picture.width // scale, picture.height // scale))
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{where} is not a picture that can be read: {reason}") from None


class Tree:
    """The files of a folder, or of a zip, by their paths within it ("train/cat/1.png")."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.zipped = root.is_file()
        self._archives: dict[int, zipfile.ZipFile] = {}
        if self.zipped:
            infos = self._archive().infolist()
            names = [i.filename.rstrip("/") for i in infos if "__MACOSX" not in i.filename]
            self._files = {i.filename: i for i in infos if not i.is_dir()}
            parents = {"/".join(n.split("/")[:k]) for n in names for k in range(1, n.count("/") + 1)}
            self._folders = parents | {n for n in names if n not in self._files}
            self._inside: dict[str, list[str]] = {}  # a folder -> the files in it
            for name in self._files:
                self._inside.setdefault(name.rpartition("/")[0], []).append(name)
        elif not root.is_dir():
            raise UserError(f"{root} is not a folder or a zip: --data-dir must name one of pictures")

    def _archive(self) -> zipfile.ZipFile:
        """The zip, opened once a process: a worker that was forked shares no file position with the others."""
        pid = os.getpid()
        if pid not in self._archives:
            try:
                self._archives[pid] = zipfile.ZipFile(self.root)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{self.root} is damaged or no zip: {error}") from None
        return self._archives[pid]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archives": {}}  # of another process

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders in a folder, sorted."""
        if not self.zipped:
            return sorted(p.name for p in (self.root / prefix).iterdir() if p.is_dir() and not p.name.startswith("."))
        start = f"{prefix}/" if prefix else ""
        inside = (n[len(start) :] for n in self._folders if n.startswith(start))
        return sorted(n for n in inside if n and "/" not in n and not n.startswith((".", "__MACOSX")))

    def pictures(self, prefix: str) -> list[str]:
        """Paths of the pictures in a folder, sorted; not of those in its folders."""
        if self.zipped:
            names: Iterable[str] = self._inside.get(prefix, ())
        else:
            names = (f"{prefix}/{p.name}" for p in (self.root / prefix).iterdir() if p.is_file())
        return sorted(n for n in names if n.lower().endswith(PICTURES) and not n.rpartition("/")[2].startswith("."))

    def holds(self, name: str) -> bool:
        return name in self._files if self.zipped else (self.root / name).is_file()

    def where(self, name: str) -> str:
        """What a message calls a file."""
        return str(self.root / name)

    def stamp(self, name: str) -> int:
        """A number that changes with the content: a zip's CRC, a file's size in bytes."""
        return self._files[name].CRC if self.zipped else (self.root / name).stat().st_size

    def read(self, name: str) -> bytes:
        """
        Raises:
            UserError: if the file is not there, or its part of the zip is damaged.
        """
        try:
            return self._archive().read(name) if self.zipped else (self.root / name).read_bytes()
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(f"{self.where(name)} cannot be read: {reason}") from None


@dataclass(frozen=True)
class PictureSplit:
    """Pictures with their labels."""

    pictures: Pictures
    labels: NDArray[np.int64]
    """(N,) classes, or (N, labels) of 0 and 1."""

    def __len__(self) -> int:
        return len(self.pictures)

    def take(self, rows: NDArray[Any]) -> "PictureSplit":
        """The rows, by index or by a mask."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return PictureSplit(self.pictures.take(rows), self.labels[rows])


@dataclass(frozen=True)
class PictureSet:
    """Pictures and labels in the splits train, val and test; val may be missing where all of it is trained on."""

    name: str
    task: str
    """MedMNIST's words: multi-class, ordinal-regression, binary-class, or multi-label, binary-class."""
    classes: tuple[str, ...]
    splits: dict[str, PictureSplit]
    size: int = 0
    """Pixels of a picture's side, where all have the same; else 0."""

    @property
    def multi_label(self) -> bool:
        return self.task == MULTI_LABEL

    @cached_property
    def sha256(self) -> str:
        """Hash of labels and pictures; of files their names and sizes (of a zip's its checksums)."""
        digest = hashlib.sha256()
        for name, split in sorted(self.splits.items()):
            digest.update(f"{name} {split.labels.shape}".encode())
            digest.update(np.ascontiguousarray(split.labels).tobytes())
            for part in split.pictures.fingerprint():
                digest.update(part)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        counts = {name: len(self.splits[name]) for name in SPLITS if name in self.splits}
        return {"name": self.name, "task": self.task, "classes": len(self.classes), **counts, "sha256": self.sha256}


def without_damaged(found: PictureSet, bad: Bad, say: Callable[[str], None] = print) -> PictureSet:
    """The set after every picture was decoded once (JPEGs at an eighth of their size), on all cores.

    Args:
        found: only files are looked at.
        bad: "refuse" damaged ones, "skip" them, or leave all "unchecked" until they are used.
        say: told how many were left out, and which is the first.

    Raises:
        UserError: naming the first damaged picture and how many there are.
    """
    if bad == "unchecked":
        return found
    splits, complaints = dict(found.splits), []
    for name, split in found.splits.items():
        if not isinstance(split.pictures, FilePictures):
            continue
        reasons = damaged(split.pictures, f"checking {name}")
        complaints += [r for r in reasons if r]
        splits[name] = split.take(np.array([r is None for r in reasons]))
    if not complaints:
        return found
    if bad == "refuse":
        more = f" ({len(complaints)} such files)" if len(complaints) > 1 else ""
        raise UserError(f"{complaints[0]}{more}; mend or remove what is damaged, or leave it out by --bad-images skip")
    say(f"left out {len(complaints)} damaged picture{'s' * (len(complaints) > 1)}: {'; '.join(complaints[:20])}")
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"no picture of {found.name}'s {name} can be read")
    return replace(found, splits=splits)


def damaged(pictures: FilePictures, label: str) -> list[str | None]:
    """For each picture None, or what is wrong with it."""

    def look(name: str) -> str | None:
        try:
            decode(pictures.tree.read(name), pictures.tree.where(name), scale=8)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(look, pictures.names)
        return list(tqdm(results, desc=label, total=len(pictures), leave=False, delay=1, disable=None))
