"""Does every arm end as in a plain run, when the driver and ten random arms are killed?

    python benchmarks/cluster_kills.py [local] [ray]

The default grid of ``ablate``, one seed: once by processes of its own, then by each launcher on this machine. Ten arms
that the seed draws are killed (SIGKILL) a random time after their process has begun, and the driver after its third
result; ``--resume`` goes on. Results must be equal but for times and folders.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memtrain_apps.ablate.config import configure
from memtrain_apps.ablate.runner import Runner
from memtrain_common.console import Console
from memtrain_common.measuring.bench import write_results

SEED = 0
KILLED = 10
SLOWEST = 8.0  # seconds that an arm lives before it is killed, at most
TIMES = ("seconds", "samples_per_second", "units_per_second", "peak_bytes", "joules", "sha256_of_the_rest")
GRID = ["digits", "--seeds", "1"]


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        ablate(folder, "--out", "plain").wait()
        plain = results(folder / "plain")
        names = list(Runner(configure(GRID), folder / "plain", Console(quiet=True), ["cpu"], None).arms)
        for launcher in sys.argv[1:] or ["local", "ray"]:
            found = with_kills(folder, launcher, names, plain)
            write_results(
                Path(__file__).parent / "results" / f"cluster_kills_{launcher}.json",
                argv=["python", "benchmarks/cluster_kills.py", launcher], device=torch.device("cpu"), seeds=[SEED],
                grid=GRID, **found,
            )  # fmt: skip


def ablate(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    grid = [] if "--resume" in words else GRID
    return subprocess.Popen(["ablate", *grid, *words], cwd=folder)


def with_kills(folder: Path, launcher: str, names: list[str], plain: dict[str, Any]) -> dict[str, Any]:
    draw = random.Random(SEED)
    living = {name: round(draw.uniform(0, SLOWEST), 2) for name in draw.sample(names, KILLED)}
    killed: dict[str, float] = {}
    words = ("--launcher", launcher, "--devices", "cpu", "cpu")
    driver, drivers = ablate(folder, "--out", launcher, *words), 1
    began: dict[int, float] = {}
    while driver.poll() is None:
        for pid, name in arms_in(folder / launcher).items():
            since = time.monotonic() - began.setdefault(pid, time.monotonic())
            if name in living and name not in killed and since >= living[name]:
                os.kill(pid, signal.SIGKILL)
                killed[name] = round(since, 2)
                print(launcher, "killed", name, "after", killed[name], "s", flush=True)
        if drivers == 1 and len(results(folder / launcher)) >= 3:
            driver.kill()
            driver.wait()
            print(launcher, "killed the driver", flush=True)
            driver, drivers = ablate(folder, "--resume", launcher, *words), 2
        time.sleep(0.05)
    found = results(folder / launcher)
    differing = sorted(n for n in plain.keys() | found.keys() if plain.get(n) != found.get(n))
    return {
        "launcher": launcher, "arms": len(names), "exit_code": driver.returncode, "killed_after_seconds": killed,
        "drivers_killed": drivers - 1, "statuses": counted(found), "statuses_of_the_plain_run": counted(plain),
        "arms_that_differ": differing,
    }  # fmt: skip


def counted(found: dict[str, Any]) -> dict[str, int]:
    statuses = [r["status"] for r in found.values()]
    return {s: statuses.count(s) for s in sorted(set(statuses))}


def results(folder: Path) -> dict[str, Any]:
    """What each arm found, without times."""
    read = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "results").glob("*.json"))}
    return {name: timeless(record) for name, record in read.items()}


def timeless(value: Any) -> Any:
    """Without what differs from run to run: times, and the folder's name within the command."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES and k != "command"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def arms_in(folder: Path) -> dict[int, str]:
    """Process -> the arm that it runs, of a folder's ablation."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended
        if "memtrain_apps.ablate.cluster" in words and str(folder.resolve()) in words:
            found[int(path.parent.name)] = words[words.index(str(folder.resolve())) + 1]
    return found


if __name__ == "__main__":
    main()
