"""Files: written so that a kill leaves the old one or the new one, and the visible ones of a folder."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

from .errors import UserError

MOST_LINE = 64 << 20
"""Bytes or characters of one line of a table, JSON Lines or text with columns."""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: Path, *, most_bytes: int = 64 << 20) -> Any:
    """The content of a JSON file of which nothing is known yet.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON, larger than ``most_bytes``, or nested more deeply than Python's parser goes.
    """
    with path.open("rb") as file:
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    return parse_json(text)


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
