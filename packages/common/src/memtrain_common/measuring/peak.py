"""The most that a phase of training holds: the allocator's peak on CUDA, the resident set's elsewhere."""

import resource
from pathlib import Path

import torch


class PeakMeter:
    """Peak memory of a phase (training, evaluation), in bytes; each phase has its own peak.

    On CUDA the allocator's ``max_memory_allocated``. On the CPU the resident set's high-water mark, which Linux lets
    a process reset; where it does not, the phases cannot be told apart and :meth:`peak` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks: dict[str, int] = {}
        self._phase: str | None = None

    def begin(self, phase: str) -> None:
        """End the phase before, and begin ``phase``; nothing changes where it is going on already."""
        if phase == self._phase:
            return
        self.end()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._phase = phase
        elif _reset_resident_peak():
            self._phase = phase

    def end(self) -> None:
        if self._phase is not None:
            now = self._now()
            if now is not None:
                self._peaks[self._phase] = max(now, self._peaks.get(self._phase, 0))
        self._phase = None

    def peak(self, phase: str) -> int | None:
        return self._peaks.get(phase)

    def _now(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM")


def memory_in_use(device: torch.device) -> int:
    """Bytes now: allocated on CUDA, resident on the CPU (the process's peak where the system tells no more)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident = _status_bytes("VmRSS")
    return resident if resident is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_left(device: torch.device) -> int | None:
    """Bytes that tensors may still take: on CUDA what the driver has, and what the allocator has put by; on the CPU
    what the system can give without swapping. None where nothing tells."""
    if device.type == "cuda":
        put_by = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + put_by
    return _bytes_in(Path("/proc/meminfo"), "MemAvailable")


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field_name: str) -> int | None:
    return _bytes_in(Path("/proc/self/status"), field_name)


def _bytes_in(file: Path, field_name: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    return None
