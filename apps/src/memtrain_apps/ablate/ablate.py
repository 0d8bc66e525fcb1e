"""``ablate``: every arm of a grid in a process of its own, one JSON each, a live table, and one report.

::

    DIR/
      config.json          the grid, command, versions, commit, device
      pretrained/          the run before all arms, where the grid has one; model/ is what they start from
      pretrained.json      its result, once it has ended
      results/NAME.json    one an arm: status, numbers, ledger measured and predicted, loss curve, command
      runs/NAME/           finetune's run folder
      logs/NAME.txt        its console
      report.html          everything in one file
"""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memtrain_common.console import Console, format_bytes, format_table
from memtrain_common.errors import Stopped, UserError
from memtrain_common.interrupts import say_from_now_on, unwinding

from .arms import server
from .config import PROG, AblateConfig, Ablation, saved_request
from .results import Summary, read_results, summarise
from .runner import Runner, meaningful_of, refuse_data_that_is_not_there


class ArmsFailedError(UserError):
    """Some arms ended in a way that is no result."""

    exit_code = 1


def run_ablation(request: Ablation, argv: Sequence[str], *, context: Any = None) -> list[Summary]:
    """Run every arm that has no result yet, then write the report; -> the combinations' summaries.

    Args:
        context: of multiprocessing; the forking server if None.

    Raises:
        Stopped: after SIGINT or SIGTERM, with every running arm's checkpoint written.
        ArmsFailedError: at the end, if an arm was killed or failed.
        UserError: if the folder is in use, the pretraining did not end, or every arm was refused.
    """
    if request.config.report:
        return draw(Path(request.config.report), Console())
    if request.config.collect:
        return collect(Path(request.config.collect), Console())
    if request.config.launcher == "processes":
        context = context or server()  # it loads the libraries while the folder is made
    from memtrain_common.runs.run_folder import RunFolder, default_run_path

    config, grid = request.config, request.grid
    meaningful = meaningful_of(grid)
    here = config.launcher == "processes"
    places = find_places(config.devices, arms=len(meaningful) * len(grid.seeds), here=here)
    named = config.resume or config.out
    path = Path(named) if named else default_run_path(PROG)
    launcher = None
    if not here:  # one that is not there is refused before anything is written
        from .cluster import launch, launcher_for

        launcher = launcher_for(config, path, places)
    if config.resume:
        run = RunFolder.open(path)
        run.add_resume(grid, prog=PROG, argv=argv, memory_limit_bytes=request.limit_bytes)
    else:
        if here and grid.pretrain is None:
            refuse_data_that_is_not_there(grid, meaningful[0])
        run = RunFolder.create(path)
        limit = {"memory_limit_bytes": request.limit_bytes}
        run.write_config(grid, prog=PROG, argv=argv, device=name_of(places[0], config), places=places, **limit)
    console = Console(run.path / "log.txt")
    if launcher is not None:
        launch(request, run.path, console, places, launcher)
        found = draw(run.path, console)
        _end(run.path, [r for s in found for r in s.results])
        return found
    runner = Runner(request, run.path, console, places, context)
    try:
        with unwinding():  # its arms save their checkpoints first
            runner.run()
    except KeyboardInterrupt as interrupt:
        say_from_now_on(lambda name: f"stopped by {name}; resume with --resume {run.path}")
        with contextlib.suppress(UserError):  # nothing has a result yet
            draw(run.path, Console(quiet=True))
        signum = interrupt.args[0] if interrupt.args else signal.SIGINT
        left = len(runner.left())
        raise Stopped(
            signum, f"stopped by {signal.Signals(signum).name} with {left} arms left; resume with --resume {run.path}"
        ) from None
    say_from_now_on(lambda name: f"stopped by {name} after the last arm; ablate --report {run.path} draws the report")
    found = draw(run.path, console)
    _end(run.path, [r for s in found for r in s.results])
    return found


def draw(folder: Path, console: Console) -> list[Summary]:
    """Say the table of combinations and write ``report.html`` from the results in a folder."""
    from .report import write_report

    results = read_results(folder)
    found = summarise(results)
    if any(s.runs for s in found):
        console.say()
        console.say(table(found))
    path = write_report(folder, found)
    console.say(f"report {path}")
    return found


def collect(folder: Path, console: Console) -> list[Summary]:
    """The report of what is there, whether or not anybody still runs or watches the arms; says what is missing.

    Where no arm has a result yet there is nothing to report: nothing is drawn. Nothing but the report is written, and
    nothing is removed.

    Raises:
        UserError: naming a result that is damaged, which stays as it is.
    """
    runner = Runner(saved_request(folder), folder, Console(quiet=True), ["cpu"], None)
    runner.refuse(write=False)
    left = runner.left()
    running = [arm.name for arm in left if (folder / "runs" / arm.name / "config.json").exists()]
    console.say(
        f"{len(runner.arms) - len(left)} of {len(runner.arms)} arms have a result; {len(running)} of the others have "
        "begun"
    )
    damage = next((error for arm in left if (error := runner.damage(arm)) is not None), None)
    if damage is not None:
        raise damage
    return draw(folder, console) if len(left) < len(runner.arms) else []


def find_places(devices: Sequence[str], arms: int, *, here: bool = True) -> list[str]:
    """The places for one arm each; "auto" is every GPU, or one place a core.

    Args:
        here: whether they are this machine's.

    Raises:
        UserError: naming a GPU that this machine lacks.
    """
    import torch

    if list(devices) == ["auto"]:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = gpus or ["cpu"] * cores
    for place in devices if here else ():
        if place.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--devices {place} needs a CUDA GPU and this machine has none: use --devices cpu")
        if int(place.partition(":")[2] or 0) >= max(1, torch.cuda.device_count()):
            raise UserError(
                f"--devices {place} is not one of the {torch.cuda.device_count()} CUDA GPUs here, cuda:0 and on"
            )
    return ["cuda:0" if d == "cuda" else d for d in devices][: max(1, arms)]


def name_of(place: str, config: AblateConfig) -> str:
    """The device of an arm, for the report; another machine's processor or GPU is not known here."""
    import torch
    from memtrain_common.measuring.environment import device_name

    elsewhere = config.launcher in ("slurm", "ray") and place != "cpu"
    return f"a GPU by {config.launcher}" if elsewhere else device_name(torch.device(place))


def _end(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    bad = [r for r in results if r["status"] in ("killed", "failed")]
    if bad:
        raise ArmsFailedError(
            f"{len(bad)} of {len(results)} arms ended without a result ({bad[0]['name']}: {bad[0]['why']}): see "
            f"{folder / 'logs'}, and try them again by --resume {folder}"
        )
    if all(r["status"] == "refused" for r in results):
        raise UserError(f"every arm was refused: {results[0]['why']}")
    if not any(r["status"] == "done" for r in results):
        first = next(r for r in results if r["status"] != "refused")
        raise ArmsFailedError(f"no arm has a result ({first['name']}: {first['status']}, {first['why']})")


def table(found: Sequence[Summary]) -> str:
    """Combinations, best first: the mean over seeds with its 95 % confidence interval."""
    rows = [("", "seeds", "test", "memory", "predicted", "trained", "time")]
    for s in sorted((s for s in found if s.runs), key=lambda s: s.rank):
        rows.append((
            s.label, str(len(s.runs)), s.score_text, format_bytes(s.memory_bytes), f"{s.prediction_error:+.1%}",
            f"{s.trained:,}", f"{s.seconds:.1f} s",
        ))  # fmt: skip
    return format_table(rows)
