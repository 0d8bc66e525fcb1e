"""Every arm of an ablation, one after another in its places, recorded as it ends."""

import dataclasses
import shlex
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from memtrain_common.console import Console, format_bytes, format_seconds
from memtrain_common.errors import UserError
from memtrain_common.files import read_json, write_json

from ..compose.axes import check, refusal
from .arm_jobs import UNPREDICTED, configure_finetune, finetune_job, predict_job, with_device
from .arms import Job, run_jobs
from .config import Ablation
from .grid import Arm, Combination, Grid, flag_words
from .results import curve, last_step, read_arm

FINISHED = ("done", "refused", "diverged", "out of memory")
"""Ends that are a result; an arm that was killed or failed is tried again by --resume, and so is one that was refused:
the folder, file or package that it lacked may be there now."""
PRETRAINED = "pretrained"
"""Name of the run before all arms."""
ON_ITS_OWN = {"tracker": "none", "save_model": False}
"""Flags of an arm that the grid may change."""


class Runner:
    """The arms of one call."""

    def __init__(self, request: Ablation, folder: Path, console: Console, places: list[str], context: Any) -> None:
        self.request, self.folder, self.console, self.places, self.context = request, folder, console, places, context
        self.grid = request.grid
        self.arms = {arm.name: arm for arm in self.grid.arms()}
        self.written = 0

    def run(self) -> None:
        self.prepare()
        self._pretrain()
        left = self.left(again=("refused",))
        done = len(self.arms) - len(left)
        self.written = done
        self._head(done)
        bar = self.console.progress(len(self.arms), initial=done, label="arms")

        def on_end(job: Job, outcome: dict[str, Any]) -> Iterable[Job]:
            arm = self.arms[job.name]
            if job.run is predict_job:
                record = read_json(self.result(arm))
                record.update(outcome.get("content") or UNPREDICTED)
                write_json(self.result(arm), record)
            else:
                if outcome["status"] == "stopped":  # this arm alone: where all are stopped, nobody is told of ends
                    outcome = {**outcome, "status": "killed"}
                record = self.record(arm, job, outcome)
                write_json(self.result(arm), record)
                if outcome["status"] in ("out of memory", "killed"):
                    outcome_path = job.outcome.with_suffix(".predicted.json")
                    return [dataclasses.replace(job, run=predict_job, outcome=outcome_path, limit_bytes=0)]
            self.written += 1
            bar.update()
            self.row(record)
            return []

        def progress(running: list[Job]) -> None:
            bar.set_postfix_str(", ".join(f"{job.name} {last_step(job.folder)}" for job in running), refresh=True)

        try:
            run_jobs(
                [self.job(arm) for arm in left],
                self.places,
                on_end=on_end,
                while_waiting=progress,
                context=self.context,
            )
        finally:
            bar.close()

    def prepare(self) -> None:
        """The folders, the combinations without meaning, and results that cannot be read: they are said, and go."""
        for sub in ("results", "logs", "runs"):
            (self.folder / sub).mkdir(exist_ok=True)
        for arm in self.arms.values():
            if (error := self.damage(arm)) is not None:
                self.console.say(f"{arm.name} runs again: {error}")
                self.result(arm).unlink()
        self.refuse()

    def left(self, again: Collection[str] = ()) -> list[Arm]:
        """Arms without a result.

        Args:
            again: results that are sought once more.
        """
        return [arm for arm in self.arms.values() if not self.finished(arm, again)]

    def finished(self, arm: Arm, again: Collection[str] = ()) -> bool:
        if not self.result(arm).exists() or self.damage(arm) is not None:
            return False
        record = read_arm(self.result(arm))
        if record["status"] == "out of memory" and record.get("memory_limit_bytes") != self.request.limit_bytes:
            return False
        return record["status"] in FINISHED and record["status"] not in again

    def damage(self, arm: Arm) -> UserError | None:
        """What is wrong with an arm's result; None where nothing is, or there is none."""
        try:
            if self.result(arm).exists():
                read_arm(self.result(arm))
        except UserError as error:
            return error
        return None

    def result(self, arm: Arm) -> Path:
        return self.folder / "results" / f"{arm.name}.json"

    def refuse(self, *, write: bool = True) -> None:
        """Leave out the combinations without meaning; with ``write`` they are recorded too, and each is said once."""
        for combination in self.grid.combinations():
            why = refusal(combination.axes)
            if why is None:
                continue
            arm = Arm(combination, self.grid.seeds[0])
            for seed in self.grid.seeds:
                del self.arms[Arm(combination, seed).name]
            if not write:
                continue
            self.console.say(f"refused: {combination.name}: {why}")
            words = self.grid.words(combination)
            if not self.result(arm).exists():
                write_json(self.result(arm), _head_of(arm, words) | {"status": "refused", "why": why})

    def _pretrain(self) -> None:
        """The run before all arms, unless it is finished or there is none."""
        if not self.needs_pretraining:
            return
        job = self.pretraining()
        self.console.say(f"pretraining: {shlex.join(['finetune', *job.words])}")
        ends: list[dict[str, Any]] = []

        def on_end(job: Job, outcome: dict[str, Any]) -> Iterable[Job]:
            ends.append(outcome)
            return []

        with self.console.progress(1, label="pretraining") as bar:
            run_jobs(
                [job], self.places[:1], on_end=on_end, context=self.context,
                while_waiting=lambda jobs: bar.set_postfix_str("".join(last_step(j.folder) for j in jobs)),
            )  # fmt: skip
        (end,) = ends
        if end["status"] == "stopped":
            job.outcome.unlink(missing_ok=True)
            raise KeyboardInterrupt
        self.keep_pretraining(job, end)

    @property
    def needs_pretraining(self) -> bool:
        return self.grid.pretrain is not None and not (self.folder / "pretrained.json").exists()

    def pretraining(self) -> Job:
        """The run before all arms."""
        words = flag_words({"tracker": "none", **(self.grid.pretrain or {})})
        return Job(
            PRETRAINED, finetune_job, tuple(words), folder=self._pretrained,
            log=self.folder / "logs" / "pretrained.txt", outcome=self.folder / "pretrained.outcome.json",
        )  # fmt: skip

    def keep_pretraining(self, job: Job, end: dict[str, Any]) -> None:
        """Write ``pretrained.json``.

        Raises:
            UserError: if it did not end with a result.
        """
        job.outcome.unlink(missing_ok=True)
        if end["status"] != "done":
            raise UserError(f"the pretraining did not end: {end['why']}")
        content = end["content"]
        write_json(self.folder / "pretrained.json", content)
        self.console.say(
            f"pretrained in {format_seconds(content['seconds'])}: {content['metric']} {content['val']:.4f} on its "
            f"validation split"
        )

    @property
    def _pretrained(self) -> Path:
        return self.folder / "pretrained"

    def job(self, arm: Arm) -> Job:
        words = self.grid.words(arm.combination, ON_ITS_OWN)
        if self.grid.pretrain is not None:
            words += ["--weights", str(self._pretrained / "model")]
        words += ["--seed", str(arm.seed)]
        return Job(
            arm.name,
            finetune_job,
            tuple(words),
            folder=self.folder / "runs" / arm.name,
            log=self.folder / "logs" / f"{arm.name}.txt",
            outcome=self.folder / "runs" / f"{arm.name}.outcome.json",
            limit_bytes=self.request.limit_bytes,
        )

    def record(self, arm: Arm, job: Job, outcome: dict[str, Any]) -> dict[str, Any]:
        """What ``results/NAME.json`` says."""
        content = outcome.get("content") or {}
        record = _head_of(arm, with_device(job))
        record |= {"status": outcome["status"], "why": outcome.get("why"), "device": job.device}
        record |= {"memory_limit_bytes": job.limit_bytes}
        record |= {k: v for k, v in content.items() if k not in record}
        record["curve"] = curve(job.folder)
        job.outcome.unlink(missing_ok=True)
        if outcome["status"] in FINISHED and not self.request.config.keep_checkpoints:
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        return record

    def tell(self, name: str) -> None:
        """Say the result of an arm that ran elsewhere."""
        if name in self.arms:
            self.written = len(self.arms) - len(self.left())
            self._width = max(len(n) for n in self.arms)
            self.row(read_arm(self.result(self.arms[name])))

    # -- what is said --------------------------------------------------------------------------------------------------

    def _head(self, done: int) -> None:
        grid, n = self.grid, len(self.arms)
        devices = ", ".join(f"{self.places.count(p)} on {p}" for p in dict.fromkeys(self.places))
        limit = f", each within {format_bytes(self.request.limit_bytes)}" if self.request.limit_bytes else ""
        self.console.say(
            f"{n} arms: {n // len(grid.seeds)} combinations x {len(grid.seeds)} seeds; at a time {devices}{limit}"
            + (f"; {done} are finished already" if done else "")
        )
        self._width = max((len(name) for name in self.arms), default=0)
        if len(self.arms) > done:
            self.console.say(f"{'':>9}  {'arm':{self._width}}      val     test      memory     time")

    def row(self, record: dict[str, Any]) -> None:
        where = f"{self.written}/{len(self.arms)}"
        if record["status"] != "done":
            self.console.say(f"{where:>9}  {record['name']:{self._width}}  {record['status']}: {record['why']}")
            return
        val, test = (_score(record, split) for split in ("val", "test"))
        memory = format_bytes(sum(record["measured"].values()))
        self.console.say(
            f"{where:>9}  {record['name']:{self._width}}  {val:>7}  {test:>7}  {memory:>10}  {record['seconds']:5.1f} s"
        )


def _score(record: dict[str, Any], split: str) -> str:
    value = record.get(split)
    return "" if value is None else f"{value:.2%}" if record["metric"] == "accuracy" else f"{value:.4g}"


def _head_of(arm: Arm, words: Sequence[str]) -> dict[str, Any]:
    """What a result says whatever became of the arm."""
    axes = arm.combination.axes
    return {
        "name": arm.name,
        "combination": arm.combination.name,
        "axes": {"train": axes.train, "save": axes.save, "optim": axes.optim},
        "settings": arm.combination.settings,
        "seed": arm.seed,
        "command": shlex.join(["finetune", *words]),
    }


def meaningful_of(grid: Grid) -> list[Combination]:
    """Combinations that may train; values out of range are the user's mistake, and end it here."""
    found, reasons = [], []
    for combination in grid.combinations():
        why = refusal(combination.axes)
        if why is None:
            check(combination.axes)
            configure_finetune(grid.words(combination))  # raises as finetune itself would
            found.append(combination)
        else:
            reasons.append(why)
    if not found:
        raise UserError(f"no combination of the grid has a meaning: {reasons[0]}")
    if grid.pretrain is not None:
        configure_finetune(flag_words(grid.pretrain))
    return found


def refuse_data_that_is_not_there(grid: Grid, first: Combination) -> None:
    """Read what the first arm trains on, before there is a folder: every arm would be refused for what it lacks.

    Raises:
        UserError: as finetune itself would.
    """
    from memtrain_common.training.distributed import World

    from ..run.finetune import workload_of

    workload_of(configure_finetune(grid.words(first)), World())
