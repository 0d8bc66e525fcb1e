"""What ``ablate`` is asked to do: a grid from a preset, a TOML file or flags, and how its arms run. No torch here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from memtrain_common.commands.cli import parse
from memtrain_common.commands.configure import flag
from memtrain_common.commands.units import parse_bytes
from memtrain_common.errors import UserError

from ..compose.axes import Optim, Save, Train
from .grid import LISTED, Grid
from .grid_file import flags_of, grid_of, read_grid

PROG = "ablate"
GRIDS = Path(__file__).parent / "grids"
DESCRIPTION = """Compare combinations of train, save and optim on one task, and write one report.

Without arguments: a small ViT, pretrained on the digits 0-4, learns 5-9. The first word may name a grid: a TOML file,
or one of those that come along: {grids}. Flags that list choices or settings take the place of the
grid's own lists; what follows a word -- goes to every arm's finetune:

  ablate --train full lora --save all backrazor --keep 0.05 0.1 --seeds 3 -- --data folder --data-dir pets"""


@dataclass(frozen=True)
class AblateConfig:
    """Every flag of ablate."""

    # -- the grid: every combination of what is listed
    train: tuple[Train, ...] = ()
    """Which numbers are trained."""
    save: tuple[Save, ...] = ()
    """What is kept for the backward pass."""
    optim: tuple[Optim, ...] = ()
    """What state the optimizer keeps."""
    rank: tuple[int, ...] = ()
    """r of lora, melo, lora-xs and lte."""
    alpha: tuple[float, ...] = ()
    """α of the adapters; 0 takes α = r."""
    init: tuple[Literal["svd", "gradient", "random"], ...] = ()
    """Where lora-xs takes its bases from."""
    init_batches: tuple[int, ...] = ()
    """Micro-batches whose gradient gives lora-xs its bases."""
    first_step: tuple[float, ...] = ()
    """Step down that gradient at which lora-xs starts."""
    adapt: tuple[Literal["attention", "all"], ...] = ()
    """Matrices that get adapters."""
    dropout: tuple[float, ...] = ()
    """LoRA's dropout."""
    heads: tuple[int, ...] = ()
    """lte's heads a layer."""
    merge_steps: tuple[int, ...] = ()
    """Optimizer steps between merges of lte's heads."""
    lte_rest: tuple[Literal["auto", "frozen", "trained"], ...] = ()
    """Whether lte trains norms, biases and position embeddings too."""
    checkpoint_blocks: tuple[str, ...] = ()
    """Blocks that checkpoint checkpoints: 4 for the first four, or numbers from 0, as 0-3,6."""
    razor_blocks: tuple[str, ...] = ()
    """Blocks in which Back Razor works, said in the same way; the others are checkpointed."""
    keep: tuple[float, ...] = ()
    """Back Razor's part of each activation that is kept."""
    razor_mode: tuple[Literal["low-bit", "pruned", "paper"], ...] = ()
    """Back Razor's low-bit codes, its pruning to the largest elements, or the paper's."""
    recompute: tuple[Literal["auto", "none", "attention", "block"], ...] = ()
    """What Back Razor makes again in the backward pass."""
    galore_rank: tuple[int, ...] = ()
    """GaLore's r."""
    gap: tuple[int, ...] = ()
    """Optimizer steps between two refreshes of GaLore's subspace."""
    galore_scale: tuple[float, ...] = ()
    """GaLore's α."""
    lr: tuple[float, ...] = ()
    """Peak learning rates, each an arm of its own; none leaves them to the grid's [lr], or to finetune."""
    seeds: int = 0
    """Seeds 0 to one below this; 0 leaves them to the grid."""
    # -- how the arms run
    out: str = ""
    """Folder to make; empty names one in runs/ by date and time."""
    resume: str = ""
    """Folder of an ablation to go on with: what is finished stays, and an arm in the middle goes on."""
    report: str = ""
    """Folder of an ablation: only write its report again."""
    collect: str = ""
    """Folder of an ablation that may still run elsewhere: report what is there, and say what is missing."""
    devices: tuple[str, ...] = ("auto",)
    """Places for one arm at a time each: cuda:0 cuda:1, or cpu cpu for two at once. auto: every GPU, or one a core."""
    memory_limit: str = ""
    """What an arm may allocate beyond its libraries (64MiB, 8GiB); one that wants more is recorded as out of memory. A
    resumed ablation keeps its limit; none lifts it."""
    launcher: Literal["processes", "local", "slurm", "ray"] = "processes"
    """What runs the arms: processes of this command; submitit's jobs on this machine (local); Slurm's; or Ray's."""
    time_limit: int = 60
    """Minutes of a job of local or slurm; an arm that is not finished then leaves a checkpoint and is requeued."""
    signal_seconds: int = 120
    """Seconds before the time limit at which an arm is told to leave its checkpoint."""
    slurm: tuple[str, ...] = ()
    """Words of sbatch for every arm: partition=gpu account=me."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished arms."""


RUNNING = ("seeds", "devices", "memory_limit", "launcher", "time_limit", "signal_seconds", "slurm", "keep_checkpoints")
"""Flags that a call which runs no arm would ignore."""


@dataclass(frozen=True)
class Ablation:
    """A checked request."""

    config: AblateConfig
    grid: Grid
    limit_bytes: int
    """Of an arm's memory; 0 is none."""


def configure(argv: Sequence[str]) -> Ablation:
    """Flags, and the grid that they name or change.

    Raises:
        UserError: naming the flag, or the grid's file and key.
    """
    words = list(argv)
    arms_words: list[str] = []
    if "--" in words:
        cut = words.index("--")
        words, arms_words = words[:cut], words[cut + 1 :]
    named = words.pop(0) if words and not words[0].startswith("-") else ""
    presets = sorted(p.stem for p in GRIDS.glob("*.toml"))
    config = parse(AblateConfig, words, prog=PROG, description=DESCRIPTION.format(grids=", ".join(presets)))
    _check(config, named, arms_words)
    given = config.memory_limit not in ("", "none")
    limit = parse_bytes(config.memory_limit, "--memory-limit") if given else 0
    if config.report or config.collect:
        return Ablation(config, Grid(), limit)
    if config.resume:
        return Ablation(config, *_saved(Path(config.resume), config, limit if config.memory_limit else None))
    grid = _named_grid(named, presets)
    listed = {n: list(getattr(config, n)) for n in LISTED if getattr(config, n)}
    if listed:
        grid = replace(grid, products=grid_of(listed).products)
    if config.seeds:
        grid = replace(grid, seeds=tuple(range(config.seeds)))
    return Ablation(config, _with_words(grid, arms_words), limit)


def _check(config: AblateConfig, named: str, words: Sequence[str]) -> None:
    if sum(map(bool, (config.out, config.resume, config.report, config.collect))) > 1:
        raise UserError(
            "--out makes a folder, --resume goes on in one, --report draws one again, --collect one that still runs: "
            "give one of them"
        )
    going_on = next((flag(n) for n in ("resume", "report", "collect") if getattr(config, n)), "")
    if config.slurm and config.launcher != "slurm":
        raise UserError("--slurm is for --launcher slurm: leave it out")
    for word in config.slurm:
        if not re.fullmatch(r"[a-z_]+=.+", word):
            raise UserError(f"--slurm {word} must be a word of sbatch with its value, as partition=gpu")
    if not 1 <= config.signal_seconds < 60 * config.time_limit:
        raise UserError(
            f"--signal-seconds {config.signal_seconds} must be at least 1 and less than --time-limit "
            f"{config.time_limit} minutes"
        )
    if going_on:
        of_runs = [n for n in RUNNING if getattr(config, n) != getattr(AblateConfig(), n)]
        if of_runs and not config.resume:
            raise UserError(f"{going_on} runs nothing: leave out {' '.join(map(flag, of_runs))}")
        changed = [flag(n) for n in LISTED if getattr(config, n)]
        given = ([named] if named else []) + changed + (["--"] if words else [])
        if given:
            raise UserError(f"{going_on} brings its own grid: leave out {' '.join(given)}")
    if config.seeds < 0:
        raise UserError(f"--seeds must be how many, at least 1, got {config.seeds}")
    if not config.devices:
        raise UserError("--devices needs at least one: auto, cpu, cuda:0, …")
    for device in config.devices:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise UserError(f"--devices {device} is unknown: name auto, cpu, cuda or cuda:N")
    if "auto" in config.devices and len(config.devices) > 1:
        raise UserError("--devices auto stands alone: it finds every place itself")


def _named_grid(named: str, presets: Sequence[str]) -> Grid:
    if not named:
        return read_grid(GRIDS / "digits.toml")
    if named in presets:
        return read_grid(GRIDS / f"{named}.toml")
    if not named.endswith(".toml") and not Path(named).exists():
        raise UserError(f"unknown grid {named!r}: name a TOML file, or one of {', '.join(presets)}")
    return read_grid(Path(named))


def saved_request(folder: Path) -> Ablation:
    """What a begun ablation was asked, as its own folder says."""
    config = AblateConfig(resume=str(folder))
    return Ablation(config, *_saved(folder, config, None))


def _saved(folder: Path, config: AblateConfig, limit: int | None) -> tuple[Grid, int]:
    """The grid of a begun ablation, which may only get more seeds, and the limit of an arm's memory: its own where
    nothing is said of it now."""
    from memtrain_common.runs.run_folder import RunFolder

    saved = RunFolder.open(folder, writes=False).read_config()
    content, limit = saved["config"], saved.get("memory_limit_bytes", 0) if limit is None else limit
    try:
        grid = Grid(**{f.name: content[f.name] for f in fields(Grid)})
        grid = replace(grid, products=tuple(grid.products), seeds=tuple(grid.seeds))
    except (KeyError, TypeError):
        raise UserError(f"{folder} is not an ablation: --resume needs a folder that ablate made") from None
    if config.seeds and config.seeds < len(grid.seeds):
        raise UserError(f"{folder} was begun with {len(grid.seeds)} seeds: --resume may only add some")
    if config.seeds > len(grid.seeds):
        more = [s for s in range(config.seeds + len(grid.seeds)) if s not in grid.seeds]
        grid = replace(grid, seeds=(*grid.seeds, *more[: config.seeds - len(grid.seeds)]))
    return grid, limit


def _with_words(grid: Grid, words: Sequence[str]) -> Grid:
    """The grid with flags of finetune from the command line, which go before the file's.

    Another model than the file's own leaves out [pretrain] and [lr], which were meant for that one; other data leave
    out [finetune] too. A file without [pretrain] that names no model has rates for the model that the words name.
    """
    given = flags_of(words)
    if "data" in given:
        return replace(grid, finetune=given, pretrain=None, lr={})
    models = {"model", "weights"}
    has_its_own = grid.pretrain is not None or bool(grid.finetune.keys() & models)
    grid = replace(grid, finetune={**grid.finetune, **given})
    return replace(grid, pretrain=None, lr={}) if has_its_own and given.keys() & models else grid
