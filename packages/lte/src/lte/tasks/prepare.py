"""``lte-prepare``: text into token bins, as nanoGPT reads them."""

import sys
from collections.abc import Sequence

from memtrain_common.commands.cli import run_command

from .prepare_flags import DATASETS, PROG, resolve


def prepare(argv: Sequence[str]) -> None:
    config = resolve(argv)
    from .preparing import run

    run(config, DATASETS.get(config.dataset), [PROG, *argv])


def main() -> None:
    """The console script."""
    sys.exit(run_command(prepare, prog=PROG))
