"""Trying every command that trains with kills, signals, damage, changed inputs and files from strangers.

A moment is a number of Python calls, counted by the interpreter's trace function: the same on every machine, however
busy it is. Commands run in processes forked from this one.
"""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from before_rooms import COMMANDS as BEFORE
from before_rooms import FOLDER, QUICK, resumed_by
from memtrain_common.files import read_json, write_json
from support import Command, newest_checkpoint, rows

# File that begins a session -> the run that stands for it. A new command enters here (tests/chaos/test_chaos.py asks).
REGISTERED = {
    "lte/tasks/train.py": "lte-train",
    "backrazor/tasks/train.py": "backrazor-train",
    "backrazor/tasks/glue.py": "backrazor-glue",
    "galore_vit/tasks/train.py": "galore-vit",
    "lora_xs/tasks/glue.py": "lora-xs-glue",
    "lora_xs/tasks/instruct.py": "lora-xs-instruct",
    "memtrain_apps/run/training.py": "finetune",
}
NAMES = (*REGISTERED.values(), "pretrain")
ON_BINS = "lte-train on bins"
"""The same command on what lte-prepare made of the text."""


@dataclass(frozen=True)
class Found:
    """What came of one try."""

    kind: str
    what: str
    right: bool
    why: str = ""
    """What was not as it should be, for who reads it."""
    above_mib: float = 0.0
    """Peak memory above the idle command's."""


def words_of(name: str) -> list[str]:
    """A run's command in today's words, with its output in ``run``."""
    words = [*BEFORE[name.removesuffix(" on bins")], *QUICK, "--out", "run"]
    if name == ON_BINS:
        at = words.index("--tokenizer")
        del words[at : at + 2]
        words[words.index("--data-dir") + 1] = "bins"
    if name == "galore-vit":
        words[words.index("--rank")] = "--galore-rank"
    return words


def resuming(name: str) -> list[str]:
    return [*resumed_by(name.removesuffix(" on bins")), "run"]


def place(folder: Path, *, copied: bool = False) -> Path:
    """A folder that a run may have for itself, with the inputs as a link, or as a copy that may be changed."""
    folder.mkdir(parents=True)
    if copied:
        shutil.copytree(FOLDER / "inputs", folder / "inputs")
    else:
        (folder / "inputs").symlink_to(FOLDER / "inputs")
    return folder


def at_call(number: int, *signals: int, told: str = "") -> Any:
    """A ``before``: at its ``number``-th Python call the process sends itself the signals, one after another call.

    Args:
        told: a file that gets the number of all calls, where the process comes to its end.
    """

    def before() -> None:
        count, left = 0, list(signals)

        def watch(frame: Any, event: str, argument: Any) -> None:  # of each call; nothing within it is traced
            nonlocal count
            count += 1
            if count >= number and left:
                os.kill(os.getpid(), left.pop(0))

        if told:
            leave = os._exit

            def telling(code: int) -> None:
                sys.settrace(None)
                Path(told).write_text(str(count))
                leave(code)

            os._exit = telling  # type: ignore[assignment]
        sys.settrace(watch)

    return before


class Whole:
    """Each command's run that nothing disturbed, made once, and how many calls it took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019  # lives as long as the process
    def run(self, name: str) -> tuple[Path, int]:
        cwd = self.folder / "whole" / name
        counted = cwd / "calls"
        if not counted.exists():
            shutil.rmtree(cwd, ignore_errors=True)
            place(cwd)
            if name == ON_BINS:
                shutil.copytree(self.others() / "bins", cwd / "bins")
            partial = cwd / "calls.partial"
            done = Command(words_of(name), cwd, before=at_call(0, told=str(partial))).wait()
            assert done.returncode == 0, done.stderr
            partial.rename(counted)
        return cwd / "run", int(counted.read_text())

    @functools.cache  # noqa: B019
    def others(self) -> Path:
        """Files that other commands write, made by their writers: bins, a MeLo adapter, an ablation's result."""
        from galore_vit.melo_file import read_melo, write_melo

        folder, then = self.folder / "others", FOLDER / "runs"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        words = ["lte-prepare", str(FOLDER / "inputs" / "text"), "--tokenizer", "chars", "--out", "bins"]
        done = Command(words, folder).wait()
        assert done.returncode == 0, done.stderr
        write_melo(read_melo(vit(), then / "galore-vit-melo" / "adapter.safetensors"), folder / "melo.safetensors")
        (arm,) = (then / "ablation" / "results").glob("*.json")
        write_json(folder / "arm.json", read_json(arm))
        return folder


def vit() -> Any:
    """A fresh ViT with the fixture's weights."""
    from memtrain_common.models.vit import load_vit

    return load_vit(FOLDER / "inputs" / "vit", image_size=8, classes=2)[0]


def tensors(run: Path) -> dict[str, bytes]:
    """Every byte of the newest checkpoint's tensors, and of what the run leaves for use."""
    files = [*newest_checkpoint(run).glob("*.safetensors"), *run.glob("*.safetensors"), *run.glob("*/*.safetensors")]
    return {str(f.relative_to(run)): f.read_bytes() for f in files}


def kill(whole: Whole, name: str, draw: random.Random, cwd: Path) -> Found:
    """Killed at a random call, and resumed, at most twice: the same bytes as without."""
    reference, calls = whole.run(name)
    moments = [draw.randrange(1, calls) for _ in range(draw.choice((1, 1, 2)))]
    place(cwd)
    for moment in moments:
        begun = (cwd / "run" / "config.json").exists()
        if not begun:
            shutil.rmtree(cwd / "run", ignore_errors=True)
        words = resuming(name) if begun else words_of(name)
        Command(words, cwd, before=at_call(moment, signal.SIGKILL)).wait()
    begun = (cwd / "run" / "config.json").exists()
    words = resuming(name) if begun else words_of(name)
    done = Command(words, cwd).wait()
    what = f"{name} at calls {moments} of {calls}"
    if done.returncode:
        return Found("kill", what, False, done.stderr[-500:])
    same = rows(cwd / "run") == rows(reference) and tensors(cwd / "run") == tensors(reference)
    return Found("kill", what, same, "" if same else "other bytes than those of the run that nothing disturbed")


def interrupt(whole: Whole, name: str, draw: random.Random, cwd: Path) -> Found:
    """SIGINT or SIGTERM at a random call, or twice in a row: one line, and 130 or 143."""
    _, calls = whole.run(name)
    signum, times = draw.choice((signal.SIGINT, signal.SIGTERM)), draw.choice((1, 1, 1, 2))
    moment = draw.randrange(1, calls)
    done = Command(words_of(name), place(cwd), before=at_call(moment, *[signum] * times)).wait()
    return judged(f"{name} {signum.name} x{times} at call {moment} of {calls}", signum, done.returncode, done.stderr)


def judged(what: str, signum: signal.Signals, code: int, said: str) -> Found:
    """Whether the end of an interrupted command is the right one."""
    right = code == 128 + signum and said.count("\n") == 1 and f"by {signum.name}" in said.replace("a second ", "")
    return Found("signal", what, right, "" if right else f"{code}: {said[-500:]}")


START = """
import os, signal, sys
count = 0
def watch(frame, event, argument):
    global count
    count += 1
    if count == {moment}:
        sys.settrace(None)
        os.kill(os.getpid(), {signum})
sys.argv = {words!r}
from {module} import {function}
sys.settrace(watch)
{function}()
"""


def interrupt_start(name: str, draw: random.Random, cwd: Path) -> Found:
    """The same of a fresh interpreter, within the first calls: most are those of imports, torch's among them."""
    signum, moment = draw.choice((signal.SIGINT, signal.SIGTERM)), draw.choice((1, 10, 100, 3000, 10_000, 30_000))
    words = words_of(name)
    (entry,) = metadata.entry_points(group="console_scripts", name=words[0])
    module, function = entry.value.split(":")
    source = START.format(moment=moment, signum=int(signum), module=module, function=function, words=words)
    python = [sys.executable, "-c", source]
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores it
    done = subprocess.run(python, cwd=place(cwd), capture_output=True, text=True, preexec_fn=default)
    return judged(f"{name} {signum.name} at call {moment} of a fresh start", signum, done.returncode, done.stderr)
