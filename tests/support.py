"""What several test files use: running commands, training a small thing, comparing runs."""

import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent  # the environment's commands lie beside its python


# What commands import when they run: loaded once in this process, before the first one is forked from it.
LIBRARIES = (
    "google.protobuf.descriptor_pb2", "matplotlib.backends.backend_agg", "peft", "scipy.stats", "sklearn.datasets",
    "torch._subclasses", "torchvision.transforms.functional", "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "transformers.models.roberta.modeling_roberta",
    "transformers.models.vit.modeling_vit", "backrazor.tasks.glue", "backrazor.tasks.train", "galore_vit.tasks.train",
    "lora_xs.tasks.glue", "lora_xs.tasks.instruct", "lte.tasks.train", "memtrain_apps.run.finetune",
    "memtrain_apps.run.language", "memtrain_apps.run.pictures", "memtrain_apps.run.pretrain",
    "torch.utils.tensorboard", "tyro._backends", "typeguard",
)  # fmt: skip


# tqdm's own lock is one for all processes that are forked from here: who is killed while he holds it keeps it for ever.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


@functools.cache
def load_libraries() -> None:
    """Load them, the first time."""
    for name in LIBRARIES:
        importlib.import_module(name)


class Remembered:
    """What forked processes have learned of operations on fake tensors (``measuring.fake_dispatch``), for those that
    are forked after them: a command predicts what dense training would save, and most of the time of that goes into
    operations that another command has asked torch before."""

    def __init__(self) -> None:
        file, name = tempfile.mkstemp()
        os.close(file)
        self._file = os.open(name, os.O_RDWR | os.O_APPEND)
        os.unlink(name)
        self._read = 0
        self._had = 0

    def recall(self) -> None:
        """Know what all that have ended knew."""
        known = self._known()
        if known is None:
            return
        start = self._read
        told = io.BytesIO(os.pread(self._file, os.fstat(self._file).st_size - start, start))
        with contextlib.suppress(Exception):  # the end, or what is still written, or was killed as it wrote
            while True:
                known.update(pickle.load(told))
                self._read = start + told.tell()
        self._had = len(known)

    def tell(self) -> None:
        """In a forked process: write what it has learned. Whether it can be written decides nothing."""
        known = self._known()
        if known is None or len(known) <= self._had:
            return
        text = io.BytesIO()
        with contextlib.suppress(Exception):
            _Operations(text).dump(dict(list(known.items())[self._had :]))
            os.write(self._file, text.getvalue())  # as one piece: others may write at the same time

    @staticmethod
    def _known() -> dict[Any, Any] | None:
        module = sys.modules.get("memtrain_common.measuring.fake_dispatch")
        return module._known if module is not None else None


class _Operations(pickle.Pickler):
    """Knows an operation of torch by its name."""

    def reducer_override(self, value: Any) -> Any:
        if type(value).__name__ != "OpOverload":
            return NotImplemented
        packet = value._overloadpacket._qualified_op_name.split("::")
        return _operation, (*packet, value._overloadname)


def _operation(namespace: str, name: str, overload: str) -> Any:
    import torch

    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


remembered = Remembered()


class Forked:
    """A Python function that runs in a process forked from this one, which has torch loaded already.

    ``wait`` has no limit of its own: how fast a machine is decides no test. pytest's own timeout, which ends a test
    that hangs, ends the process too. The interface is that of ``subprocess.Popen``, as far as tests use it.
    """

    def __init__(
        self,
        main: Callable[[], object],
        words: Sequence[str],
        cwd: Path,
        *,
        before: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            main: ends by returning, or as a console script does.
            words: its ``sys.argv``.
            before: called in the new process first, to disturb it or to spare it work.
            environment: variables besides this process's.
        """
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  # read when it has ended
        self.returncode: int | None = None
        remembered.recall()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(main, list(words), cwd, before, environment or {})

    def _child(
        self,
        main: Callable[[], object],
        words: list[str],
        cwd: Path,
        before: Callable[[], None] | None,
        environment: Mapping[str, str],
    ) -> None:
        code = 99
        try:
            os.setsid()
            os.chdir(cwd)
            os.environ.update(environment)
            for fd, file in enumerate(self._files, start=1):
                os.dup2(file.fileno(), fd)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = words
            if before is not None:
                before()
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            remembered.tell()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _await(self, options: int) -> bool:
        """Wait for a change of its state; whether it is paused rather than ended."""
        try:
            _, status = os.waitpid(self.pid, options)
        except BaseException:  # this test's time is over
            self.send_signal(signal.SIGKILL)
            raise
        if os.WIFSTOPPED(status):
            return True
        self.returncode = os.waitstatus_to_exitcode(status)
        return False

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def wait_until_paused(self) -> None:
        """Wait until it has paused itself, as :func:`pause_at` and :func:`pause_when` make it do; it must not end."""
        assert self._await(os.WUNTRACED), (self.returncode, *self._texts())

    def end_by(self, signum: int) -> subprocess.CompletedProcess[str]:
        """Let it pause itself, send it the signal there, and wait for its end: the same moment on every machine."""
        self.wait_until_paused()
        os.kill(self.pid, signum)
        os.kill(self.pid, signal.SIGCONT)
        return self.wait()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        while self.returncode is None:
            self._await(0)
        return subprocess.CompletedProcess([], self.returncode, *self._texts())

    def _texts(self) -> list[str]:
        for file in self._files:
            file.seek(0)
        return [file.read() for file in self._files]


class Command(Forked):
    """One of the project's commands in a forked process; :func:`run_installed` starts the installed script instead.

    It draws no pictures unless a test asks for them: to draw takes as long as a small training.
    """

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path,
        *,
        pictures: bool = False,
        before: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> None:
        load_libraries()
        (entry,) = metadata.entry_points(group="console_scripts", name=words[0])
        steps = [step for step in (None if pictures else without_pictures, before) if step]
        super().__init__(lambda: entry.load()(), words, cwd, before=both(*steps), **kwargs)


def run_command(words: Sequence[str], cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands to its end."""
    return Command(words, cwd, **kwargs).wait()


def run_script(source: str, cwd: Path, *, file: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python source as a script: in a forked process, where ``python -c`` would load torch anew.

    Args:
        file: where it comes from: modules beside it can be imported.
    """

    def main() -> None:
        sys.path.insert(0, str(file.parent) if file else "")
        exec(compile(source, str(file or "script"), "exec"), {"__name__": "__main__"})

    return Forked(main, [str(file or "script")], cwd).wait()


_LIGHT = """
import contextlib, io, json, os, sys, traceback
for source in json.load(sys.stdin):
    sys.stdout.flush()
    if os.fork() == 0:
        out, code = io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                exec(source, {"__name__": "__main__"})
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
                code = 1
        print(json.dumps([code, out.getvalue()]), flush=True)
        os._exit(0)
    os.wait()
"""


def run_light(sources: Sequence[str]) -> list[tuple[Any, str]]:
    """Run scripts that see nothing loaded, each as in a fresh interpreter; -> (exit code or message, output) of each.

    One interpreter starts, and each script has a process forked from it: for what an import or a --help must not load.
    """
    words = [sys.executable, "-c", _LIGHT]
    done = subprocess.run(words, input=json.dumps(list(sources)), capture_output=True, text=True, check=True)
    ends = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(ends) == len(sources), done.stderr
    return ends  # type: ignore[return-value]


def ranks_of(n: int, words: Sequence[str], cwd: Path, before: Callable[[], None] | None = None) -> list[Command]:
    """A command in ``n`` forked processes under torchrun's environment (gloo)."""
    port = free_port()
    return [Command(words, cwd, before=before, environment=torchrun_environment(r, n, port)) for r in range(n)]


def run_on(
    n: int, words: Sequence[str], cwd: Path, before: Callable[[], None] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in ``n`` processes to their ends."""
    return [rank.wait() for rank in ranks_of(n, words, cwd, before)]


def pause_when(owner: Any, method: str, condition: Callable[..., bool]) -> Callable[[], None]:
    """A ``before`` for a command: it pauses itself (SIGSTOP) at the first call of a method after which the
    condition, asked with the call's arguments, holds."""

    def before() -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if condition(*args, **kwargs):
                setattr(owner, method, original)
                os.kill(os.getpid(), signal.SIGSTOP)
            return result

        setattr(owner, method, watched)

    return before


def pause_at(step: int, name: str = "") -> Callable[[], None]:
    """A ``before``: the command pauses itself once the rows of a step, or of a later one, are in metrics.jsonl.

    Args:
        name: of the run folder, where the command has several.
    """
    from memtrain_common.runs.run_folder import RunFolder

    def reached(run: Any, _: Any) -> bool:
        written = run.metrics() if run.writes else []
        return bool(written) and written[-1]["step"] >= step and name in ("", run.path.name)

    return pause_when(RunFolder, "append_metrics", reached)


def without_pictures() -> None:
    """A ``before``: a session draws nothing, and no picture is saved."""
    import matplotlib.figure
    from memtrain_common.commands import session

    session.draw = lambda *args, **kwargs: ""
    matplotlib.figure.Figure.savefig = lambda self, path, **kwargs: None  # type: ignore[method-assign]


def forked_arms() -> None:
    """A ``before`` of ablate: its arms are forked from it, which has the libraries, not from a server that loads them
    anew. The test of a killed ablation has the server."""
    from memtrain_apps.ablate import ablate

    ablate.server = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment]


def both(*steps: Callable[[], None]) -> Callable[[], None]:
    """Several ``before`` in one."""

    def before() -> None:
        for step in steps:
            step()

    return before


def run_installed(words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the console script that the environment installed: slow, and as a person does it."""
    return subprocess.run([BIN / words[0], *words[1:]], cwd=cwd, capture_output=True, text=True)


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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def torchrun_environment(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of ``n`` on this machine."""
    ranks = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    return {**{k: str(v) for k, v in ranks.items()}, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def run_ranks(n: int, function: Callable[..., None], *args: Any, frozen: Sequence[int] = ()) -> None:
    """Run ``function(*args)`` in ``n`` processes under torchrun's environment (gloo); raise if one fails.

    Forked, not started anew: importing torch takes longer than such a test.

    Args:
        frozen: ranks that stop themselves (SIGSTOP); they are killed when the others have ended.
    """
    port = free_port()
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(r, n, port, errors, function, args)) for r in range(n)]
    for process in processes:
        process.start()
    left = {p.sentinel for rank, p in enumerate(processes) if rank not in frozen}
    try:
        while left and errors.empty():  # one that failed leaves the others waiting for it
            left -= set(connection.wait(left))
    finally:  # pytest's timeout comes here as well
        for process in processes:
            process.kill()
            process.join()
    assert errors.empty(), errors.get()


def _rank(rank: int, n: int, port: int, errors: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    os.environ.update(torchrun_environment(rank, n, port))
    try:
        function(*args)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os._exit(0)  # without pytest's own cleaning up
