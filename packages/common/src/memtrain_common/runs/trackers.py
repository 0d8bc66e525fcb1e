"""Where metrics go besides ``metrics.jsonl``: TensorBoard where it is installed, or one by name. Imported when used."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio", "none")


class Tracker(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_tracker(kind: str) -> None:
    """Refuse a tracker whose library is not installed: before a run has made anything."""
    if kind in TRACKERS and kind != "none" and importlib.util.find_spec(kind) is None:
        raise UserError(f"--tracker {kind} needs the package {kind}: pip install {kind}, or use another tracker")


def open_tracker(
    kind: str,
    folder: Path,
    config: dict[str, Any],
    *,
    resume_step: int | None = None,
    project: str = "memtrain",
    name: str = "",
) -> Tracker:
    """A tracker by name; :func:`check_tracker` it first.

    Args:
        kind: one of ``TRACKERS``.
        folder: the run's folder.
        config: shown beside the run by W&B and trackio.
        resume_step: events after this step are dropped from TensorBoard: the resumed run writes them again.
        project: W&B's and trackio's.
        name: the run's there; empty takes the folder's.

    Raises:
        UserError: if the name is unknown.
    """
    if kind == "tensorboard":
        return _TensorBoard(folder / "tensorboard", resume_step)
    if kind in ("wandb", "trackio"):
        return _Online(kind, project, name or folder.name, config)
    if kind == "none":
        return _Nothing()
    raise UserError(f"unknown tracker {kind!r}: choose {', '.join(TRACKERS)}")


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
    """W&B, and trackio, which has the same three functions."""

    def __init__(self, library: str, project: str, name: str, config: dict[str, Any]) -> None:
        self._library = importlib.import_module(library)
        self._library.init(project=project, name=name, config=config)

    def log(self, row: dict[str, Any]) -> None:
        self._library.log(_scalars(row), step=row["step"])

    def close(self) -> None:
        self._library.finish()


class _Nothing:
    def log(self, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass
