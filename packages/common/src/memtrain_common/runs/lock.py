"""Taking a folder for one process."""

import fcntl
from pathlib import Path
from typing import Any

from ..errors import UserError

LOCK = ".lock"
_held: dict[Path, Any] = {}  # locks live as long as the process


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


def release(path: Path) -> None:
    """Give a folder back."""
    held = _held.pop(path.resolve(), None)
    if held is not None:
        held.close()
