"""The folder of one run: what it was asked, what it measured, and how to go on with it.

::

    runs/NAME/
      config.json      command, configuration, versions, git commit, device, data: everything to repeat the run
      metrics.jsonl    one object a logged step
      log.txt          the console
      energy.csv       seconds, watts, joules so far (where there is a counter)
      result.json      what came out
      cost.csv         steps, seconds, joules, mean watts of the finished run; "unavailable" where nothing measures them
      memory.json      the memory ledger
      loss.png, memory.png
      tensorboard/
      tracker.json     what W&B or trackio knows the run by
      checkpoints/     see memtrain_common.runs.checkpoint
      .lock            held while a process trains in the folder
"""

import dataclasses
import datetime
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import parse_json, read_json, write_json
from ..measuring.environment import git_commit, versions
from . import unstarted
from .checkpoint import Checkpoints
from .lock import LOCK, lock_folder


class RunFolder:
    """A run's files. Make one with :meth:`create` or :meth:`open`; in a script with :meth:`open_or_create`."""

    def __init__(self, path: Path, *, writes: bool = True, keep_checkpoints: int = 2) -> None:
        self.path, self.writes = path, writes
        self.once_taken_up: list[Callable[[], None]] = []
        """What to write when a resumed run goes on: one that cannot go on as it is asked stays as it was."""
        self.checkpoints = Checkpoints(path / "checkpoints", keep=keep_checkpoints, writes=writes)
        self._metrics = path / "metrics.jsonl"

    @classmethod
    def create(
        cls, path: Path, *, writes: bool = True, keep_checkpoints: int = 2, beside: Collection[str] = ()
    ) -> "RunFolder":
        """A new run's folder, which must be missing or empty.

        Args:
            beside: files that may lie there already.

        Raises:
            UserError: if there is something in it already, or it cannot be made.
        """
        if writes:
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is a file: --out needs the name of a folder")
            new = unstarted.missing(path)
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock_folder(path)
            except OSError as error:
                raise UserError(f"cannot write in the folder {path} ({error.strerror}): choose another --out") from None
            if (path / "config.json").exists():
                raise UserError(f"{path} holds another run: choose a new --out, or resume it with --resume {path}")
            if any(
                p.name not in (LOCK, *beside) and p.suffix != ".partial" for p in path.iterdir()
            ):  # a kill may leave a partial file
                raise UserError(f"{path} is not empty: --out needs a new or empty folder")
            unstarted.note(path, new)
        return cls(path, writes=writes, keep_checkpoints=keep_checkpoints)

    @classmethod
    def open(cls, path: Path, *, writes: bool = True, keep_checkpoints: int = 2) -> "RunFolder":
        """The folder of a run that was begun before.

        Raises:
            UserError: if it is not one.
        """
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a run: a run is a folder with a config.json, as --out makes it")
        if writes:
            lock_folder(path)
        return cls(path, writes=writes, keep_checkpoints=keep_checkpoints)

    @classmethod
    def open_or_create(cls, path: Path, config: Any, *, writes: bool = True, keep_checkpoints: int = 2) -> "RunFolder":
        """The same at every start of a script: a new run's folder, or that of the run that was begun there before.

        Args:
            config: a dataclass of plain values, kept in ``config.json`` with the script's own words.

        Raises:
            UserError: if something else lies there.
        """
        prog, argv = Path(sys.argv[0]).name, sys.argv[1:]
        if (path / "config.json").exists():
            run = cls.open(path, writes=writes, keep_checkpoints=keep_checkpoints)
            run.add_resume(config, prog=prog, argv=argv)
            return run
        run = cls.create(path, writes=writes, keep_checkpoints=keep_checkpoints)
        run.write_config(config, prog=prog, argv=argv)
        return run

    def write_config(self, config: Any, *, prog: str, argv: Sequence[str], **more: Any) -> None:
        """Write ``config.json``. ``config`` is a dataclass; ``more`` is kept beside it (device, data)."""
        if self.writes:
            content = {"config": dataclasses.asdict(config), **_making(prog, argv), **more}
            write_json(self.path / "config.json", content)

    def add_resume(self, config: Any, *, prog: str, argv: Sequence[str], **changed: Any) -> None:
        """Note in ``config.json`` that the run was resumed: the configuration now, the command, and what changed."""
        if self.writes:
            content = {**self.read_config(), **changed, "config": dataclasses.asdict(config)}
            content["resumed"] = [*content.get("resumed", []), _making(prog, argv)]
            write_json(self.path / "config.json", content)

    def taken_up(self) -> None:
        """The newest checkpoint is in the model, or there is none to be taken up: write what waits for it."""
        while self.once_taken_up:
            self.once_taken_up.pop(0)()

    def read_config(self) -> dict[str, Any]:
        """What :meth:`write_config` wrote.

        Raises:
            UserError: if the file is damaged.
        """
        try:
            content = read_json(self.path / "config.json")
            if isinstance(content["config"], dict):
                return content
            why = "config is no object"
        except (ValueError, KeyError, TypeError) as error:
            why = str(error)
        raise UserError(f"{self.path / 'config.json'} is not the JSON object that the run wrote: {why}")

    def append_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to ``metrics.jsonl``."""
        if self.writes:
            with self._metrics.open("a") as file:
                file.writelines(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in rows)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows; a last line that a kill cut short is left out."""
        if not self._metrics.exists():
            return []
        text = self._metrics.read_text(errors="replace")
        rows = []
        for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], start=1):
            try:
                rows.append(parse_json(line))
                rows[-1]["step"] + 0
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self._metrics}, line {number} is damaged: it must be what the run logged") from None
        return rows

    def metrics_mark(self) -> dict[str, Any]:
        """Size and SHA-256 of ``metrics.jsonl``, on disk: a checkpoint remembers them."""
        if not self._metrics.exists():
            return {"metrics_bytes": 0, "metrics_sha256": hashlib.sha256().hexdigest()}
        with self._metrics.open("r+b" if self.writes else "rb") as file:
            if self.writes:
                os.fsync(file.fileno())
            content = file.read()
        return {"metrics_bytes": len(content), "metrics_sha256": hashlib.sha256(content).hexdigest()}

    def take_back_metrics(self, n_bytes: int, sha256: str = "") -> bool:
        """Drop the rows that were written after a checkpoint: the resumed run writes them again.

        Args:
            sha256: of the rows before it; an older checkpoint has none.

        Returns:
            whether the file is there, if the checkpoint has seen rows in it.

        Raises:
            UserError: if they are not the rows that the run logged.
        """
        if not self._metrics.exists():
            return not n_bytes
        with self._metrics.open("rb") as file:
            content = file.read(n_bytes)
        if len(content) < n_bytes or (sha256 and hashlib.sha256(content).hexdigest() != sha256):
            raise UserError(
                f"{self._metrics} does not have the rows that the run had logged by its checkpoint: put them back, or "
                "move the file away to go on without them"
            )
        if self.writes and self._metrics.stat().st_size > n_bytes:
            os.truncate(self._metrics, n_bytes)
        return True


def _making(prog: str, argv: Sequence[str]) -> dict[str, Any]:
    """What a result's reader needs to make it again."""
    return {
        "command": shlex.join([prog, *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_run_path(prog: str, root: str = "runs") -> Path:
    """``runs/PROG-DATE-TIME``, with a counter where that is taken."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(root) / f"{prog}-{stamp}"
    n = 2
    while path.exists():
        path = Path(root) / f"{prog}-{stamp}-{n}"
        n += 1
    return path
