"""``lora-xs glue``: flags, presets, checks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from memtrain_common.configure import at_least, below_one, configure, one_of, positive, required
from memtrain_common.errors import UserError

from ..config import ROBERTA_TARGETS

PROG = "lora-xs glue"
TASKS = ("cola", "sst2", "qnli", "mrpc", "rte", "stsb", "mnli", "qqp")


@dataclass(frozen=True)
class GlueConfig:
    """Every flag of lora-xs glue; kept in the run folder's config.json."""

    # -- input and output
    out: str = ""
    """Run folder to make; empty names one in runs/ by date and time."""
    resume: str = ""
    """Run folder (or folder of a grid) to go on with; other flags come from its config.json."""
    task: str = ""
    """One of cola sst2 qnli mrpc rte stsb mnli qqp."""
    model: str = ""
    """Folder of a transformers encoder with its tokenizer, or its name on the hub."""
    data_dir: str = ""
    """Folder with GLUE's TSV files (DIR/CoLA/train.tsv, …); empty reads the hub's nyu-mll/glue."""
    from_adapter: str = ""
    """Adapter folder to start from (the MNLI start): its R, a fresh head."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    # -- LoRA-XS
    rank: int = 0
    """r; 0 takes 16, or that of --from-adapter."""
    alpha: float = 16.0
    """α: the update is scaled by α/r; the official runs fix 16."""
    targets: tuple[str, ...] = ROBERTA_TARGETS
    """Modules to adapt, by the ends of their names."""
    init: Literal["svd", "random"] = "svd"
    """Bases from the SVD of each weight, or random ones (the ablation)."""
    # -- optimizer
    learning_rate: float = 1e-3
    """Peak learning rate of R."""
    head_learning_rate: float = 5e-3
    """Peak learning rate of the task head."""
    epochs: float = 10.0
    """Passes over the training rows."""
    batch_size: int = 32
    """Rows a step, over all processes."""
    max_length: int = 128
    """Tokens a row is cut to."""
    warmup_ratio: float = 0.06
    """Part of the steps in which the learning rate rises; then it falls linearly to 0."""
    weight_decay: float = 0.01
    """AdamW's."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    # -- evaluation
    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates after each epoch."""
    log_interval: int = 10
    """Steps between logged rows."""
    keep: Literal["last", "best"] = "last"
    """Which weights the adapter gets: the last, or those of the best evaluation (picked on the reported rows)."""
    max_train_samples: int = 0
    """Use the first so many training rows; 0 uses all."""
    max_eval_samples: int = 0
    """Evaluate on the first so many rows; 0 uses all."""
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
    # -- system
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast's dtype; weights stay float32."""
    seed: int = 0
    """Seed of the head, R, the data order and dropout."""


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
    at_least(
        config, rank=0, batch_size=1, max_length=2, warmup_ratio=0, weight_decay=0, grad_clip=0, eval_interval=0,
        log_interval=1, max_train_samples=0, max_eval_samples=0,
    )  # fmt: skip
    positive(config, "alpha", "learning_rate", "head_learning_rate", "epochs")
    below_one(config, "warmup_ratio")
    if config.grid:
        for name in ("grid_ranks", "grid_learning_rates", "grid_head_learning_rates", "grid_seeds"):
            if not getattr(config, name):
                raise UserError(f"--{name.replace('_', '-')} is empty: --grid needs at least one value of it")
        if config.from_adapter and len(config.grid_ranks) > 1:
            raise UserError("--from-adapter has one rank: give --grid-ranks that one")
        if config.rank:
            raise UserError("--rank has no use with --grid: give --grid-ranks")
    return config


def main(command: str, argv: Sequence[str], description: str) -> None:
    description += """

Metrics: Matthews correlation (cola), Pearson and Spearman (stsb), accuracy and F1 (mrpc, qqp), accuracy (the rest; mnli
matched and mismatched), on the rows of the development set.

Presets: scratch (the defaults; official for cola, sst2, qnli), from-mnli (official for mrpc, rte, stsb)."""
    config = configure(
        GlueConfig, argv, prog=PROG, description=description, presets=PRESETS, check=lambda c, _: check(c)
    )
    if config.grid:
        from .glue_grid import run_grid

        run_grid(config, argv)
    else:
        from .glue import run_glue

        run_glue(config, argv)
