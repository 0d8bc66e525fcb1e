"""``lte-bench``: tokens per second, model FLOPs utilisation and memory of the training that the same flags begin."""

import sys
from collections.abc import Sequence

from memtrain_common.commands.cli import run_command

from .bench_flags import PROG, configure


def bench(argv: Sequence[str]) -> None:
    config = configure(argv)
    from .benching import measure_training

    measure_training(config)


def main() -> None:
    """The console script."""
    sys.exit(run_command(bench, prog=PROG))
