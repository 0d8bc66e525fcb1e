"""``lte-train``: pre-train a GPT by LTE. Flags in nanoGPT's words; torch is imported after they are parsed."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from memtrain_common.commands.cli import changed_fields, flag_value, parse, run_command
from memtrain_common.commands.configure import placed, saved_config
from memtrain_common.errors import UserError

from .tasks.nanogpt import asked, translate
from .tasks.prepare_flags import DATASETS
from .tasks.source_presets import NANOGPT, NANOGPTS, SOURCE_PRESETS
from .tasks.train_config import MAY_CHANGE, PROG, TrainConfig, check
from .tasks.unasked import settle

DESCRIPTION = """Pre-train a GPT with many LoRA heads in parallel (LTE), and say what it cost.

Without flags: a byte-level GPT on the source of Python's standard library, 4 heads, within 3 minutes on 2 cores.
nanoGPT's --key=value and its files of assignments (read, never run) are understood.
--figures RUN RUN ... [--out FOLDER] compares finished runs instead: a table and three pictures."""


def configure(argv: Sequence[str]) -> TrainConfig:
    """Flags, presets and a resumed run's own configuration into a checked :class:`TrainConfig`."""
    argv, notes = translate(argv, TrainConfig)
    for note in notes:
        print(note)
    asks_for_help = bool({"-h", "--help"} & set(argv))
    resume = None if asks_for_help else flag_value(argv, "--resume")
    if resume is None:
        if (
            argv
            and argv[0] in ("shakespeare-char", "shakespeare-char-cpu")
            and flag_value(argv, "--data-dir") is None
            and not asks_for_help
        ):
            raise UserError(f"the preset {argv[0]} needs --data-dir: a folder with tinyshakespeare as a text file")
        config = parse(TrainConfig, argv, prog=PROG, description=DESCRIPTION, presets=SOURCE_PRESETS)
        name = argv[0] if argv and not argv[0].startswith("-") else "default"
        config, notes = settle(config, SOURCE_PRESETS[name], asked(argv), nanogpts=name in NANOGPTS)
        for note in notes:
            print(note)
        return check(config)
    if not argv[0].startswith("-"):
        raise UserError(f"--resume brings its own configuration: leave out the preset {argv[0]!r}")
    folder = Path(resume)
    if folder.name == "full" and (folder.parent / "config.json").exists():
        raise UserError(f"{resume} is the comparison within a run: --resume {folder.parent}")
    if not (folder / "config.json").is_file() and (folder / "ckpt.pt").is_file():
        return _nanogpts_own(folder, argv)
    before = saved_config(TrainConfig, folder, PROG)
    config = parse(TrainConfig, argv, prog=PROG, description=DESCRIPTION, default=before)
    if config.out not in (before.out, resume):
        raise UserError(f"--out {config.out} differs from --resume {resume}: a resumed run stays in its folder")
    if config.max_iters < before.max_iters:
        raise UserError(
            f"{resume} was begun with --max-iters {before.max_iters}: a resumed run may only go on for longer"
        )
    if config.lte_heads % before.lte_heads:
        raise UserError(
            f"{resume} was begun with --lte-heads {before.lte_heads}, which can become a multiple of it but not "
            f"{config.lte_heads}: begin a new run"
        )
    fixed = {"full_learning_rate"} if (folder / "full").exists() else set()
    for name, (old, new) in changed_fields(placed(before), placed(config)).items():
        if name not in MAY_CHANGE - fixed:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{resume} was begun with {flag} {old}, not {new}: leave the flag out, or begin a new run")
    return check(replace(config, out=resume))


def _nanogpts_own(folder: Path, argv: Sequence[str]) -> TrainConfig:
    """The run of nanoGPT's train.py in a folder, gone on with as a run of ours in the same folder.

    We wrote no configuration of it: as nanoGPT does, its own defaults, files and flags are read again.
    """
    config = parse(TrainConfig, argv, prog=PROG, description=DESCRIPTION, default=replace(NANOGPT, method="full"))
    if config.method != "full":
        raise UserError(
            f"{folder} holds a run of nanoGPT's, which goes on as full training: leave --method out, or begin heads on "
            f"its weights by --init-from {folder}"
        )
    config, _ = settle(config, NANOGPT, asked(argv), nanogpts=True)
    if config.out not in ("", str(folder)):
        raise UserError(f"--out {config.out} differs from --resume {folder}: a resumed run stays in its folder")
    path = str(folder / "ckpt.pt")
    return check(replace(config, resume="", out=str(folder), init_from=path, nanogpt_run=path))


def _check_prepared(config: TrainConfig) -> None:
    """Presets look for bins where lte-prepare puts them: where they are not, say how they come there."""
    folder = Path(config.data_dir)
    name = folder.name.replace("_", "-")
    if folder.parent == Path("data") and not folder.exists() and name in DATASETS:
        raise UserError(f"{folder} does not exist: lte-prepare {name} makes it, or name another folder with --data-dir")


def train(argv: Sequence[str]) -> None:
    if argv and argv[0] == "--figures":
        from .tasks.figures import draw

        draw(argv)
        return
    config = configure(argv)
    _check_prepared(config)
    from .tasks.train import run_training

    run_training(config, argv)


def main() -> None:
    """The console script."""
    sys.exit(run_command(train, prog=PROG))
