"""``galore-vit train | eval | info``. torch is imported after the flags are parsed and checked."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from memtrain_common.commands.cli import changed_fields, flag_value, parse, run_command
from memtrain_common.commands.configure import flag, refuse_unused
from memtrain_common.errors import UserError

from .tasks.flags import PRESETS, EvalConfig, InfoConfig, TrainConfig

PROG = "galore-vit"
TRAIN = """Train a vision transformer with its gradients projected (GaLore), adapters (MeLo), or plainly.

Without flags: a small ViT from scratch on scikit-learn's digits by GaLore, within 2 minutes on 2 cores."""
EVALUATE = """Evaluate a run's best checkpoints, or a file of predictions in MedMNIST's official form."""
INFO = """List the MedMNIST sets, and predict the bytes of optimizer state for a ViT."""
USAGE = f"""usage: {PROG} {{train,eval,info}} [PRESET] [--flag value ...]

  train   {TRAIN.splitlines()[0]}
  eval    {EVALUATE}
  info    {INFO}

{PROG} train --help lists the flags and presets of train, and so on.
"""

# What a resumed run may do otherwise than it began. The data's hash is compared besides.
MAY_CHANGE = {"out", "resume", "data_dir", "verify", "tracker", "device", "workers"}
LORA = ("melo", "lora")
GALORE_FLAGS = ("rank", "gap", "scale", "proj_type", "refresh")


def configure(argv: Sequence[str]) -> TrainConfig:
    """Flags, presets and a resumed run's own configuration into a checked :class:`TrainConfig`."""
    prog = f"{PROG} train"
    resume = flag_value(argv, "--resume")
    if resume is None:
        config = parse(TrainConfig, argv, prog=prog, description=TRAIN, presets=PRESETS)
        return check(config, PRESETS.get(argv[0] if argv else "", TrainConfig()))
    before = saved_config(Path(resume))
    config = parse(TrainConfig, argv, prog=prog, description=TRAIN, default=before)
    if config.out not in (before.out, resume):
        raise UserError(f"--out {config.out} differs from --resume {resume}: a resumed run stays in its folder")
    for name, (old, new) in changed_fields(before, config).items():
        if name not in MAY_CHANGE:
            raise UserError(f"{resume} was begun with {flag(name)} {old}, not {new}: leave the flag out, or begin anew")
    return check(replace(config, out=resume), before)


def saved_config(run: Path) -> TrainConfig:
    """The configuration in a run's folder."""
    from memtrain_common.runs.run_folder import RunFolder

    try:
        return TrainConfig(**RunFolder.open(run).read_config()["config"])
    except TypeError as error:
        raise UserError(f"{run} was not made by this version of {PROG} train: {error}") from None


def check(config: TrainConfig, plain: TrainConfig) -> TrainConfig:
    """The configuration itself.

    Args:
        config: flags over a preset.
        plain: the preset: what stands there without flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    at_least = {
        "size": 4, "image_size": 0, "patch_size": 0, "lora_rank": 1, "rank": 1, "gap": 1, "weight_decay": 0,
        "epochs": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "grad_clip": 0, "seed": 0, "seeds": 1,
        "folds": 0, "eval_epochs": 1, "log_interval": 1, "workers": 0, "dropout": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        if not least <= getattr(config, name) < math.inf:
            raise UserError(f"{flag(name)} must be at least {least}, got {getattr(config, name)}")
    for name in ("lr", "scale", "lora_alpha"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{flag(name)} must be positive, got {getattr(config, name)}")
    if not config.dropout < 1:
        raise UserError(f"--dropout must be below 1, got {config.dropout}")
    if config.folds == 1:
        raise UserError("--folds 1 leaves nothing to train on: give 2 or more, or 0 for the set's own split")
    if config.data == "digits":
        refuse_unused(config, plain, ("size", "verify"), "the digits have 8 pixels and no file")
    elif config.data == "folder":
        refuse_unused(config, plain, ("verify",), "no MD5 of your pictures is published")
    if not config.optim.startswith("galore"):
        refuse_unused(config, plain, GALORE_FLAGS, f"--optim {config.optim} projects nothing")
    elif config.optim == "galore-torch":
        refuse_unused(config, plain, ("refresh",), "galore-torch finds its subspaces by SVD alone")
    if config.train not in LORA:
        refuse_unused(config, plain, ("lora_rank", "lora_alpha"), f"--train {config.train} has no adapters")
    if config.weights:
        refuse_unused(config, plain, ("model", "patch_size", "dropout"), "--weights brings its own")
    return config


def check_eval(config: EvalConfig) -> EvalConfig:
    """The configuration itself.

    Raises:
        UserError: if it is not clear what to evaluate.
    """
    if bool(config.run) == bool(config.predictions):
        raise UserError(f"{PROG} eval needs either --run, a folder of {PROG} train, or --predictions, a CSV")
    for name in ("data", "size", "verify"):
        if config.run and getattr(config, name) != getattr(EvalConfig(), name):
            raise UserError(f"{flag(name)} goes with --predictions: a run has its own")
    for name in ("out", "device"):
        if config.predictions and getattr(config, name) != getattr(EvalConfig(), name):
            raise UserError(f"{flag(name)} goes with --run: predictions are only compared with the labels")
    return config


def check_info(config: InfoConfig) -> InfoConfig:
    """The configuration itself.

    Raises:
        UserError: naming the flag that is out of its range.
    """
    for name in ("image_size", "patch_size", "classes"):
        if getattr(config, name) < 1:
            raise UserError(f"{flag(name)} must be at least 1, got {getattr(config, name)}")
    if not config.ranks or min(config.ranks) < 1:
        raise UserError(f"--ranks takes whole numbers of at least 1, got {' '.join(map(str, config.ranks)) or 'none'}")
    return config


def dispatch(argv: Sequence[str]) -> None:
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "train":
        config = configure(rest)
        from .tasks.train import run_training

        run_training(config, argv)
    elif command == "eval":
        to_evaluate = check_eval(parse(EvalConfig, rest, prog=f"{PROG} eval", description=EVALUATE))
        from .tasks.evaluate import run_evaluation

        run_evaluation(to_evaluate)
    elif command == "info":
        to_tell = check_info(parse(InfoConfig, rest, prog=f"{PROG} info", description=INFO))
        from .tasks.info import run_info

        run_info(to_tell)
    else:
        raise UserError(f"unknown command {command!r}: the commands are train, eval and info")


def main() -> None:
    """The console script."""
    sys.exit(run_command(dispatch, prog=PROG))
