"""What runs an arm's command: submitit (Slurm, or its processes on this machine), or Ray."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from memtrain_common.console import format_bytes
from memtrain_common.errors import UserError

from .config import AblateConfig


@dataclass(frozen=True)
class Needs:
    """What is asked of the cluster for an arm."""

    memory_bytes: int
    gpus: int
    minutes: int
    signal_seconds: int  # between the signal and the end


class Launcher(Protocol):
    AFTERWARDS: str
    """What submitted arms do when the driver ends before them."""

    def submit(self, name: str, needs: Needs) -> Any:
        """-> the job."""

    def ended(self, handle: Any) -> bool:
        """Whether the job has ended, and does not wait to be requeued."""


def launcher_of(config: AblateConfig, folder: Path, places: int) -> Launcher:
    if config.launcher == "ray":
        return Ray(folder, places)
    return Submitit(config.launcher, folder, dict(word.split("=", 1) for word in config.slurm))


class ArmCall:
    """An arm's command as submitit calls it; what :meth:`checkpoint` returns is requeued."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        # the signal before the time limit reaches every process of a job: it is this one that tells the arm to stop
        ignoring = lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # noqa: E731
        words = [sys.executable, "-m", "memtrain_apps.ablate.cluster", self.folder, self.name]
        self.child = subprocess.Popen(words, preexec_fn=ignoring)
        while (code := self.child.poll()) is None:
            time.sleep(0.1)
        return code

    def checkpoint(self) -> Any:
        """Called within a signal's handler: the arm writes its checkpoint and ends."""
        from submitit.helpers import DelayedSubmission

        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.child.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(ArmCall(self.folder, self.name))


class Submitit:
    """Slurm, or submitit's local executor, which sends the call by pickle, within ``DIR/cluster``."""

    AFTERWARDS = "arms that were submitted go on"

    def __init__(self, cluster: str, folder: Path, slurm: dict[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise needed(cluster, "submitit") from None
        self._slurm, self._folder = slurm if cluster == "slurm" else None, folder
        self._make = submitit.LocalExecutor if cluster == "local" else submitit.SlurmExecutor
        if self._make.affinity() < 0:
            raise UserError(f"--launcher {cluster}: there is no srun here; choose local, or a machine with Slurm")

    @cached_property
    def _executor(self) -> Any:
        """Made at the first job, since it makes its folder."""
        return self._make(self._folder / "cluster")

    def submit(self, name: str, needs: Needs) -> Any:
        """-> the job."""
        words: dict[str, Any] = {"gpus_per_node": needs.gpus, "signal_delay_s": needs.signal_seconds}
        if self._slurm is None:
            words["timeout_min"] = needs.minutes
        else:
            words |= {"time": needs.minutes, "mem": f"{math.ceil(needs.memory_bytes / 2**30)}GB", "job_name": name}
            words |= {"cpus_per_task": 1, **self._slurm}
        self._executor.update_parameters(**words)
        return self._executor.submit(ArmCall(str(self._folder), name))

    def ended(self, handle: Any) -> bool:
        """Whether the job has ended, and does not wait to be requeued."""
        return bool(handle.done())


class Ray:
    """Ray's tasks, on the cluster of RAY_ADDRESS or of this machine; else on one that ends with the driver."""

    AFTERWARDS = "arms that run end with it, and go on from their last checkpoint"

    def __init__(self, folder: Path, places: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise needed("ray", "ray") from None
        self._ray, self._folder = ray, folder
        quiet: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError as error:
            if address := os.environ.get("RAY_ADDRESS"):
                raise UserError(f"--launcher ray: no cluster answers at RAY_ADDRESS={address}: {error}") from None
            ray.init(address="local", num_cpus=places, include_dashboard=False, **quiet)

    def submit(self, name: str, needs: Needs) -> Any:
        """-> the task. Its machine needs this environment and this folder."""
        offers = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(o.get("memory", 0) >= needs.memory_bytes and o.get("GPU", 0) >= needs.gpus for o in offers):
            raise UserError(
                f"--launcher ray: {name} needs {format_bytes(needs.memory_bytes)} of memory and {needs.gpus} GPUs, and "
                "no machine of the cluster has as much: add one, or leave the arm out"
            )
        task = self._ray.remote(call_from).options(
            name=name, num_cpus=1, num_gpus=needs.gpus, memory=needs.memory_bytes, max_retries=0
        )
        return task.remote(str(self._folder), name, os.getcwd())

    def ended(self, handle: Any) -> bool:
        """Whether the task has ended, in whatever way."""
        return bool(self._ray.wait([handle], timeout=0)[0])


def call_from(folder: str, name: str, working: str) -> int:
    """What Ray runs: the call, in the driver's working folder."""
    os.chdir(working)
    return ArmCall(folder, name)()


def needed(cluster: str, library: str) -> UserError:
    return UserError(f'--launcher {cluster} needs {library}: install "memtrain-apps[cluster]", or leave the flag out')
