"""Are the other processes still there? Asked beside a training that does not speak to them at every step."""

import threading
import time
from types import TracebackType

import torch.distributed as dist

from .distributed import store, world


class Heartbeat:
    """While entered, a thread says in the process group's store that this process lives, and listens for the others.

    Without several processes, or with ``patience_s`` of 0, it does nothing.
    """

    def __init__(self, patience_s: float) -> None:
        """``patience_s``: seconds of silence after which a process counts as lost."""
        self._patience_s, self._every_s = patience_s, min(1.0, patience_s / 5)
        self._lost = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        if world().size > 1 and self._patience_s > 0:
            self._thread = threading.Thread(target=self._beat, args=(store("heartbeat"),), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self._every_s)

    def check(self) -> None:
        """Raises:
        ConnectionAbortedError: if another process has been silent for too long.
        """
        if self._lost:
            raise ConnectionAbortedError(self._lost)

    def _beat(self, shared: dist.Store) -> None:
        me, others = world().rank, [r for r in range(world().size) if r != world().rank]
        heard = {r: ("", time.monotonic()) for r in others}
        count, last = 0, time.monotonic()
        while not self._stop.wait(self._every_s):
            now = time.monotonic()
            if now - last > self._patience_s / 2:  # this process slept itself: the others get their time again
                heard = {r: (said, now) for r, (said, _) in heard.items()}
            last, count = now, count + 1
            try:
                shared.set(str(me), str(count))
                for r in others:
                    said = shared.get(str(r)).decode() if shared.check([str(r)]) else ""
                    if said != heard[r][0] or said == _DONE:
                        heard[r] = (said, now)
                    elif now - heard[r][1] > self._patience_s:
                        self._lost = f"another process is lost (rank {r} was silent for {self._patience_s:g} s)"
            except (RuntimeError, dist.DistError):
                self._lost = "another process is lost (the store that rank 0 keeps does not answer)"
            if self._lost:
                return
        try:
            shared.set(str(me), _DONE)
        except (RuntimeError, dist.DistError):
            return  # the one that kept the store is done before us


_DONE = "done"
