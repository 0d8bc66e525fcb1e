"""Checkpoints that survive a kill, a full disk and a flipped bit: safetensors and JSON, never a pickle.

One folder a step, ``checkpoints/step-00001000/``::

    model.safetensors     the model's tensors, by name
    training.safetensors  every other tensor: optimizer, random generators, …
    state.json            the rest of the state, and where each tensor belongs
    manifest.json         SHA-256 and size of each file above; written last

A folder is written beside its final place, every file fsynced, then renamed: it is whole or it is not there. Loading
takes the newest folder whose manifest and hashes hold, and says which ones it passed over and why.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import UserError
from .state_tree import decode, encode

MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: where they lie.
        keep: how many of the newest stay; the best one stays besides. At least 2, so that a damaged newest one
            leaves another.
        writes: False on all but one of several processes: those only take part in gathering sharded tensors.
    """

    folder: Path
    keep: int = 2
    writes: bool = True

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise ValueError(f"keep must be at least 2, so that a damaged checkpoint leaves another; got {self.keep}")

    def steps(self) -> list[int]:
        """Steps that have a folder, oldest first; nothing is verified."""
        found = (_STEP.fullmatch(p.name) for p in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any], *, best: int | None = None) -> Path:
        """Write the state of ``step``, then remove what retention no longer keeps.

        Args:
            step: optimizer steps done.
            state: nested dicts of tensors and plain values; its key "model" is the model's ``state_dict``.
            best: the step that must stay besides the newest ones.

        Raises:
            UserError: where the disk is full; what was there before is untouched.
        """
        tree, tensors = encode(state)  # collective where tensors are sharded: every process takes part
        final = self.path(step)
        if not self.writes:
            return final
        partial = self.folder / f".partial-{final.name}"
        self.clean()
        try:
            partial.mkdir(parents=True)
            inside = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
            others = {name: t for name, t in tensors.items() if not name.startswith("model.")}
            save_file(inside, partial / MODEL)
            save_file(others, partial / TRAINING)
            (partial / STATE).write_text(json.dumps(tree))
            files = {n: _fingerprint(partial / n) for n in (MODEL, TRAINING, STATE)}
            (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n")
            for name in (*files, MANIFEST):
                _fsync(partial / name)
            _fsync(partial)
            if final.exists():  # a damaged one that was passed over, or the same step again after a resume
                os.replace(final, self.folder / f".replaced-{final.name}")
            os.replace(partial, final)
            _fsync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"could not save the checkpoint of step {step} in {self.folder} ({_reason(error)}): earlier "
                "checkpoints are intact; free some space and resume"
            ) from error
        self.clean()
        until_now = [s for s in self.steps() if s <= step]  # later ones were damaged, and the run went back past them
        kept = {*until_now[-self.keep :], best}
        for old in self.steps():
            if old not in kept:
                shutil.rmtree(self.path(old))
        return final

    def rescue(self, step: int, state: dict[str, Any], *, best: int | None, every: int) -> Path | None:
        """Save a state that each of several processes could save, once: -> the folder, or None if another did.

        Args:
            every: processes whose steps lie between the same multiples of it have the same to save.
        """
        claim = self.folder / f".rescue-{step // every}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            claim.touch(exist_ok=False)
        except FileExistsError:
            return None
        try:
            return replace(self, writes=True).save(step, state, best=best)
        finally:
            claim.unlink(missing_ok=True)

    def clean(self) -> None:
        """Put the folder in order after a process was killed in the middle of :meth:`save`."""
        for replaced in self.folder.glob(".replaced-*"):
            final = self.folder / replaced.name.removeprefix(".replaced-")
            if final.exists():
                shutil.rmtree(replaced)
            else:  # killed between the two renames
                os.replace(replaced, final)
        for partial in self.folder.glob(".partial-*"):
            shutil.rmtree(partial)

    def load_newest(self, say: Callable[[str], None] = print) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that verifies: (step, state), or None where there is none.

        Args:
            say: told, a line each, which checkpoints were passed over and why.
        """
        if self.writes:
            self.clean()
        for step in reversed(self.steps()):
            path = self.path(step)
            wrong = verify(path)
            if wrong is None:
                return step, load(path)
            say(f"passed over checkpoint {path}: {wrong}")
        return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if every file has the hash that was recorded."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name in (MODEL, TRAINING, STATE):
            found = _fingerprint(path / name)
            if found["bytes"] != files[name]["bytes"]:
                return f"{name} has {found['bytes']} bytes, not the {files[name]['bytes']} that were written"
            if found["sha256"] != files[name]["sha256"]:
                return f"{name} does not have the SHA-256 that was recorded when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint folder, on the CPU. :func:`verify` it first."""
    tensors = load_file(path / TRAINING)
    tensors.update({f"model.{name}": t for name, t in load_file(path / MODEL).items()})
    return decode(json.loads((path / STATE).read_text()), tensors)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).replace("\n", " ")
