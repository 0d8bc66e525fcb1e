"""``lora-xs glue``: flags, presets, checks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from memtrain_common.commands.configure import at_least, one_of, positive, required
from memtrain_common.errors import UserError

from ..config import ROBERTA_TARGETS
from .shared_flags import TrainingFlags, check_training

PROG = "lora-xs glue"
TASKS = ("cola", "sst2", "qnli", "mrpc", "rte", "stsb", "mnli", "qqp")


@dataclass(frozen=True)
class GlueConfig(TrainingFlags):
    """Every flag of lora-xs glue; kept in the run folder's config.json."""

    @classmethod
    def modernise(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Runs that do not say how they rounded the warm-up rounded it up, and go on so."""
        return {"warmup_rounding": "up", **super().modernise(values)}

    def trainings(self) -> int:
        if not self.grid:
            return 1
        ranks = (0,) if self.from_adapter else self.grid_ranks
        return math.prod(map(len, (ranks, self.grid_learning_rates, self.grid_head_learning_rates, self.grid_seeds)))

    task: str = ""
    """One of cola sst2 qnli mrpc rte stsb mnli qqp."""
    from_adapter: str = ""
    """Adapter folder to start from (the MNLI start), or a checkpoint of the official code: its R, a fresh head."""
    head_learning_rate: float = 5e-3
    """Peak learning rate of the task head."""
    max_train_samples: int = 0
    """Use the first so many training rows; 0 uses all."""
    max_eval_samples: int = 0
    """Evaluate on the first so many rows; 0 uses all."""
    # -- input and output
    resume: str = ""
    """Run folder (or folder of a grid) to go on with; other flags come from its config.json."""
    data_dir: str = ""
    """Folder with GLUE's TSV files (DIR/CoLA/train.tsv, …); empty reads the hub's nyu-mll/glue."""
    rank: int = 0
    """r; 0 takes 16, or that of --from-adapter."""
    alpha: float = 16.0
    """α: the update is scaled by α/r; the official runs fix 16."""
    targets: tuple[str, ...] = ROBERTA_TARGETS
    epochs: float = 10.0
    warmup_ratio: float = 0.06
    # -- optimization
    warmup_rounding: Literal["down", "up"] = "down"
    """How --warmup-ratio becomes whole steps: down as in the official script, or up as older runs here."""
    weight_decay: float = 0.01
    eval_interval: int = 0
    """Steps between evaluations and checkpoints; 0 evaluates after each epoch."""
    # -- grid
    grid: bool = False
    """Train every combination of the --grid flags one after another, into one table."""
    grid_ranks: tuple[int, ...] = (4, 8, 12, 16, 20, 25)
    """With --grid, ranks."""
    grid_learning_rates: tuple[float, ...] = (1e-4, 5e-4, 1e-3)
    """With --grid, learning rates of R."""
    grid_head_learning_rates: tuple[float, ...] = (5e-4, 1e-3, 5e-3)
    """With --grid, learning rates of the head."""
    grid_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """With --grid, seeds; mean and confidence interval are over them."""


SCRATCH = GlueConfig()
PRESETS = {
    "scratch": SCRATCH,  # CoLA, SST-2, QNLI (and whatever has rows enough)
    "from-mnli": replace(
        SCRATCH,
        epochs=50.0,
        warmup_ratio=0.0,
        learning_rate=1e-3,
        head_learning_rate=1e-3,
        grid_learning_rates=(6e-4, 1e-3),
        grid_head_learning_rates=(6e-4, 1e-3),
    ),  # MRPC, RTE, STS-B, from an adapter trained on MNLI
}


def check(config: GlueConfig) -> GlueConfig:
    """The configuration itself.

    Raises:
        UserError: naming the flag and what would be right.
    """
    required(config, task=f"give one of {', '.join(TASKS)}", model="give a folder with an encoder, or its hub name")
    one_of("task", config.task, TASKS)
    at_least(config, rank=0, eval_interval=0, max_train_samples=0, max_eval_samples=0)
    positive(config, "alpha", "head_learning_rate")
    check_training(config)
    if config.from_adapter and config.init == "gradient":
        raise UserError("--init gradient would do nothing with --from-adapter, which brings its bases: leave one out")
    if config.grid:
        for name in ("grid_ranks", "grid_learning_rates", "grid_head_learning_rates", "grid_seeds"):
            if not getattr(config, name):
                raise UserError(f"--{name.replace('_', '-')} is empty: --grid needs at least one value of it")
        if config.from_adapter and len(config.grid_ranks) > 1:
            raise UserError("--from-adapter has one rank: give --grid-ranks that one")
        if config.rank:
            raise UserError("--rank has no use with --grid: give --grid-ranks")
    return config
