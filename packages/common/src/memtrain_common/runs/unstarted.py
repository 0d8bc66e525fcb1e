"""Run folders that a command made and then did not train in: it refused something that it could not know before."""

import contextlib
from pathlib import Path

from .lock import LOCK, release
from .trackers import KNOWN_AS

OWN = frozenset({"config.json", "log.txt", KNOWN_AS, LOCK})
"""Files of a run that has not taken a step."""

_made: dict[Path, tuple[Path, ...]] = {}


def missing(folder: Path) -> tuple[Path, ...]:
    """The folder and those around it that are not there, innermost first."""
    folder = folder.absolute()
    return tuple(p for p in (folder, *folder.parents) if not p.exists())


def note(folder: Path, new: tuple[Path, ...]) -> None:
    """Remember a run's folder, and which ones were made for it."""
    _made[folder.absolute()] = new


def remove_unstarted() -> None:
    """Empty those that hold nothing but how the run was asked for, and remove what was made: their names are free."""
    for folder, new in _made.items():
        if folder.is_dir() and {p.name for p in folder.iterdir()} <= OWN:
            for file in folder.iterdir():
                file.unlink()
            release(folder)
            with contextlib.suppress(OSError):  # something else lies there by now
                for made in new:
                    made.rmdir()
    _made.clear()
