"""A signal ends a command with one line and its exit code, whatever the command is at: starting, reporting, ending."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from memtrain_common import interrupts
from memtrain_common.commands.cli import run_command
from memtrain_common.interrupts import entrance, leaving, saying, unwinding
from support import Command, Forked, free_port, pause_when, run_on, torchrun_environment

BOTH = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


def ended(main, tmp_path, **kwargs):
    return Forked(main, ["prog"], tmp_path, **kwargs).wait()


@BOTH
def test_before_and_after_training_it_is_one_line(signum, tmp_path):
    name = signal.Signals(signum).name

    def body(argv):
        print("begun", end="")  # what was printed is not lost
        os.kill(os.getpid(), signum)
        print("gone on")

    def main():
        interrupts.say_from_now_on(lambda name: "what a training before it in this process said")
        run_command(body, prog="prog", argv=[])

    done = ended(main, tmp_path)
    assert done.returncode == 128 + signum
    assert done.stderr == f"prog: stopped by {name} while nothing was being trained: nothing was lost\n"
    assert done.stdout == "begun"


@BOTH
def test_a_library_on_the_stack_cannot_swallow_it(signum, tmp_path):
    def body(argv):
        while True:  # it stands for a callback in which Python prints and forgets every exception
            try:
                os.kill(os.getpid(), signum)
            except BaseException:
                print("swallowed")

    done = ended(lambda: run_command(body, prog="prog", argv=[]), tmp_path)
    assert (done.returncode, done.stdout) == (128 + signum, "")


@BOTH
def test_the_first_statement_of_a_command_is_covered(signum, tmp_path):
    """While the command's own module is imported: torch, numpy and tyro are not there yet."""
    source = f"""
import os, sys
assert not {{"torch", "numpy", "tyro"}} & set(sys.modules)
os.kill(os.getpid(), {int(signum)})
def main(): print("ran")
"""
    (tmp_path / "slow_command.py").write_text(source)
    start = "from memtrain_common.interrupts import entrance; entrance('slow_command', 'main', 'slow')()"
    done = subprocess.run([sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True)
    name = signal.Signals(signum).name
    assert done.returncode == 128 + signum
    assert done.stderr == f"slow: stopped by {name} while nothing was being trained: nothing was lost\n"


def test_console_scripts_begin_with_the_entrance():
    from importlib import metadata

    packages = ("backrazor.", "galore_vit.", "lora_xs.", "lte.", "memtrain_apps.")
    ours = [e for e in metadata.entry_points(group="console_scripts") if e.value.startswith(packages)]
    assert {e.name for e in ours} >= {"lte-train", "lora-xs", "galore-vit", "finetune", "ablate", "backrazor-train"}
    for entry in ours:
        assert entry.load().__qualname__ == entrance("m", "f", "p").__qualname__


def test_where_the_end_is_decided_a_signal_changes_nothing(tmp_path):
    def main():
        interrupts._now.to_the_end = True  # as a console script
        code = run_command(lambda argv: print("done"), prog="prog", argv=[])
        for signum in interrupts.SIGNALS:
            os.kill(os.getpid(), signum)
        time.sleep(0)
        raise SystemExit(code)

    done = ended(main, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_within_a_process_handlers_are_put_back():
    before = {s: signal.getsignal(s) for s in interrupts.SIGNALS}
    assert run_command(lambda argv: None, prog="prog", argv=[]) == 0
    with leaving("a"), leaving("b"):
        assert signal.getsignal(signal.SIGTERM) is interrupts._leave
    assert {s: signal.getsignal(s) for s in interrupts.SIGNALS} == before
    assert interrupts._now.prog == ""


@BOTH
def test_what_must_unwind_does_so_once(signum, tmp_path):
    def body(argv):
        with saying(lambda name: f"second {name}"), unwinding():
            try:
                os.kill(os.getpid(), signum)
            except KeyboardInterrupt as interrupt:
                print("unwound", interrupt.args)
                os.kill(os.getpid(), signum)

    done = ended(lambda: run_command(body, prog="prog", argv=[]), tmp_path)
    assert done.returncode == 128 + signum
    assert done.stdout == f"unwound ({int(signum)},)\n"
    assert done.stderr == f"prog: second {signal.Signals(signum).name}\n"


def test_other_ranks_and_forked_helpers_end_without_a_line(tmp_path):
    def helper(argv):
        if (pid := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    done = ended(lambda: run_command(helper, prog="prog", argv=[]), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "143\n", "")

    def rank(argv):
        os.kill(os.getpid(), signal.SIGTERM)

    done = ended(lambda: run_command(rank, prog="prog", argv=[]), tmp_path, environment={"RANK": "1"})
    assert (done.returncode, done.stderr) == (143, "")


# -- a command that trains -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    text = tmp_path_factory.mktemp("text")
    (text / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--block-size", "8", "--batch-size", "2"]
    method = ["--lte-heads", "2", "--lora-r", "2", "--warmup-iters", "1", "--sample-tokens", "0"]
    steps = ["--max-iters", "4", "--eval-interval", "2", "--eval-iters", "1", "--tracker", "none", "--device", "cpu"]
    return ["lte-train", "--data-dir", str(text), *shape, *method, *steps, "--out", "run"]


@pytest.mark.slow
@BOTH
def test_in_the_report_it_says_what_is_kept_and_the_report_is_made_again(signum, words, tmp_path):
    from memtrain_common.commands import session

    paused = pause_when(session, "result_content", lambda *a, **k: True)
    done = Command(words, tmp_path, before=paused).end_by(signum)
    assert done.returncode == 128 + signum, done.stderr
    name = signal.Signals(signum).name
    kept = "after step 4, the last one: its checkpoint is kept, and --resume run goes on behind it"
    assert done.stderr == f"lte-train: stopped by {name} {kept}\n"
    assert not (tmp_path / "run" / "result.json").exists()
    again = Command(["lte-train", "--resume", "run"], tmp_path).wait()
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@BOTH
def test_two_in_a_row_leave_at_once_with_the_right_code(signum, words, tmp_path):
    """The second comes while the checkpoint is written for the first: that one is not waited for."""
    from memtrain_common.runs.checkpoint import Checkpoints

    save = Checkpoints.save

    def disturbed(self, step, state, **kwargs):
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)
        return save(self, step, state, **kwargs)

    def before():
        Checkpoints.save = disturbed

    done = Command(words, tmp_path, before=before).wait()
    assert done.returncode == 128 + signum, done.stderr
    name = signal.Signals(signum).name
    assert done.stderr == f"lte-train: stopped at once by a second {name} in step 3; there is no checkpoint\n"
    assert not list(Path(tmp_path, "run", "checkpoints").glob("step-*"))


def test_a_script_takes_the_signals_in_its_first_line(monkeypatch):
    """When it is imported, and only in the process that is this command."""
    taken = []
    monkeypatch.setattr(interrupts, "_take", taken.append)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lte-train", "--resume", "run"])
    for prog in ("lte-train", "lte-prepare"):
        entrance("lte.cli", "main", prog)
    assert taken == ["lte-train"]


def beginning(monkey):
    """The command as rank 0 of two, of which the other one never begins."""
    from memtrain_common.training import distributed

    return dict(before=lambda: monkey(distributed), environment=torchrun_environment(0, 2, free_port()))


@pytest.mark.slow
def test_a_rank_that_never_begins_ends_the_others(words, tmp_path):
    def soon(distributed):
        distributed.MEETING_S = 1.0

    done = Command(words, tmp_path, **beginning(soon)).wait()
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(
        "lte-train: error: the 2 processes did not come together within 1 s: one ended before"
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_before_the_group_is_made_ends_the_others(words, tmp_path, lost):
    """Killed between the rendezvous and the connections, whether or not it keeps the store."""

    def before():
        from memtrain_common.training import distributed

        distributed.MEETING_S = 1.0
        if os.environ["RANK"] == str(lost):
            distributed.dist.init_process_group = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    ranks = run_on(2, words, tmp_path, before)
    assert ranks[lost].returncode == -signal.SIGKILL
    assert ranks[1 - lost].returncode == 1, ranks[1 - lost].stderr
    assert "lte-train: error: the 2 processes did not come together within 1 s: one e" in ranks[1 - lost].stderr
    assert "Traceback" not in ranks[1 - lost].stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["Session.open", "Session.finish"])
def test_a_rank_that_dies_outside_of_the_training_ends_the_others(words, tmp_path, moment):
    def before():
        from memtrain_common.commands import session

        name = moment.split(".")[1]
        method = getattr(session.Session, name)

        def dying(*args, **kwargs):
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "finish":
                session.gather_objects(0)  # as a command may
            return method(*args, **kwargs)

        setattr(session.Session, name, dying)

    first, second = run_on(2, words, tmp_path, before)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1, first.stderr
    assert first.stderr == "lte-train: error: stopped, since another process is lost (its connection broke)\n"


@BOTH
def test_a_signal_ends_the_wait_for_other_ranks(signum, words, tmp_path):
    class Waiting(threading.Thread):
        def join(self, timeout=None):
            os.kill(os.getpid(), signum)
            super().join(timeout)

    def disturbed(distributed):
        distributed.threading = SimpleNamespace(Thread=Waiting)

    done = Command(words, tmp_path, **beginning(disturbed)).wait()
    assert done.returncode == 128 + signum
    name = signal.Signals(signum).name
    assert done.stderr == f"lte-train: stopped by {name} while nothing was being trained: nothing was lost\n"
