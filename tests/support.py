"""What several test files use: running commands, training a small thing, comparing runs."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent  # the environment's commands lie beside its python


class Command:
    """One of the project's commands, running in a process forked from this one.

    Forked, because importing torch takes longer than what such a test does; :func:`run_installed` starts the
    installed console script instead. The interface is that of ``subprocess.Popen``, as far as tests use it.
    """

    def __init__(self, words: Sequence[str], cwd: Path, before: Callable[[], None] | None = None) -> None:
        (entry,) = metadata.entry_points(group="console_scripts", name=words[0])
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  # read when it has ended
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(entry, list(words), cwd, before)

    def _child(self, entry: Any, words: list[str], cwd: Path, before: Callable[[], None] | None) -> None:
        code = 99
        try:
            os.setsid()
            os.chdir(cwd)
            for fd, file in enumerate(self._files, start=1):
                os.dup2(file.fileno(), fd)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = words
            if before is not None:
                before()
            entry.load()()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def wait(self, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Wait for its end; kill it if it takes too long."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"the command did not end within {seconds} s")
            time.sleep(0.005)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
        assert self.returncode is not None
        return subprocess.CompletedProcess([], self.returncode, *texts)


def run_command(words: Sequence[str], cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands to its end."""
    return Command(words, cwd, **kwargs).wait()


def run_installed(words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the console script that the environment installed: slow, and as a person does it."""
    return subprocess.run([BIN / words[0], *words[1:]], cwd=cwd, capture_output=True, text=True, timeout=240)


def pip_environment() -> dict[str, str]:
    """This environment for a pip that knows nothing of the machine's own settings: no constraints, no find-links.

    What a test installs must not depend on them; and the environment's commands (hatchling's) come first on PATH.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PATH": f"{BIN}:{os.environ['PATH']}"}


def assert_refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Exit code 2, and one sentence on stderr that holds the expected words; no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in expected:
        assert word in lines[0], lines[0]


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock decides."""
    clocks = {"seconds", "tokens_per_second", "samples_per_second"}
    text = (run / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in text.splitlines()]


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def run_ranks(n: int, function: Callable[..., None], *args: Any) -> None:
    """Run ``function(*args)`` in ``n`` processes under torchrun's environment (gloo); raise if one fails.

    Forked, not started anew: importing torch takes longer than such a test.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(r, n, port, errors, function, args)) for r in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    late = [p for p in processes if p.is_alive()]
    for process in late:
        process.kill()
    assert not late, "a process did not end within two minutes"
    assert errors.empty(), errors.get()


def _rank(rank: int, n: int, port: int, errors: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    try:
        function(*args)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os._exit(0)  # without pytest's own cleaning up
