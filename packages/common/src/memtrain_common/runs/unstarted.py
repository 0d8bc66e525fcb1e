"""Run folders that a command made and then did not train in: it refused something that it could not know before."""

from pathlib import Path

from .lock import LOCK, release

OWN = frozenset({"config.json", "log.txt", LOCK})
"""Files of a run that has not taken a step."""

_made: dict[Path, bool] = {}


def note(folder: Path, *, new: bool) -> None:
    """Remember a run's folder that this process has made, or found empty (not ``new``)."""
    _made[folder.resolve()] = new


def remove_unstarted() -> None:
    """Empty those that hold nothing but how the run was asked for, and remove the new ones: their names are free."""
    for folder, new in _made.items():
        if folder.is_dir() and {p.name for p in folder.iterdir()} <= OWN:
            for file in folder.iterdir():
                file.unlink()
            release(folder)
            if new:
                folder.rmdir()
    _made.clear()
