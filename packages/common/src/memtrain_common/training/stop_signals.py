"""SIGTERM, SIGINT and SIGUSR1 as a wish to stop after a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class LeaveEvaluation(Exception):
    """Raised in the middle of an evaluation when a signal comes: nothing of it is kept, and it is begun again."""


class StopSignals:
    """While entered, the first signal sets ``received``; a second one of the same kind acts as it would anyway.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._raise = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, self._before[signum])
        self.received = signum
        if self._raise:
            self._raise = False
            raise LeaveEvaluation

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Around work that changes nothing (evaluation): a signal leaves it by :class:`LeaveEvaluation`."""
        self._raise = True
        try:
            if self.received:
                raise LeaveEvaluation
            yield
        finally:
            self._raise = False
