"""What several test files use: running commands, training a small thing, comparing runs."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent  # the environment's commands lie beside its python


def run_command(words: Sequence[str], cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands to its end."""
    return subprocess.run([BIN / words[0], *words[1:]], cwd=cwd, capture_output=True, text=True, timeout=240, **kwargs)


def start_command(words: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    """Start one of the project's commands, in a session of its own, so that signals reach it alone."""
    return subprocess.Popen(
        [BIN / words[0], *words[1:]],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


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
