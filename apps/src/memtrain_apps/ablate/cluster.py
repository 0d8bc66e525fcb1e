"""Arms on other machines: submitted and watched here, run there, by submitit (Slurm, or its processes here) or Ray.

A shared file system is all that arms share. Each is one command,

    python -m memtrain_apps.ablate.cluster DIR NAME

which goes on where the arm was left, and writes ``results/NAME.json`` itself: the driver may die, and ``ablate
--collect DIR`` reports what is there. A signal before the time limit leaves a checkpoint, and the arm is requeued. An
arm whose job ended without a result is submitted again, RETRIES times.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from memtrain_common.console import Console, format_bytes
from memtrain_common.errors import Stopped, UserError
from memtrain_common.files import read_json, write_json
from memtrain_common.interrupts import unwinding

from .arm_jobs import UNPREDICTED, predict_job
from .arms import Job, live, outcome_of, wait_until_free
from .config import AblateConfig, Ablation, saved_request
from .grid import Arm
from .launchers import Launcher, Needs, launcher_of
from .runner import PRETRAINED, Runner

RETRIES = 3
PAUSE = 0.5  # seconds between two looks
AGAIN = 75
"""Exit code of an arm that stopped with a checkpoint, or found another process in its folder: EX_TEMPFAIL."""
LIBRARIES = 2 * 2**30
"""Bytes of Python, torch and a GPU's driver in the memory of a process, beside what the ledger counts."""
SPARE = 1.25


# -- where an arm runs ---------------------------------------------------------------------------------------------


def run_arm(folder: Path, name: str) -> int:
    """Run an arm of an ablation's folder, or go on with it, and write its result; -> an exit code."""
    options = read_json(folder / "cluster.json")
    request = replace(saved_request(folder), limit_bytes=options["limit_bytes"])
    runner = Runner(request, folder, Console(quiet=True), [options["device"]], None)
    arm = runner.arms.get(name)
    if runner.finished(arm) if arm else not runner.needs_pretraining:
        return 0
    job = replace(runner.job(arm) if arm else runner.pretraining(), device=options["device"])
    try:
        wait_until_free(job.folder)  # one that was submitted twice, or whose job is gone and that writes its checkpoint
    except UserError:
        return AGAIN
    _end_when_orphaned()
    job.outcome.unlink(missing_ok=True)
    live(job)
    outcome = outcome_of(job, 0)
    if outcome["status"] == "stopped":
        return AGAIN
    if arm is None:
        runner.keep_pretraining(job, outcome)
    else:
        if outcome["status"] == "out of memory":  # the limit has ended with the arm
            outcome = {**outcome, "content": _predicted(job)}
        write_json(runner.result(arm), runner.record(arm, job, outcome))
    return 0


def _predicted(job: Job) -> dict[str, Any]:
    """What the arm would have held; where that cannot be said either, its log has the reason."""
    try:
        return predict_job(job)
    except Exception:
        traceback.print_exc()
        return dict(UNPREDICTED)


def _end_when_orphaned() -> None:
    """Stop, after a checkpoint, when the job that started this process is gone: it will be submitted again."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()


# -- where the driver runs -----------------------------------------------------------------------------------------


def launcher_for(config: AblateConfig, folder: Path, places: list[str]) -> Launcher:
    """What submits the arms of a folder, which need not be there yet.

    Raises:
        UserError: if it is not there, or not for these places.
    """
    if config.launcher == "local" and _device_of(places) != "cpu":
        raise UserError("--launcher local is for the CPU: leave it out, and an arm runs on each GPU")
    return launcher_of(config, folder.resolve(), len(places))


def _device_of(places: list[str]) -> str:
    return "cuda:0" if any(p.startswith("cuda") for p in places) else "cpu"


def launch(request: Ablation, folder: Path, console: Console, places: list[str], launcher: Launcher) -> None:
    """Submit every arm that has no result, and watch until each has one.

    Raises:
        Stopped: on Ctrl-C. Arms that were submitted go on.
    """
    config, device = request.config, _device_of(places)
    write_json(folder / "cluster.json", {"device": device, "limit_bytes": request.limit_bytes})
    runner = Runner(request, folder, console, [device], None)
    runner.prepare()
    base = Needs(LIBRARIES, int(device != "cpu"), config.time_limit, config.signal_seconds)
    try:
        with unwinding():
            if runner.needs_pretraining:
                console.say("pretraining")
                _watch(runner, launcher, {PRETRAINED: base}, 1)
            arms = runner.left(again=("refused",))
            for arm in arms:
                runner.result(arm).unlink(missing_ok=True)  # a refusal, which no job would try again
            needs = _needs_of(runner, arms, device, base)
            most = len(places) if config.launcher == "local" else len(needs)
            at_once = "as many at a time as there is room for" if most == len(needs) else f"{most} at a time"
            console.say(f"{len(needs)} arms by {config.launcher}, {at_once}")
            _watch(runner, launcher, needs, most)
    except KeyboardInterrupt as interrupt:
        signum = interrupt.args[0] if interrupt.args else signal.SIGINT
        raise Stopped(
            signum, f"stopped watching: {launcher.AFTERWARDS}; --collect {folder} reports what is there, and "
            f"--resume {folder} --launcher {config.launcher} submits the rest"
        ) from None  # fmt: skip


_peaks: dict[tuple[str, ...], int] = {}


def _needs_of(runner: Runner, arms: list[Arm], device: str, base: Needs) -> dict[str, Needs]:
    """By the arm's name; one that cannot be begun is refused here, and the others are submitted."""
    found = {}
    for arm in arms:
        job = replace(runner.job(arm), device=device)
        try:
            found[arm.name] = _needs(runner, job, base)
        except UserError as error:
            record = runner.record(arm, job, {"status": "refused", "why": str(error)})
            write_json(runner.result(arm), record)
            runner.console.say(f"{arm.name} refused: {error}")
    return found


def _needs(runner: Runner, job: Job, base: Needs) -> Needs:
    """By the arm's own predicted peak, which all seeds share; on a GPU the host holds the weights while they load."""
    words = tuple(w for i, w in enumerate(job.words) if "--seed" not in job.words[max(0, i - 1) : i + 1])
    if words not in _peaks:
        found = predict_job(job)
        totals = found["predicted"]
        _peaks[words] = found["predicted_peak_bytes"] if job.device == "cpu" else 2 * totals["weights"]
        runner.console.say(
            f"{job.name.rpartition('-seed')[0]}: {format_bytes(found['predicted_peak_bytes'])} predicted"
        )
    return replace(base, memory_bytes=int(SPARE * _peaks[words]) + base.memory_bytes)


def _watch(runner: Runner, launcher: Launcher, needs: dict[str, Needs], most: int) -> None:
    """Submit, and submit again what ended without a result."""
    waiting = list(needs)
    running: dict[str, Any] = {}
    tries: Counter[str] = Counter()

    def has_result(name: str) -> bool:
        arm = runner.arms.get(name)
        return runner.finished(arm) if arm else not runner.needs_pretraining

    while waiting or running:
        while waiting and len(running) < most:
            name = waiting.pop(0)
            tries[name] += 1
            try:
                running[name] = launcher.submit(name, needs[name])
            except UserError as error:  # no machine holds it: the others go on
                _give_up(runner, name, str(error))
        for name, handle in list(running.items()):
            ended = launcher.ended(handle)  # before the look for a result, which is written before the end
            if has_result(name):
                del running[name]
                runner.tell(name)
            elif ended:
                del running[name]
                if tries[name] < RETRIES:
                    waiting.append(name)
                else:
                    logs = runner.folder / "cluster"
                    _give_up(runner, name, f"its job ended {RETRIES} times without a result; {logs} has its logs")
        time.sleep(PAUSE)


def _give_up(runner: Runner, name: str, why: str) -> None:
    """``--resume`` tries it again."""
    arm = runner.arms.get(name)
    if arm is None:
        raise UserError(f"the pretraining did not end: {why}")
    job = runner.job(arm)
    if not runner.result(arm).exists() or runner.damage(arm):  # one that failed has written what it found
        write_json(runner.result(arm), runner.record(arm, job, {"status": "killed", "why": why}))
    runner.tell(name)


if __name__ == "__main__":
    sys.exit(run_arm(Path(sys.argv[1]), sys.argv[2]))
