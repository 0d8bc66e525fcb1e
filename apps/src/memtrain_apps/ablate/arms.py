"""Arms, each in a process of its own: what one of them does to itself, no other one feels.

Processes are forked from a server that has loaded the libraries, so that an arm starts in milliseconds. An arm ends as

- "done": it wrote a result;
- "refused": in one sentence, by what it found to have no meaning for the model;
- "out of memory": by its own limit, or the device's;
- "diverged": the loss was no longer finite;
- "killed": by a signal from outside;
- "failed": by an exception that nobody foresaw, whose traceback is in its log;
- "stopped": together with the whole, after a checkpoint. It is not finished, and goes on later.
"""

import contextlib
import fcntl
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from memtrain_common.console import format_bytes
from memtrain_common.errors import DivergedError, Stopped, UserError, ran_out_of_memory
from memtrain_common.files import read_json, write_json
from tqdm import tqdm

PRELOAD = "memtrain_apps.ablate.preload"


@dataclass(frozen=True)
class Job:
    """One process's work. Everything in it is pickled."""

    name: str
    run: Callable[["Job"], dict[str, Any] | None]
    """Does it; what it returns stands in the outcome's "content"."""
    words: tuple[str, ...]
    """finetune's flags, without the device."""
    device: str = "cpu"
    folder: Path = Path()
    """The run's folder, which may hold the beginning of it."""
    log: Path = Path()
    """The process's console."""
    outcome: Path = Path()
    """JSON that the process leaves when it ends by itself: {"status", "why", "content"}."""
    limit_bytes: int = 0
    """Of memory; 0 is none."""


def run_jobs(
    jobs: Iterable[Job],
    places: list[str],
    *,
    on_end: Callable[[Job, dict[str, Any]], Iterable[Job]],
    while_waiting: Callable[[list[Job]], None] = lambda _: None,
    context: Any = None,
) -> None:
    """Run jobs in their order, one at a time in each place.

    Args:
        places: devices; "cpu" twice runs two at once there.
        on_end: told each outcome; jobs that it returns come next.
        while_waiting: called a few times a second with the jobs that run.
        context: of multiprocessing; the forking server if None.

    Raises:
        KeyboardInterrupt: after SIGINT or SIGTERM, when every arm has saved a checkpoint and ended.
    """
    context = context or server()
    queue = list(jobs)
    free = list(places)
    running: dict[Any, tuple[Job, Any, str]] = {}  # sentinel -> (job, process, place)
    try:
        while queue or running:
            while queue and free:
                place = free.pop(0)
                job = _placed(queue.pop(0), place)
                job.outcome.unlink(missing_ok=True)
                process = context.Process(target=_process, args=(job,), name=job.name)
                process.start()
                running[process.sentinel] = (job, process, place)
            for sentinel in wait(list(running), timeout=0.3):
                job, process, place = running.pop(sentinel)
                process.join()
                free.append(place)
                queue[:0] = on_end(job, outcome_of(job, process.exitcode))
            while_waiting([job for job, _, _ in running.values()])
    except BaseException:
        for _, process, _ in running.values():
            process.terminate()  # SIGTERM: the loop saves a checkpoint
        for _, process, _ in running.values():
            process.join(120)
            process.kill()
        raise


def server() -> Any:
    """The context of the forking server, started now: it loads the libraries while this process goes on."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()
    return context


def _placed(job: Job, place: str) -> Job:
    return Job(**{**vars(job), "device": place})


def outcome_of(job: Job, code: int | None) -> dict[str, Any]:
    """What became of a job whose process has ended."""
    try:
        return read_json(job.outcome)
    except (OSError, ValueError):
        pass
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        if job.log.exists() and "std::bad_alloc" in job.log.read_text(errors="replace")[-2000:]:
            return {"status": "out of memory", "why": f"an allocation failed where no error can be raised ({name})"}
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return {"status": "killed", "why": f"killed by {name}{hint}"}
    return {"status": "failed", "why": f"its process ended with code {code}; {job.log} tells more"}


# -- within an arm's process ---------------------------------------------------------------------------------------


def _process(job: Job) -> None:
    """The whole life of one arm."""
    end_with_the_parent()
    live(job)
    os._exit(0)  # the interpreter's own end takes longer than some arms


def live(job: Job) -> None:
    """Do a job in this process, whose console becomes the job's log, and write its outcome."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # whole lines, whatever ends the process
    tqdm.set_lock(threading.RLock())  # its own kind is a semaphore of the system, which outlives os._exit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    outcome: dict[str, Any]
    try:
        wait_until_free(job.folder)
        with memory_limit(job.limit_bytes, job.device):
            outcome = {"status": "done", "content": job.run(job)}
    except (Stopped, KeyboardInterrupt) as stop:
        print(stop)
        outcome = {"status": "stopped", "why": str(stop)}
    except DivergedError as error:
        outcome = {"status": "diverged", "why": str(error)}
    except UserError as error:
        outcome = {"status": "refused", "why": str(error)}
    except BaseException as error:
        traceback.print_exc()
        if is_out_of_memory(error, limited=job.limit_bytes > 0):
            said = _first_line(error)
            place = next((where for where, words in SHORT_OF_MEMORY.items() if _any_of(words, error)), "")
            limited = f", with --memory-limit {format_bytes(job.limit_bytes)}" if job.limit_bytes else ""
            outcome = {
                "status": "out of memory",
                "why": (said if is_out_of_memory(error) else f"no memory {place} ({said})") + limited,
            }
        else:
            outcome = {"status": "failed", "why": f"{type(error).__name__}: {_first_line(error)}"}
    sys.stdout.flush()
    sys.stderr.flush()
    write_json(job.outcome, outcome)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signum)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def end_with_the_parent() -> None:
    """Stop, after a checkpoint, when the process that started this one is gone: nobody would read the result."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, daemon=True, name="parent").start()


def wait_until_free(folder: Path, seconds: float = 60) -> None:
    """Wait while a process holds the run's folder: an arm of a killed ablation may still write its checkpoint.

    Raises:
        UserError: if it holds it for longer.
    """
    lock = folder / ".lock"
    deadline = time.monotonic() + seconds
    while lock.exists():
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            except OSError:  # a file system without locks
                return
        if time.monotonic() > deadline:
            raise UserError(f"{folder} is in use by another process: end that one")
        time.sleep(0.2)


@contextlib.contextmanager
def memory_limit(limit_bytes: int, device: str) -> Iterator[None]:
    """Within, an allocation that would take this process beyond the limit fails.

    On CUDA the limit is the allocator's; on the CPU it is of writable memory (RLIMIT_DATA) beyond what the process
    has now.
    """
    if not limit_bytes:
        yield
    elif device.startswith("cuda"):
        import torch

        index = torch.device(device).index or 0
        whole = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / whole), index)
        yield
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_writable_bytes() + limit_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _writable_bytes() -> int:
    """What RLIMIT_DATA counts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


SHORT_OF_MEMORY = {
    "for a thread's stack": ("Resource temporarily unavailable", "can't start new thread"),
    "within oneDNN": ("could not execute a primitive", "could not create a primitive", "could not create a memory obj"),
    "within Python": ("error return without exception set", "without setting an exception"),
}
"""Where memory is short and nothing else is wrong, what is said of it: by threads, oneDNN, and extensions in C."""


def is_out_of_memory(error: BaseException, *, limited: bool = False) -> bool:
    """Whether an exception says that memory ran out: Python's, torch's on CUDA, or torch's on the CPU.

    Args:
        limited: under a memory limit, where a thread that cannot be started is one whose stack does not fit, a kernel
            of oneDNN that cannot run one whose buffers do not, and a call that fails without an exception one whose
            exception did not: they say no more.
    """
    return ran_out_of_memory(error) or (limited and any(_any_of(w, error) for w in SHORT_OF_MEMORY.values()))


def _any_of(texts: Collection[str], error: BaseException) -> bool:
    return isinstance(error, RuntimeError | SystemError | OSError) and any(t in str(error) for t in texts)
