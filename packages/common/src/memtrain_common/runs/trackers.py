"""Where metrics go besides ``metrics.jsonl``: TensorBoard where it is installed, or one by name. Imported when used.

What a tracker raises ends no training: it is refused before the first step, and left where it fails later."""

import importlib
import importlib.util
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..files import read_json, write_json

TRACKERS = ("tensorboard", "wandb", "trackio", "none")
KNOWN_AS = "tracker.json"
"""In the run's folder: what W&B and trackio know the run by."""


class Tracker(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_tracker(kind: str) -> None:
    """Refuse a tracker whose library is not installed: before a run has made anything."""
    if kind in TRACKERS and kind != "none" and importlib.util.find_spec(kind) is None:
        raise UserError(f"--tracker {kind} needs the package {kind}: pip install {kind}, or use another tracker")


def check_login() -> None:
    """Refuse W&B where nobody is logged in, or ask for the login: before data and model are there."""
    try:
        importlib.import_module("wandb").login()
    except Exception as error:
        raise _refusal("wandb", error) from None


def open_tracker(
    kind: str,
    folder: Path,
    config: dict[str, Any],
    *,
    resume_step: int | None = None,
    project: str = "memtrain",
    name: str = "",
    say: Callable[[str], None] | None = None,
) -> Tracker:
    """A tracker by name; :func:`check_tracker` it first.

    Args:
        kind: one of ``TRACKERS``.
        folder: the run's folder.
        config: shown beside the run by W&B and trackio.
        resume_step: events after this step are dropped from TensorBoard: the resumed run writes them again. W&B and
            trackio go on with the run that the folder's ``tracker.json`` names.
        project: W&B's and trackio's.
        name: the run's there; empty takes the folder's.
        say: told once if the tracker fails later; None warns.

    Raises:
        UserError: if the name is unknown, or the tracker does not open.
    """
    if kind not in TRACKERS:
        raise UserError(f"unknown tracker {kind!r}: choose {', '.join(TRACKERS)}")
    if kind == "none":
        return _Nothing()
    known = _known_as(folder) if resume_step is not None else {}
    try:
        if kind == "tensorboard":
            return _Lasting(kind, _TensorBoard(folder / "tensorboard", resume_step), say)
        named = {"project": project, "name": name or folder.name, "config": config}
        tracker = _Online(kind, known, named)
    except Exception as error:
        raise _refusal(kind, error) from None
    write_json(folder / KNOWN_AS, known)
    return _Lasting(kind, tracker, say)


def _known_as(folder: Path) -> dict[str, Any]:
    """What the trackers that a run had know it by.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / KNOWN_AS
    try:
        found = read_json(path) if path.exists() else {}
        if all(isinstance(value, str) for value in found.values()):
            return found
        why = "it does not name runs"
    except (ValueError, AttributeError) as error:
        why = str(error)
    raise UserError(f"{path} is damaged ({why}): remove it, and the tracker begins another run")


def _refusal(kind: str, error: Exception) -> UserError:
    return UserError(f"--tracker {kind} does not open ({_words(error)}): mend that, or use another tracker")


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    split = row.get("split", "train")
    return {f"{split}/{k}": v for k, v in row.items() if k not in ("step", "split") and isinstance(v, int | float)}


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Online:
    """W&B, and trackio, which has the same three functions. W&B knows a run by an id, trackio by its name.

    Args:
        known: what each knows the run by; this one is added.
    """

    def __init__(self, library: str, known: dict[str, Any], named: dict[str, Any]) -> None:
        self._library = importlib.import_module(library)
        if library == "wandb":
            known.setdefault("wandb", secrets.token_hex(8))
            self._library.init(**named, id=known["wandb"], resume="allow")
        else:
            again = "trackio" in known  # a new run is never another one of the same name
            known.setdefault("trackio", named["name"])
            self._library.init(**{**named, "name": known["trackio"]}, resume="allow" if again else "never")

    def log(self, row: dict[str, Any]) -> None:
        self._library.log(_scalars(row), step=row["step"])

    def close(self) -> None:
        self._library.finish()


class _Lasting:
    """A tracker that fails is said once and gets no more rows; the training goes on."""

    def __init__(self, kind: str, tracker: Tracker, say: Callable[[str], None] | None) -> None:
        self._kind, self._tracker, self._say, self._failed = kind, tracker, say, False

    def log(self, row: dict[str, Any]) -> None:
        if not self._failed:
            self._try(self._tracker.log, row)

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, method: Callable[..., None], *given: Any) -> None:
        try:
            method(*given)
        except Exception as error:
            if not self._failed:
                text = f"--tracker {self._kind} failed ({_words(error)}): the run goes on without it"
                self._say(text) if self._say is not None else warnings.warn(text, RuntimeWarning, stacklevel=2)
            self._failed = True


class _Nothing:
    def log(self, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass
