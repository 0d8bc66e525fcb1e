"""``galore-vit train | eval | info``. torch is imported after the flags are parsed and checked."""

import sys
from collections.abc import Sequence

from memtrain_common.commands.cli import parse, run_command
from memtrain_common.commands.configure import configure
from memtrain_common.errors import UserError

from .tasks.flags import (
    MAY_CHANGE,
    PRESETS,
    PROG,
    EvalConfig,
    InfoConfig,
    TrainConfig,
    check,
    check_eval,
    check_info,
)

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


def dispatch(argv: Sequence[str]) -> None:
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "train":
        config = configure(
            TrainConfig,
            rest,
            prog=f"{PROG} train",
            description=TRAIN,
            presets=PRESETS,
            check=check,
            may_change=MAY_CHANGE,
        )
        from .tasks.train import run_training

        run_training(config, rest)
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
