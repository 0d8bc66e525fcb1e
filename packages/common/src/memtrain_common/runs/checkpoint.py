"""Checkpoints that survive a kill, a full disk and a flipped bit: safetensors and JSON, never a pickle.

One folder a step, ``checkpoints/step-00001000/``::

    model.safetensors     the model's tensors, by name
    training.safetensors  every other tensor: optimizer, random generators, …
    state.json            the rest of the state, and where each tensor belongs
    manifest.json         format, step, SHA-256 and size of each file above, and its own SHA-256; written last

A folder is written beside its final place, every file fsynced, then renamed: it is whole or it is not there. Loading
takes the newest folder whose manifest and hashes hold, and says which ones it passed over and why. A folder of a newer
format than ``FORMAT`` is refused by name. What lies among the checkpoints and is none (a file, a link to nothing, a
folder that cannot be read) is left where it is: it ends no save. After a lost process there may be rows of the others
beside them (:mod:`memtrain_common.runs.rescued_rows`).
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import UserError
from ..files import read_json
from .rescued_rows import clean_rows, put_rows
from .state_tree import decode, encode

MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"
FORMAT = 1
"""Of the folder. A manifest without a format is of before there was one, and reads as this one."""
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
        found = (_STEP.fullmatch(p.name) for p in self.folder.glob("step-*") if os.path.isdir(p))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any], *, best: int | None = None, mark: int | None = None) -> Path:
        """Write the state of ``step``, then remove what retention no longer keeps.

        Args:
            step: optimizer steps done.
            state: nested dicts of tensors and plain values; its key "model" is the model's ``state_dict``.
            best: the step that must stay besides the newest ones.
            mark: of the rows of other processes that belong to it; None: it is whole.

        Raises:
            UserError: where the disk is full or the run folder is gone; what was there before is untouched.
        """
        tree, tensors = encode(state)  # collective where tensors are sharded: every process takes part
        final = self.path(step)
        if not self.writes:
            return final
        self.clean()
        partial = self._unused(f".partial-{final.name}")
        try:
            self.folder.mkdir(exist_ok=True)  # not its parents: a run folder that is gone is not made again
            partial.mkdir()
            inside = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
            others = {name: t for name, t in tensors.items() if not name.startswith("model.")}
            save_file(inside, partial / MODEL)
            save_file(others, partial / TRAINING)
            (partial / STATE).write_text(json.dumps(tree))
            files = {n: _fingerprint(partial / n) for n in (MODEL, TRAINING, STATE)}
            manifest = {"format": FORMAT, "step": step, "files": files}
            if mark is not None:
                manifest["mark"] = mark
            manifest["sha256"] = _own_hash(manifest)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            for name in (*files, MANIFEST):
                _fsync(partial / name)
            _fsync(partial)
            if os.path.lexists(final):  # a damaged one that was passed over, or the same step again after a resume
                os.replace(final, self._unused(f".replaced-{final.name}"))
            os.replace(partial, final)
            _fsync(self.folder)
        except (OSError, SafetensorError) as error:
            _remove(partial)
            if not self.folder.parent.exists():
                raise UserError(
                    f"could not save the checkpoint of step {step}: the run folder {self.folder.parent} was removed or "
                    "renamed while the run trained"
                ) from None
            raise UserError(
                f"could not save the checkpoint of step {step} in {self.folder} ({_reason(error)}): earlier "
                "checkpoints are intact; free some space and resume"
            ) from error
        self.clean()
        until_now = [s for s in self.steps() if s <= step]  # later ones were damaged, and the run went back past them
        kept = {*until_now[-self.keep :], best}
        for old in self.steps():
            if old not in kept:
                _remove(self.path(old))
        clean_rows(self.folder, {m for m in map(_mark, map(self.path, self.steps())) if m is not None})
        return final

    def rescue(
        self, step: int, state: dict[str, Any], *, best: int | None, every: int, since: int = 0, mark: int | None = None
    ) -> Path | None:
        """Save a state that each of several processes could save, once: -> the folder, or None if another did.

        Args:
            every, since: processes whose steps lie between the same multiples of ``every``, counted from ``since``,
                have the same to save.
            mark: as :meth:`save` takes it.
        """
        with self._claimed(f".rescue-{(step - since) // every}") as free:
            return replace(self, writes=True).save(step, state, best=best, mark=mark) if free else None

    @contextlib.contextmanager
    def _claimed(self, name: str) -> Iterator[bool]:
        """Whether this process is the one that has the claim of this name. What a killed process left of a claim is
        none: the lock on the file ended with its process. Where the file system knows no locks, the file is the claim.
        """
        claim, handle, free = self.folder / name, None, True
        with contextlib.suppress(OSError):  # what fails here fails in the saving too, which says why
            self.folder.mkdir(exist_ok=True)
            if os.path.isdir(claim):
                _remove(claim)
            new = not os.path.lexists(claim)
            handle = os.open(claim, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError:
                free = new
        try:
            yield free
        finally:
            if handle is not None:
                if free:
                    claim.unlink(missing_ok=True)
                os.close(handle)

    def _unused(self, name: str) -> Path:
        """A path of this name, or with a number behind it where something lies there that could not be removed."""
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        return next(self.folder / n for n in names if not os.path.lexists(self.folder / n))

    def clean(self) -> None:
        """Put the folder in order after a process was killed in the middle of :meth:`save`."""
        for replaced in self.folder.glob(".replaced-*"):
            named = _STEP.match(replaced.name.removeprefix(".replaced-"))
            final = self.folder / (named[0] if named else "")
            if os.path.lexists(final):
                _remove(replaced)
            else:  # killed between the two renames
                with contextlib.suppress(OSError):
                    os.replace(replaced, final)
        for partial in self.folder.glob(".partial-*"):
            _remove(partial)

    def load_newest(self, say: Callable[[str], None] = print) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that verifies: (step, state), or None where there is none.

        Args:
            say: told, a line each, which checkpoints were passed over and why.

        Raises:
            UserError: at one of a newer format: an older one would go back behind it in silence.
        """
        if self.writes:
            self.clean()
            for claim in self.folder.glob(".rescue-*"):  # of a process that was killed
                _remove(claim)
        for step in reversed(self.steps()):
            path = self.path(step)
            wrong = verify(path)
            if wrong is None:
                try:
                    return step, load(path, say)
                except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError):
                    wrong = f"{STATE} or its tensors are not a checkpoint's"
            if wrong.startswith(_NEWER):
                raise UserError(f"{path} {wrong}")
            say(f"passed over checkpoint {path}: {wrong}")
        return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if every file has the hash that was recorded."""
    try:
        manifest = read_json(path / MANIFEST)
        if "format" in manifest or "sha256" in manifest:
            if manifest["sha256"] != _own_hash(manifest):
                return f"{MANIFEST} does not have the SHA-256 that it states"
            if manifest["format"] > FORMAT:
                return f"{_NEWER} ({manifest['format']}; this version knows {FORMAT}): update memtrain-common"
        named = _STEP.fullmatch(path.name)
        if named and manifest["step"] != int(named[1]):
            return f"{MANIFEST} is that of step {manifest['step']}"
        files = manifest["files"]
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
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


_NEWER = "is of a newer format of checkpoints"


def _own_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content."""
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load(path: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The state in a checkpoint folder, on the CPU, with the rows that lost processes' survivors wrote beside it.
    :func:`verify` it first.

    Args:
        say: told which rows were passed over and why.
    """
    tensors = load_file(path / TRAINING)
    tensors.update({f"model.{name}": t for name, t in load_file(path / MODEL).items()})
    state: dict[str, Any] = decode(read_json(path / STATE), tensors)
    mark = _mark(path)
    if mark is not None:
        put_rows(path.parent, mark, state["model"], say)
    return state


def _mark(path: Path) -> int | None:
    """Of the rows of other processes that belong to a checkpoint folder."""
    try:
        found = read_json(path / MANIFEST).get("mark")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _remove(path: Path) -> None:
    """Remove what lies there, a link without what it leads to; what may not be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).replace("\n", " ")
