"""CIFAR-10 and CIFAR-100 in their binary form, or CIFAR-10 as folders of pictures.

A record is the label (CIFAR-100: coarse, then fine), one byte each, then 3072 bytes: red, green and blue of 32×32
pixels. The python version of the archives is a pickle, which runs what is in it, so it is never read.
"""

import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import UserError
from .folders import picture_folder, tenth
from .image_set import ArrayImages, ImageSet, ImageSplit, in_memory

SIDE = 32
# set: (label bytes, train files, test file, file of class names, classes)
_BINARY = {
    "cifar10": (1, tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", 10),
    "cifar100": (2, ("train.bin",), "test.bin", "fine_label_names.txt", 100),
}


def read_cifar(name: str, data_dir: Path, say: Callable[[str], None] = print) -> ImageSet:
    """The set, with a tenth of train as val.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: the folder of binary files, one around it, the binary archive itself, or one with the archive in
            it; or pictures as ``train/CLASS/*.png`` in a folder or zip.
        say: told which files of such a folder were left out.

    Raises:
        UserError: naming what is missing or damaged.
    """
    _, train, test, meta, classes = _BINARY[name]
    archive = next(iter([data_dir] if data_dir.is_file() else sorted(data_dir.glob("*binary.tar.gz"))), None)
    if archive is not None and archive.name.endswith((".tar.gz", ".tgz", ".tar")):
        members = _members(archive, {*train, test, meta})
        if train[0] not in members:
            raise UserError(f"{archive} holds no {train[0]}: the binary version is needed, and no other is read")
        return _from_binary(name, members.get, str(archive))
    for folder in (data_dir, data_dir / "cifar-10-batches-bin", data_dir / "cifar-100-binary"):
        if (folder / train[0]).is_file():
            return _from_binary(name, partial(_read, folder), str(folder))
    zips = sorted(data_dir.glob("*.zip"))
    if data_dir.is_file() or (data_dir / "train").is_dir() or len(zips) == 1:
        found = picture_folder(data_dir if data_dir.is_file() or not zips else zips[0], say)
        if len(found.classes) != classes:
            raise UserError(f"{data_dir} has {len(found.classes)} classes of pictures, and {name} has {classes}")
        return in_memory(replace(found, name=name), SIDE)
    pickled = any(data_dir.glob("cifar-10*-python*")) or (data_dir / "cifar-10-batches-py").is_dir()
    why = "; the python version is a pickle, which may run anything when it is read, so it is not" if pickled else ""
    raise UserError(
        f"{data_dir} holds no {train[0]}: {name} needs its binary version (cifar-{classes}-binary.tar.gz) or folders "
        f"of pictures{why}"
    )


def _read(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if (folder / name).is_file() else None


def _members(archive: Path, wanted: set[str]) -> dict[str, bytes]:
    try:
        with tarfile.open(archive) as tar:
            files = {m.name.rpartition("/")[2]: m for m in tar.getmembers() if m.isfile()}
            return {n: tar.extractfile(files[n]).read() for n in wanted & files.keys()}  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{archive} is damaged or no tar archive: {error}") from None


def _from_binary(name: str, read: Callable[[str], bytes | None], where: str) -> ImageSet:
    label_bytes, train, test, meta, count = _BINARY[name]
    names = (read(meta) or b"").decode("utf-8", "replace").split()
    classes = tuple(names) if len(names) == count else tuple(map(str, range(count)))
    splits = {}
    for split, files in (("train", train), ("test", (test,))):
        parts = []
        for file in files:
            content = read(file)
            if content is None:
                raise UserError(f"{where} has no {file}")
            record = label_bytes + 3 * SIDE * SIDE
            if not content or len(content) % record:
                raise UserError(f"{where}/{file} has {len(content)} bytes, which are not records of {record}")
            parts.append(np.frombuffer(content, np.uint8).reshape(-1, record))
        table = np.concatenate(parts)
        labels = table[:, label_bytes - 1].astype(np.int64)  # the fine label stands last
        if labels.max() >= count:
            raise UserError(f"{where} has the label {labels.max()}, and {name} has labels 0 to {count - 1}")
        images = table[:, label_bytes:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        splits[split] = ImageSplit(ArrayImages(np.ascontiguousarray(images)), labels)
    return ImageSet(name, "multi-class", classes, {**splits, **tenth(splits["train"])}, SIDE)
