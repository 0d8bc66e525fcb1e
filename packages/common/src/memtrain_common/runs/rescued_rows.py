"""What only one process can vouch for when another is lost: its own rows of a model's tensors, beside the checkpoint.

One process saves the checkpoint. It has its own rows of what is spread over processes, and the others can no longer
send it theirs. So each survivor writes its rows beside the checkpoints, two files a process::

    rows-00000012-3.safetensors   the rows, by the tensors' names in the model
    rows-00000012-3.json          where each begins, the bytes and SHA-256 of the file above; written last

The number after ``rows-`` is a mark: rows belong to the checkpoint whose manifest has the same one. They are put into
its model when it is loaded, and removed when no checkpoint has their mark any more.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import read_json, write_json

_NAME = re.compile(r"rows-(\d{8,})-(\d+)\.(json|safetensors)(\.partial)?")


@dataclass(frozen=True)
class Rows:
    mark: int
    """Equal on processes whose rows belong to one checkpoint, as the number of merges; never below 0."""
    rows: dict[str, tuple[int, Tensor]]
    """Name in the model -> (first row, this process's rows)."""


def write_rows(folder: Path, rank: int, own: Rows) -> str:
    """Write a process's rows: -> why it could not be done, or "". The JSON is last: without it they are not there."""
    path = folder / f"rows-{own.mark:08d}-{rank}.safetensors"
    partial = path.with_name(path.name + ".partial")
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a run folder that is gone is not made again
        path.with_suffix(".json").unlink(missing_ok=True)  # of an earlier loss at the same mark
        save_file({name: t.detach().cpu().contiguous() for name, (_, t) in own.rows.items()}, partial)
        os.replace(partial, path)
        first = {name: n for name, (n, _) in own.rows.items()}
        write_json(path.with_suffix(".json"), {"mark": own.mark, "first_rows": first, **_fingerprint(path)})
    except (OSError, SafetensorError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def put_rows(folder: Path, mark: int, model: dict[str, Tensor], say: Callable[[str], None]) -> None:
    """Put every process's rows of a mark into a model's tensors; damaged ones are passed over, and told."""
    for note in sorted(folder.glob(f"rows-{mark:08d}-*.json")):
        path = note.with_suffix(".safetensors")
        try:
            stated = read_json(note)
            if _fingerprint(path) != {k: stated[k] for k in ("bytes", "sha256")}:
                raise ValueError("it does not have the SHA-256 that was recorded when it was written")
            found = load_file(path)
            if any(
                first < 0 or model[name][first : first + len(found[name])].shape != found[name].shape
                for name, first in stated["first_rows"].items()
            ):
                raise ValueError("its rows are of another model")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            say(f"passed over {path}, what one process was owed: {error}")
            continue
        for name, first in stated["first_rows"].items():
            model[name][first : first + len(found[name])] = found[name]


def clean_rows(folder: Path, marks: Collection[int]) -> None:
    """Remove rows of other marks."""
    for path in folder.glob("rows-*"):
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) not in marks:
            with contextlib.suppress(OSError):
                path.unlink()


def _fingerprint(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
