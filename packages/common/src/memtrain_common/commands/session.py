"""What stands around a training, once for every command that trains.

::

    session = Session.begin(config, argv, prog=PROG)      # processes, device, checks that need no data
    session.open(data=pictures.describe())                # run folder, config.json, console
    outcome = session.fit(task, FitConfig(…))             # the shared loop; the chosen weights, verified
    session.finish(outcome, scores=…, own={…})            # ledger, facts, pictures, result.json
"""

import dataclasses
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..console import Console
from ..data.fingerprint import changed_meaning, changed_part
from ..errors import UserError
from ..measuring.environment import device_name
from ..runs.run_folder import RunFolder, default_run_path
from ..runs.state_tree import shard_like
from ..runs.trackers import check_login, check_tracker
from ..training.cpu_workarounds import avoid_broken_amx
from ..training.distributed import World, gather_objects, launch, refusing_together, unwrap
from ..training.fit_config import DTYPES, FitConfig
from ..training.leaving import say_after_training
from ..training.loop import fit
from ..training.task import Task
from ..training.trained_state import copies
from .chosen import evaluation_of, verified
from .configure import placed
from .installed import draw, with_what_is_installed
from .result import Outcome, ended_before, result_content, same_command, write_result
from .summary import count_parameters, ledger_table, run_facts


class Session:
    """One command's training, from its checked flags to its result. Make one with :meth:`begin`."""

    config: Any
    """The command's configuration; after :meth:`open` its ``out`` is the run folder's path."""
    run: RunFolder | None = None
    console: Console

    def __init__(self, config: Any, argv: Sequence[str], prog: str, place: World, device: torch.device) -> None:
        self.config, self.argv, self.prog, self.place, self.device = config, argv, prog, place, device
        self.console = Console(quiet=not place.is_main)
        self.data: dict[str, Any] = {}
        self._resume_path: Path | None = None
        self._before: dict[str, Any] | None = None  # the result of a run that had ended
        self._changed: dict[str, Any] = {}

    @classmethod
    def alone(cls, config: Any, *, device: str = "cpu", run: RunFolder | None = None) -> "Session":
        """A session that says nothing, for benchmarks; without ``run`` it keeps nothing either."""
        session = cls(config, (), "", *launch(device))
        session.run = run
        session.console = Console(quiet=True)
        return session

    @property
    def folder(self) -> RunFolder:
        """The run folder, once there is one."""
        assert self.run is not None, "the session is not open"
        return self.run

    @classmethod
    def begin(
        cls, config: Any, argv: Sequence[str], *, prog: str, shared: str = "batch_size", patience_s: float | None = None
    ) -> "Session":
        """Join the processes, choose the device, and check what needs no data.

        Args:
            config: a dataclass on :class:`memtrain_common.commands.run_flags.RunFlags`.
            argv: the words after the command's name.
            prog: the command's name; "program command" where a program has several.
            shared: the field that the processes share out equally; "" where the command checks that itself.
            patience_s: of :func:`memtrain_common.training.distributed.launch`.

        Raises:
            UserError: if the device, the processes or the tracker cannot be had.
        """
        if getattr(config, "threads", 0):
            torch.set_num_threads(config.threads)
        place, device = launch(config.device, patience_s=patience_s)
        if device.type == "cpu" and "bfloat16" in (config.dtype, getattr(config, "base_dtype", "")):
            avoid_broken_amx()
        if shared and getattr(config, shared) % place.size:
            flag = "--" + shared.replace("_", "-")
            raise UserError(f"{flag} {getattr(config, shared)} must be divisible by the {place.size} processes")
        check_tracker(config.tracker)
        if config.tracker == "wandb":
            refusing_together(check_login if place.is_main else lambda: None)
        return cls(config, argv, prog, place, device)

    def open(self, data: dict[str, Any], *, beside: Collection[str] = (), **about: Any) -> None:
        """Make the run folder and write its config.json, or open the one that is resumed, whose config.json is written
        when its checkpoint has been taken up.

        Args:
            data: what the data are; their "sha256" and "parts" tell them from other data
                (:mod:`memtrain_common.data.fingerprint`), their "name" is for people.
            beside: files that may lie in a new run's folder already.
            about: is kept in config.json besides.

        Raises:
            UserError: if the folder is taken, or the run that is resumed had other data: with --data-changed ok, other
                classes or tokens.
        """
        self.data = data
        main = self.place.is_main
        if self.config.resume:
            run = RunFolder.open(Path(self.config.resume), writes=main)
            before = run.read_config().get("data") or {}
            wrong = changed_part(before, data)
            other = changed_meaning(before, data) if wrong is not None else None
            if wrong is not None and (other is not None or self.config.data_changed != "ok"):
                ways = "or begin a new run" if other else "begin a new run, or go on with these by --data-changed ok"
                raise UserError(
                    f"{self.config.resume} was trained on other data: {other or wrong}; give it the same files, {ways}"
                )
            if wrong is not None:
                self._changed = {"data": data, "data_before": before}
                self.console.say(f"goes on with other data: {wrong}")
        else:
            own = Path(self.config.out) if self.config.out else default_run_path(self.prog.replace(" ", "-"))
            run = RunFolder.create(gather_objects(own)[0], writes=main, beside=beside)  # the first one's clock
        self._enter(run, dataclasses.replace(self.config, out=str(run.path)), **about)
        self.console = self.console.logging_to(run.path / "log.txt" if main else None)

    def beside(self, name: str, config: Any, **about: Any) -> "Session":
        """A further training of the same command, in a folder of its own within the run's.

        Args:
            config: how it differs; ``out`` and ``resume`` are set here.
            about: is kept in its config.json besides.
        """
        other = Session(config, self.argv, self.prog, self.place, self.device)
        other.data, other.console, other._resume_path = self.data, self.console, self.folder.path
        folder = self.folder.path / name
        again = bool(self.config.resume) and (folder / "config.json").exists()
        run = (RunFolder.open if again else RunFolder.create)(folder, writes=self.place.is_main)
        run.once_taken_up = self.folder.once_taken_up  # whichever goes on first, the whole run does
        out = str(folder)
        other._enter(run, dataclasses.replace(config, out=out, resume=out if again else ""), **about)
        return other

    def _enter(self, run: RunFolder, config: Any, **about: Any) -> None:
        program, *command = self.prog.split(" ")
        argv = [*command, *self.argv]
        self.run, self.config = run, config
        if config.resume:
            note = partial(run.add_resume, placed(config), prog=program, argv=argv, **self._changed)
            run.once_taken_up.append(note)
            return
        about |= {"data": self.data, "device": device_name(self.device), "processes": self.place.size}
        run.write_config(placed(config), prog=program, argv=argv, **about)

    def resume_key(self, free: frozenset[str] | set[str], **more: Any) -> dict[str, Any]:
        """What a checkpoint must agree in: all flags but those that a resumed run may change, and places.

        Args:
            free: names of the former.
            more: further values, as JSON holds them.
        """
        out = {*free, *self.config.PLACES}
        kept = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in out}
        return {**kept, **more}

    def fit(
        self, task: Task, config: FitConfig, *, resume_key: Mapping[str, Any], label: str = "", select: str = "last",
        resume: bool = False,
    ) -> Outcome:  # fmt: skip
        """Train by the shared loop, and put the chosen weights into the model.

        Args:
            resume_key: what a checkpoint must agree in.
            label: the progress bar's name.
            select: "last", or "best": the weights of the best evaluation.
            resume: go on from the newest checkpoint also where the command's ``--resume`` is empty.

        Raises:
            UserError: if the best checkpoint is damaged; which one is intact is said.
        """
        config, model = with_what_is_installed(config, self.device, self.console.say), unwrap(task.model)
        start, resume = copies(task) if select == "best" else {}, resume or bool(self.config.resume)
        if self.run is not None and not resume:
            self.run.taken_up()
        result = fit(
            task, config, run=self.run, resume=resume, resume_path=self._resume_path,
            resume_key=resume_key, read_key=partial(self._old_key, resume_key), console=self.console, label=label,
        )  # fmt: skip
        if self.run is not None and self.config.resume:
            self._before = ended_before(self.run.path, result)
        step = result.step
        say_after_training(step, self._resume_path or (self.run.path if self.run is not None else None))
        if select == "best" and self.run is not None and result.best is not None and result.best[0] != step:
            step = result.best[0]
            where = self._resume_path or self.run.path
            state = {**model.state_dict(), **start} if not step else verified(self.run, step, where)["model"]
            model.load_state_dict(shard_like(state, model.state_dict()))
            self.console.say(
                f"took the weights of step {step}, the best evaluation; --select last keeps those of the last step"
            )
        return Outcome(model, result, step, config, evaluation_of(step, result, config, self.run))

    def _old_key(self, now: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's key under the names of today; with --data-changed ok its hashes are those of now."""
        hashes = {k: v for k, v in now.items() if k.endswith("sha256")} if self.config.data_changed == "ok" else {}
        return {**self.config.modernise(saved), **hashes}

    @contextmanager
    def judging(self, outcome: Outcome) -> Iterator[nn.Module]:
        """Within, the trained model is in eval mode, without gradients, under the training's autocast."""
        dtype = DTYPES[self.config.dtype]
        outcome.model.eval()
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            yield outcome.model

    def finish(
        self,
        outcome: Outcome,
        *,
        scores: Mapping[str, Mapping[str, float]],
        own: Mapping[str, Any] | None = None,
        table: str = "",
        memory: str = "",
        facts: Mapping[str, str] | None = None,
        numbers: tuple[int, int] | None = None,
        curves: Mapping[str, RunFolder] | None = None,
        levels: Mapping[str, float] | None = None,
        ylabel: str = "loss, nats",
        closing: str = "",
        say: bool = True,
    ) -> dict[str, Any]:
        """Say what came out, write ``result.json``, draw the pictures; -> the content of ``result.json``.

        Args:
            scores: numbers by split.
            own: what only this command knows.
            table: said first.
            memory: the ledger as a table, where the command has more to say of it than the measured column.
            facts: lines beside those that every run has; one of the same name takes its place.
            numbers: trained and all parameters, where this process's model has not all of them.
            curves: runs whose losses are drawn together, by name; None draws this one's.
            levels: horizontal lines in the picture of losses, by name.
            closing: what is said after all that, before the run folder's name.
            say: False writes and draws, and says nothing.
        """
        about = {"command": shlex.join([*self.prog.split(" "), *self.argv]), "data": self.data.get("name")}
        about |= same_command(self._before, outcome, scores)
        about |= {"seed": self.config.seed}
        losses = [row["loss"] for row in self.folder.metrics() if row.get("split") == "train"]
        content = result_content(
            outcome, about, train_loss=losses[-1] if losses else None, scores=scores, own=own or {}, numbers=numbers
        )
        if not self.place.is_main:
            return content
        ledger = outcome.result.ledger
        if say:
            self.console.say()
            if table:
                self.console.say(table)
            if ledger is not None:
                self.console.say("memory of a training step")
                self.console.say(memory or ledger_table({"measured": ledger}))
            self.console.say("run")
            self.console.say(
                run_facts(
                    numbers or count_parameters(outcome.model),
                    outcome.result,
                    outcome.config.unit,
                    facts,
                    whole_process=self.device.type == "cpu",
                )
            )
        write_result(self.folder.path, content, outcome.result)
        rows = {name: run.metrics() for name, run in (curves or {"": self.folder}).items()}
        line = draw(self.folder.path, ledger, rows, ylabel=ylabel, levels=levels or {})
        if line and say:
            self.console.say(line)
        if say and closing:
            self.console.say(closing)
        if say:
            self.console.say(f"run folder {self.folder.path}")
        return content
