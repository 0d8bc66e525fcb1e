"""``lte-train --figures RUN RUN …``: finished runs beside one another, as a table and three pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memtrain_common.commands.cli import parse
from memtrain_common.console import Console, format_bytes, format_count, format_table
from memtrain_common.errors import UserError
from memtrain_common.files import check_target_folder
from memtrain_common.measuring.comparing_plots import plot_groups, plot_memory_against_time, plot_validation

from .summary import Finished, read_finished
from .train_config import PROG

DESCRIPTION = "Compare finished runs: a table, val_loss.png, memory_time.png and replaced_layers.png."


@dataclass(frozen=True)
class FiguresConfig:
    """The flags of ``lte-train --figures``."""

    figures: tuple[str, ...] = ()
    """Run folders, in the order in which they are shown."""
    out: str = "figures"
    """Folder for the pictures; what it has of the same names is replaced."""


def draw(argv: Sequence[str]) -> None:
    """Read the runs, print the table, draw the pictures."""
    config = parse(FiguresConfig, argv, prog=f"{PROG} --figures", description=DESCRIPTION)
    if not config.figures:
        raise UserError("--figures needs run folders: --figures runs/a runs/b")
    if len(set(config.figures)) < len(config.figures):
        raise UserError("--figures was given a run twice: name each once")
    runs = [read_finished(Path(path)) for path in config.figures]
    texts = {run.config["tokenizer"] for run in runs}
    if len(texts) > 1:
        raise UserError(f"losses of {' and '.join(sorted(texts))} tokens do not compare: draw the runs of each apart")
    unstepped = next((run.path for run in runs if not run.summary["steps"]), None)
    if unstepped is not None:
        raise UserError(f"{unstepped} took no step: there is nothing to compare")
    names = dict(zip(_names([run.path for run in runs]), runs, strict=True))
    console, out = Console(), Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: --out needs the name of a folder")
    check_target_folder("--out", config.out)
    console.say(format_table([_HEADINGS, *(_row(name, run) for name, run in names.items())]))
    out.mkdir(parents=True, exist_ok=True)
    unit = {"bytes": "byte", "chars": "character", "gpt2": "token"}[texts.pop()]
    loss = f"validation loss, nats per {unit}"
    plot_validation({name: run.metrics for name, run in names.items()}, out / "val_loss.png", ylabel=loss)
    points = {name: (_step_seconds(run), run.step_bytes) for name, run in names.items()}
    plot_memory_against_time(points, out / "memory_time.png")
    groups: dict[str, list[str]] = {}
    for name, run in names.items():
        groups.setdefault(run.replaced, []).append(name)
    plot_groups(
        groups,
        {name: run.summary["evaluation"]["loss"] for name, run in names.items()},
        {name: run.summary["trained_parameters"] for name, run in names.items()},
        out / "replaced_layers.png",
        labels=(f"last validation loss,\nnats per {unit}", "trained parameters", "layers with heads"),
    )
    console.say(f"{out}: val_loss.png, memory_time.png, replaced_layers.png")


_HEADINGS = ("run", "heads on", "H", "r", "α", "T", "steps", "loss", "best", "trained", "ms/step", "memory", "peak")


def _row(name: str, run: Finished) -> tuple[str, ...]:
    c, s = run.config, run.summary
    lte = c["method"] == "lte"
    values = (c["lte_heads"], c["lora_r"], c["lora_alpha"], c["lte_merge_steps"]) if lte else ("–",) * 4
    peak = s["peak_bytes"].get("training")
    return (
        name,
        run.replaced,
        *(f"{v:g}" if isinstance(v, float) else str(v) for v in values),
        f"{s['steps']:,}",
        f"{s['evaluation']['loss']:.4f}",
        f"{s['best']['value']:.4f}",
        format_count(s["trained_parameters"]),
        f"{1e3 * _step_seconds(run):.1f}",
        format_bytes(run.step_bytes),
        "unavailable" if peak is None else format_bytes(peak),
    )


def _step_seconds(run: Finished) -> float:
    return run.summary["seconds"] / run.summary["steps"]


def _names(paths: list[Path]) -> list[str]:
    """The folders' names, or whole paths where two have one name."""
    short = [p.name for p in map(Path.absolute, paths)]
    return short if len(set(short)) == len(short) else [str(p) for p in paths]
