"""``backrazor-glue``: flags, presets, checks. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from memtrain_common.commands.configure import at_least, below_one, one_of, positive, required
from memtrain_common.commands.run_flags import LearningRate, RunFlags, Select, StepFlags

from .razor_flags import ModeFlags, check_razor

PROG = "backrazor-glue"
DESCRIPTION = """Fine-tune an encoder on a GLUE task, by Back Razor or densely.

Flags are those of the official BERT code, which are transformers' own; its run is
  backrazor-glue --task rte --model bert-base-uncased --per-device-train-batch-size 8   on 4 processes (torchrun).
Its own line (--model_name_or_path … --backRazor True) is understood, and said in these words."""
TASKS = ("cola", "sst2", "qnli", "mrpc", "rte", "stsb", "mnli", "qqp")


@dataclass(frozen=True)
class GlueConfig(RunFlags, StepFlags, ModeFlags):
    """Every flag of backrazor-glue; kept in the run folder's config.json."""

    OLD_VALUES: ClassVar[Mapping[tuple[str, Any], Any]] = {("razor_mode", "default"): "pruned"}

    ALIASES: ClassVar[Mapping[str, str]] = {
        "num_train_epochs": "epochs", "max_seq_length": "max_length", "max_grad_norm": "grad_clip",
        "eval_steps": "eval_interval",
    }  # fmt: skip

    PLACES: ClassVar[tuple[str, ...]] = ("data_dir", "model")
    MOVABLE: ClassVar[frozenset[str]] = frozenset({"model"})

    # -- input and output
    task: str = ""
    """One of cola sst2 qnli mrpc rte stsb mnli qqp."""
    model: str = ""
    """Folder of a transformers encoder with its tokenizer, or its name on the hub. A resumed run may name it anew."""
    data_dir: str = ""
    """Folder with GLUE's TSV files (DIR/RTE/train.tsv, …); empty reads the hub's nyu-mll/glue."""
    keep: float = 0.2
    """Part of each activation that Back Razor keeps; the official code's is fixed at 0.2."""
    # -- optimizer: AdamW, a linear schedule
    learning_rate: LearningRate = 2e-5
    """Peak learning rate; it falls to 0 linearly."""
    per_device_train_batch_size: int = 8
    """Rows a micro-batch on each process."""
    per_device_eval_batch_size: int = 8
    """Rows a batch in evaluation."""
    gradient_accumulation_steps: int = 4
    """Micro-batches an optimizer step; with 4 processes give 1, which is the same step."""
    max_length: int = 512
    """Tokens a row is cut to."""
    pad_to_max_length: bool = False
    """Pad every row to --max-length, as the official code does, and not to the longest of its batch."""
    warmup_ratio: float = 0.0
    """Part of the steps in which the learning rate rises."""
    warmup_iters: int = 0
    """Steps in which it rises; 0 takes --warmup-ratio."""
    # -- evaluation
    eval_interval: int = 100
    """Steps between evaluations; 0 evaluates after each epoch."""
    select: Select = "last"
    """Weights that are reported: the last, or those of the best evaluation, which is picked on the reported rows."""
    max_train_samples: int = 0
    """Use the first so many training rows; 0 uses all."""
    max_eval_samples: int = 0
    """Evaluate on the first so many rows; 0 uses all."""
    seed: int = 5
    """Seed of the head, the data order and dropout; 5 is the official runs'."""


OFFICIAL = GlueConfig(task="rte", model="bert-base-uncased", pad_to_max_length=True, select="best")
PRESETS = {
    "official": OFFICIAL,
    "official-baseline": replace(OFFICIAL, mode="full"),
    # what run_glue.py's own command line leaves open
    "run-glue": GlueConfig(
        mode="full",
        learning_rate=5e-5,
        epochs=3.0,
        gradient_accumulation_steps=1,
        max_length=128,
        seed=42,
        pad_to_max_length=True,
        eval_interval=500,
        log_interval=500,
    ),
}


def check(config: GlueConfig, plain: GlueConfig) -> GlueConfig:
    """The configuration itself.

    Args:
        config: flags over a preset.
        plain: the preset, or the run that is resumed.

    Raises:
        UserError: naming the flag and what would be right.
    """
    required(config, task=f"give one of {', '.join(TASKS)}", model="give a folder with an encoder, or its hub name")
    one_of("task", config.task, TASKS)
    at_least(
        config, per_device_train_batch_size=1, per_device_eval_batch_size=1, gradient_accumulation_steps=1,
        max_length=2, warmup_ratio=0, warmup_iters=0, weight_decay=0, grad_clip=0, eval_interval=0, max_iters=0,
        log_interval=1, max_train_samples=0, max_eval_samples=0, seed=0,
    )  # fmt: skip
    positive(config, "learning_rate", "epochs")
    below_one(config, "warmup_ratio")
    check_razor(config, plain)
    return config
