"""Files: written so that a kill leaves the old one or the new one, and the visible ones of a folder."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


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
