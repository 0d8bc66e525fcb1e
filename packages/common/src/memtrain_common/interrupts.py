"""SIGINT and SIGTERM end a command with one line and exit code 130 or 143, from its first statement on.

A command's console script is :func:`entrance`: it takes the signals before anything else is imported. Outside of a
training, which saves a checkpoint first (:mod:`memtrain_common.training.stop_signals`), a signal ends the process where
it stands: what is on disk is whole at every moment, so there is nothing to unwind, and no library on the stack can
swallow an exception. Nothing here imports more than the interpreter has loaded anyway.
"""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def nothing_lost(name: str) -> str:
    """What is said of a signal where nothing is being trained."""
    return f"stopped by {name} while nothing was being trained: nothing was lost"


class _Leaving:
    """What the handler knows."""

    prog = ""
    pid = 0
    """Of the process that took the signals: one forked from it ends without a line."""
    line: Callable[[str], str] = staticmethod(nothing_lost)
    """A signal's name -> what is said when it ends the process now."""
    unwinds = False
    to_the_end = False
    """Whether the process ends with the command, as a console script's does."""


_now = _Leaving()


def entrance(module: str, function: str, prog: str) -> Callable[[], None]:
    """A console script: ``module.function()``, imported with the signals taken already.

    They are taken when this is called, within the script's first line, if the process is that command.

    Args:
        prog: the command's name, for the line.
    """
    if [os.path.basename(word) for word in sys.argv[:1]] == [prog]:
        _take(prog)

    def main() -> None:
        _take(prog)
        _now.to_the_end = True
        getattr(importlib.import_module(module), function)()

    return main


@contextlib.contextmanager
def leaving(prog: str) -> Iterator[None]:
    """Within, the two signals end the process with a line of this command's.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """
    before = {s: signal.getsignal(s) for s in SIGNALS}
    was = dict(vars(_now))
    try:
        vars(_now).pop("line", None)  # what was trained in this process before is no matter of this command
        _take(prog)
        yield
    finally:
        if _now.to_the_end:  # how it ends is decided: a signal changes it no more, and Python's own end is no moment
            _set({s: signal.SIG_IGN for s in SIGNALS})
        else:
            _set(before)
            vars(_now).clear()
            vars(_now).update(was)


@contextlib.contextmanager
def saying(line: Callable[[str], str]) -> Iterator[None]:
    """Within, a signal that ends the process says ``line(its name)``."""
    before, _now.line = _now.line, line
    try:
        yield
    finally:
        _now.line = before


def say_from_now_on(line: Callable[[str], str]) -> None:
    """As :func:`saying`, to the end of the command."""
    _now.line = line


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Within, the first signal raises ``KeyboardInterrupt(signum)``: where other processes must be ended first."""
    _now.unwinds = True
    try:
        yield
    finally:
        _now.unwinds = False


def _take(prog: str) -> None:
    _now.prog, _now.pid = prog, os.getpid()
    _set({s: _leave for s in SIGNALS})


def _set(handlers: dict[signal.Signals, Any]) -> None:
    with contextlib.suppress(ValueError):  # not the main thread
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _leave(signum: int, frame: object) -> None:
    if _now.unwinds and os.getpid() == _now.pid:
        _now.unwinds = False
        raise KeyboardInterrupt(signum)
    if os.getpid() == _now.pid and os.environ.get("RANK", "0") == "0":  # of several processes the first one says it
        with contextlib.suppress(Exception):  # the signal may have come in the middle of a print
            sys.stdout.flush()
            sys.stderr.flush()
        clear = "\r\x1b[K" if os.isatty(2) else ""  # over a progress bar
        with contextlib.suppress(OSError):
            os.write(2, f"{clear}{_now.prog}: {_now.line(signal.Signals(signum).name)}\n".encode(errors="replace"))
    os._exit(128 + signum)
