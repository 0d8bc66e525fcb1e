"""``finetune``: one choice on each axis, on pictures, GLUE or instructions."""

from collections.abc import Sequence
from typing import Any

from memtrain_common.data.images.sets import NAMES
from memtrain_common.training.distributed import World

from .config import FinetuneConfig
from .training import run
from .workload import Workload

PROG = "finetune"


def workload_of(config: FinetuneConfig, world: World) -> Workload:
    """What ``--data`` names."""
    if config.data in NAMES:
        from .pictures import picture_workload

        return picture_workload(config, world)
    from .language import glue_workload, instruct_workload

    return (glue_workload if config.data.startswith("glue:") else instruct_workload)(config, world)


def run_finetune(config: FinetuneConfig, argv: Sequence[str]) -> dict[str, Any] | None:
    """Train one combination; -> the content of its result.json, or None where memory was only explained."""
    return run(config, workload_of, argv, PROG)
