"""Every command that trains, killed on two processes: resumed on two it is the run that nothing disturbed, to the
byte; resumed on one it goes on to the same end. The runs are those of ``fixtures/runs_before_rooms``, made anew.
"""

import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
from before_rooms import COMMANDS, FOLDER, QUICK, resumed_by
from support import (
    free_port,
    newest_checkpoint,
    pause_at,
    ranks_of,
    rows,
    run_command,
    run_on,
)

pytestmark = pytest.mark.slow
NAMES = [n for n in COMMANDS if n not in ("galore-vit-melo", "finetune-galore")]  # one of each command
MIDDLE = 5
"""Each of them has eight steps, and a checkpoint of the fourth."""
OTHER_ON_ONE = ("backrazor-train", "backrazor-glue", "finetune", "lora-xs-glue")
"""One process does not compute what two do: Back Razor chooses what it keeps within what a process has of the batch,
and the encoder's dropout is drawn by each process."""


def place(folder):
    folder.mkdir()
    (folder / "inputs").symlink_to(FOLDER / "inputs")
    return folder


def weights(run):
    """Every byte of the newest checkpoint's tensors, and of what the run leaves for use."""
    files = [*newest_checkpoint(run).glob("*.safetensors"), *run.glob("*.safetensors"), *run.glob("*/*.safetensors")]
    return {f.relative_to(run): f.read_bytes() for f in files}


def begun(name):
    """The command in today's words."""
    words = [*COMMANDS[name], *QUICK, "--out", "run"]
    if name == "lte-train":
        words += ["--dropout", "0"]  # each process draws its own
    if name == "backrazor-glue":
        words += ["--max-iters", "8"]  # its batch is of a process
    if name == "galore-vit":
        words[words.index("--rank")] = "--galore-rank"
    return words


def resumed(name):
    return [*resumed_by(name), "run"]


@pytest.mark.parametrize("name", NAMES)
def test_killed_on_two_processes_it_goes_on_on_two_and_on_one(name, tmp_path):
    words = begun(name)
    whole, killed = place(tmp_path / "whole"), place(tmp_path / "killed")
    for done in run_on(2, words, whole):
        assert done.returncode == 0, done.stderr

    ranks = ranks_of(2, words, killed, pause_at(MIDDLE))
    ranks[0].wait_until_paused()
    for signum in (signal.SIGSTOP, signal.SIGKILL):  # stopped before, or the second would see that the first is gone
        for rank in ranks:
            rank.send_signal(signum)
    assert [rank.wait().returncode for rank in ranks] == [-signal.SIGKILL] * 2
    assert rows(killed / "run")[-1]["step"] < rows(whole / "run")[-1]["step"]
    alone = tmp_path / "alone"
    shutil.copytree(killed, alone, symlinks=True)

    for done in run_on(2, resumed(name), killed):
        assert done.returncode == 0, done.stderr
    assert rows(killed / "run") == rows(whole / "run")
    assert weights(killed / "run") == weights(whole / "run")

    done = run_command(resumed(name), alone)
    assert done.returncode == 0, done.stderr
    assert "was made by 2 processes, not 1" in done.stdout
    a, b = rows(alone / "run"), rows(whole / "run")
    assert [(r["step"], r["split"]) for r in a] == [(r["step"], r["split"]) for r in b]
    if name in OTHER_ON_ONE:
        assert all(math.isfinite(r["loss"]) for r in a)
    else:
        assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-3, abs=1e-4)


def test_torchrun_itself_goes_on_with_a_run(tmp_path):
    """The advice after a lost process, word for word: one command, since torchrun starts interpreters anew."""
    words, here = begun("lte-train"), place(tmp_path / "here")
    assert run_command(words, here).returncode == 0
    before = rows(here / "run")
    shutil.rmtree(newest_checkpoint(here / "run"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        [*torchrun, *resumed("lte-train")],
        cwd=here,
        env={**os.environ, "PATH": path, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "was made by 1 process, not 2" in done.stdout
    assert [r["loss"] for r in rows(here / "run")] == pytest.approx([r["loss"] for r in before], rel=1e-3, abs=1e-4)
