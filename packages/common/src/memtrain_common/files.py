"""Files: written so that a kill leaves the old one or the new one, and the visible ones of a folder.

A JSON object that the project writes ends with a seal: the SHA-256 of the rest. Read again, a flipped bit and an edit
are told; who means an edit takes the seal's two lines out. An object without a seal (older, or of others) has none.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, AnyStr

from .errors import UserError

MOST_LINE = 64 << 20
"""Bytes or characters of one line of a table, JSON Lines or text with columns."""


SEAL, SEALED = "seal", "sha256_of_the_rest"
"""Two keys, so that one of them is left where the other's name is damaged."""
_MEANING = "without this line and the next one, the file is taken as it stands"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all; an object is sealed."""
    if isinstance(content, dict):
        content = sealed(content)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def check_targets(targets: Mapping[str, str], *, makes_folders: bool = False) -> None:
    """Refuse files that a command could not write at its end, before it begins. Nothing is written or made.

    Args:
        targets: a flag as it is typed ("--out") and the file that it names; "" is none.
        makes_folders: whether folders that are missing will be made.

    Raises:
        UserError: naming the flag, where it names a folder, a place without one, what may not be written, or the file
            of another flag.
    """
    seen: dict[Path, str] = {}
    for flag, name in targets.items():
        if not name:
            continue
        path = Path(name)
        real = path.resolve()
        if real in seen:
            raise UserError(f"{seen[real]} and {flag} name the same file, {name}: give each a file of its own")
        seen[real] = flag
        if path.is_dir() or name.endswith(os.sep):
            raise UserError(f"{flag} {name} is a folder: give the name of a file, as {path / 'name'}")
        if path.exists() and not path.is_file():
            raise UserError(f"{flag} {name} is no plain file: give the name of a file")
        if not makes_folders and not real.parent.exists():
            raise UserError(f"{flag} {name} has no folder to be in: make {path.absolute().parent} first")
        check_target_folder(flag, str(path.parent), named=name)
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{flag} {name} may not be written over: choose another file")


def check_target_folder(flag: str, name: str, *, named: str = "") -> None:
    """Refuse a folder that cannot be made, or not be written into.

    Args:
        flag, name: as they are typed.
        named: what the flag names, if that is a file in the folder.

    Raises:
        UserError: naming the flag.
    """
    real = Path(name).resolve()
    there = next(f for f in (real, *real.parents) if f.exists())
    if not there.is_dir():
        raise UserError(f"{flag} {named or name} lies in {there}, which is a file: choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {named or name} cannot be written, as {there} is locked: choose another place")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """An object with its seal, as its last two keys."""
    rest = {k: v for k, v in content.items() if k not in (SEAL, SEALED)}
    return {**rest, SEAL: _MEANING, SEALED: _sha256(json.loads(json.dumps(rest)))}


def _sha256(rest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def unsealed(content: Any) -> Any:
    """An object without its seal, which must hold where there is one.

    Raises:
        ValueError: if it does not hold.
    """
    if not isinstance(content, dict) or not {SEAL, SEALED} & set(content):
        return content
    rest = {k: v for k, v in content.items() if k not in (SEAL, SEALED)}
    if content.get(SEAL) != _MEANING or content.get(SEALED) != _sha256(rest):
        raise ValueError(
            "it does not have the SHA-256 that it states, so it is damaged or was edited: take out its lines "
            f"{SEAL} and {SEALED} if an edit is meant"
        )
    return rest


def read_json(path: Path, *, most_bytes: int = 64 << 20) -> Any:
    """The content of a JSON file of which nothing is known yet, without its seal.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON, larger than ``most_bytes``, nested more deeply than Python's parser goes, or not
            as its seal says.
    """
    with path.open("rb") as file:
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    return unsealed(parse_json(text))


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` with one kind of error.

    Raises:
        ValueError: if it is no JSON, or nested more deeply than Python's parser goes.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def lines_of(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of a file, one at a time, none of them longer than ``MOST_LINE``.

    Raises:
        UserError: naming the file and the line that is longer.
    """
    number = 0
    while line := file.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            raise UserError(f"{path}, line {number} is longer than {MOST_LINE >> 20} MiB: a line is one row")
        yield line


def visible_files(folder: Path) -> Iterator[Path]:
    """Files below a folder, without those that are hidden or in hidden folders (.git, .venv).

    Links to files within the folder are followed, links to folders within it are not: what they lead to is met anyway.

    Raises:
        OSError: where a folder cannot be read.
        UserError: at a link that leads out of the folder, so that nothing is read that nobody put there.
    """
    root = folder.resolve()

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in (*folders, *names):
            path = Path(place) / name
            if not name.startswith(".") and path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(f"{path} is a link that leads out of {folder}: put a copy there, or take it out")
        yield from (Path(place) / n for n in names if not n.startswith(".") and (Path(place) / n).is_file())
