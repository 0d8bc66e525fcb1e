"""Folders that a user names: looking through them, and taking one for a single process."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

LOCK = ".lock"
_held: dict[Path, Any] = {}  # locks live as long as the process


def visible_files(folder: Path) -> Iterator[Path]:
    """Files below a folder, without those that are hidden or in hidden folders (.git, .venv).

    Raises:
        OSError: where a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (Path(place) / n for n in names if not n.startswith(".") and (Path(place) / n).is_file())


def lock_folder(path: Path) -> None:
    """Take the folder for this process, which may take it again.

    Raises:
        UserError: if another process has it. Where the file system knows no locks, nobody is refused.
    """
    if path.resolve() in _held:
        return
    file = (path / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path} is in use by another process: wait for it, or choose another folder") from None
    except OSError:
        pass
    _held[path.resolve()] = file
