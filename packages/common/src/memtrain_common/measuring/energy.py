"""Energy of a run in joules: NVML's total-energy counter on NVIDIA, RAPL for the processor where it is readable.

What no counter tells is "unavailable" (``None``), never 0. Counters are read as differences over the whole run, so
their resolution (tens of milliseconds on NVML) does not add up.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..optional import installed

RAPL_ROOT = Path("/sys/class/powercap")
Counter = Callable[[], float]  # joules since some fixed moment, never falling


class EnergyMeter:
    """Joules between entering and leaving, sampled into ``energy.csv`` (seconds, watts, joules so far).

    Args:
        csv: where to write the samples; None keeps none. A resumed run appends, and its joules go on from the
            last row.
        gpus: CUDA device indices whose energy counts.
        interval: seconds between samples.
        counters: the counters by name, if not those of this machine (tests give their own).
    """

    def __init__(
        self,
        csv: Path | None = None,
        *,
        gpus: Sequence[int] = (),
        interval: float = 1.0,
        counters: dict[str, Counter] | None = None,
    ) -> None:
        self._counters = {**nvml_counters(gpus), **rapl_counters()} if counters is None else counters
        self._csv = csv
        self._interval = interval
        self._stop = threading.Event()
        self._lock = threading.RLock()  # the sampling thread and the caller read the same counters
        self._thread: threading.Thread | None = None
        self._begin: dict[str, float] = {}
        self._started = 0.0
        self._seconds_before, self._joules_before = _last_sample(csv)
        self._last = (0.0, 0.0)  # seconds, joules of this process at the last sample

    @property
    def source(self) -> str:
        """The counters' names, or "unavailable"."""
        return " + ".join(self._counters) or "unavailable"

    @property
    def joules(self) -> float | None:
        """Joules so far, earlier parts of a resumed run included; None where there is no counter."""
        return self._joules_before + self._measured() if self._counters else None

    @property
    def seconds(self) -> float:
        """Seconds over which the joules were counted, earlier parts of a resumed run included."""
        return self._seconds_before + time.monotonic() - self._started

    def _measured(self) -> float:
        with self._lock:
            return sum(read() - self._begin.get(name, 0.0) for name, read in self._counters.items())

    def __enter__(self) -> "EnergyMeter":
        self._started = time.monotonic()
        self._begin = {name: read() for name, read in self._counters.items()}
        if self._counters:
            if self._csv is not None:
                whole = self._csv.read_text().rpartition("\n")[0] if self._csv.exists() else "seconds,watts,joules"
                self._csv.write_text(whole + "\n")  # without a row that a kill cut short
            self._thread = threading.Thread(target=self._run, daemon=True, name="energy")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.sample()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()

    def sample(self) -> None:
        """Read the counters (RAPL's wrap around if nobody looks for long) and append one row to the CSV."""
        with self._lock:
            seconds, joules = time.monotonic() - self._started, self._measured()
            watts = (joules - self._last[1]) / max(seconds - self._last[0], 1e-9)
            self._last = (seconds, joules)
            row = f"{self._seconds_before + seconds:.3f},{watts:.3f},{self._joules_before + joules:.3f}\n"
            if self._csv is not None:
                with self._csv.open("a") as file:
                    file.write(row)


def nvml_counters(gpus: Sequence[int]) -> dict[str, Counter]:
    """One counter a CUDA device, matched by UUID (``CUDA_VISIBLE_DEVICES`` renumbers devices, NVML does not)."""
    if not gpus or not installed("pynvml"):
        return {}
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        counters: dict[str, Counter] = {}
        for gpu in gpus:
            uuid = f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"
            counter = _nvml_counter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
            counter()  # raises here, not in the middle of the run, on a device without the counter
            counters[f"NVML gpu {gpu}"] = counter
        return counters
    except pynvml.NVMLError:
        return {}


def _nvml_counter(pynvml: Any, handle: Any) -> Counter:
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # millijoules


def rapl_counters(root: Path = RAPL_ROOT) -> dict[str, Counter]:
    """One counter a processor package that this user may read. Sub-zones are parts of a package: not added."""
    counters: dict[str, Counter] = {}
    for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
        if zone.name.count(":") != 1:
            continue
        try:
            limit = int((zone / "max_energy_range_uj").read_text())
            counters[f"RAPL {(zone / 'name').read_text().strip()}"] = _RaplCounter(zone / "energy_uj", limit)
        except (OSError, ValueError):
            continue  # not readable by this user: a recent kernel lets only root read it
    return counters


class _RaplCounter:
    """A package's joules. The register wraps around at ``limit`` microjoules (minutes to hours under load)."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit
        self._last = int(path.read_text())
        self._total = 0

    def __call__(self) -> float:
        now = int(self._path.read_text())
        self._total += (now - self._last) % (self._limit + 1)
        self._last = now
        return self._total / 1e6


def _last_sample(csv: Path | None) -> tuple[float, float]:
    if csv is None or not csv.exists():
        return 0.0, 0.0
    for line in reversed(csv.read_text().splitlines()):
        parts = line.split(",")
        try:
            return float(parts[0]), float(parts[2])
        except (ValueError, IndexError):
            continue  # the header, or a row cut short by a kill
    return 0.0, 0.0
