"""The files of a folder or of a zip, by their paths within it."""

import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..fingerprint import file_digests
from ..unpacking import MOST_PICTURE

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


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
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
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

    def files(self) -> list[str]:
        """Paths of all files, sorted; without those that are hidden or in hidden folders."""
        if self.zipped:
            return sorted(
                n for n in self._files if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))
            )
        found = []
        for place, folders, names in os.walk(self.root):
            folders[:] = [f for f in folders if not f.startswith(".")]
            at = Path(place).relative_to(self.root).as_posix() + "/" if place != str(self.root) else ""
            found += [at + name for name in names if not name.startswith(".")]
        return sorted(found)

    def holds(self, name: str) -> bool:
        return name in self._files if self.zipped else (self.root / name).is_file()

    def where(self, name: str) -> str:
        """What a message calls a file."""
        return str(self.root / name)

    def stamp(self, name: str) -> int:
        """A number that changes with the content: a zip's CRC, a file's size in bytes."""
        return self._files[name].CRC if self.zipped else (self.root / name).stat().st_size

    def digests(self, names: Sequence[str]) -> list[str]:
        """What changes with each file's content: its SHA-256; in a zip its CRC-32, which reading checks, and size."""
        if self.zipped:
            infos = [self._files[name] for name in names]
            return [f"crc32:{info.CRC:08x}:{info.file_size}" for info in infos]
        return file_digests([self.root / name for name in names], f"hashing {self.root.name}")

    def read(self, name: str) -> bytes:
        """
        Raises:
            UserError: if the file is not there, or its part of the zip is damaged.
        """
        if self.zipped and name in self._files and self._files[name].file_size > MOST_PICTURE:
            size = self._files[name].file_size / 2**20
            raise UserError(
                f"{self.where(name)} unpacks to {size:.0f} MiB: a picture has at most {MOST_PICTURE >> 20} MiB"
            )
        try:
            return self._archive().read(name) if self.zipped else (self.root / name).read_bytes()
        except (OSError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(f"{self.where(name)} cannot be read: {reason}") from None
