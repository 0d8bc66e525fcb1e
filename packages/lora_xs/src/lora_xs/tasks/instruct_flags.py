"""``lora-xs instruct``: flags, presets, checks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from memtrain_common.configure import at_least, below_one, configure, positive, required
from memtrain_common.errors import UserError

from ..config import CAUSAL_LM_TARGETS

PROG = "lora-xs instruct"


@dataclass(frozen=True)
class InstructConfig:
    """Every flag of lora-xs instruct; kept in the run folder's config.json."""

    # -- input and output
    out: str = ""
    """Run folder to make; empty names one in runs/ by date and time."""
    resume: str = ""
    """Run folder to go on with; other flags come from its config.json."""
    data: str = "metamathqa"
    """metamathqa, commonsense, or a JSON or JSON Lines file of instructions and responses."""
    data_dir: str = ""
    """Folder with MetaMathQA-395K.json or commonsense_170k.json (or that file); empty reads them from the hub."""
    fields: tuple[str, ...] = ()
    """The two fields of a row, instruction and response; empty finds a known pair in the first row."""
    model: str = ""
    """Folder of a transformers language model with its tokenizer, or its name on the hub."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    # -- LoRA-XS
    rank: int = 64
    """r: R is r×r."""
    alpha: float = 0.0
    """α: the update is scaled by α/r; 0 takes α = r."""
    targets: tuple[str, ...] = CAUSAL_LM_TARGETS
    """Modules to adapt, by the ends of their names."""
    init: Literal["svd", "random"] = "svd"
    """Bases from the SVD of each weight, or random ones (the ablation)."""
    # -- optimizer
    learning_rate: float = 4e-3
    """Peak learning rate of R."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 after the warm-up."""
    epochs: float = 2.0
    """Passes over the training rows."""
    limit: int = 100_000
    """Use the first so many rows; 0 uses all."""
    batch_size: int = 2
    """Rows a micro-batch, over all processes."""
    gradient_accumulation_steps: int = 64
    """Micro-batches a step."""
    max_length: int = 512
    """Tokens a row is cut to."""
    warmup_ratio: float = 0.02
    """Part of the steps in which the learning rate rises."""
    warmup_iters: int = 0
    """Steps of warm-up, instead of --warmup-ratio; 0 leaves it to that."""
    weight_decay: float = 0.0
    """AdamW's."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    # -- evaluation
    val_samples: int = 0
    """Rows held out, evenly spread, for the validation loss; 0 holds out none and evaluates nothing."""
    eval_interval: int = 100
    """Steps between evaluations and checkpoints."""
    log_interval: int = 10
    """Steps between logged rows."""
    keep: Literal["last", "best"] = "last"
    """Which weights the adapter gets: the last, or those of the lowest validation loss."""
    # -- system
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights; R is always float32."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast's dtype."""
    seed: int = 42
    """Seed of R and the data order."""


MATH = replace(InstructConfig(), dtype="float16")
PRESETS = {
    "math": MATH,
    "commonsense": replace(
        MATH, data="commonsense", rank=32, alpha=64.0, learning_rate=2e-3, schedule="linear", epochs=3.0, limit=0,
        batch_size=1, max_length=256, warmup_ratio=0.0, warmup_iters=100, grad_clip=0.5, val_samples=120,
        eval_interval=40, keep="best",
    ),
}  # fmt: skip


def check(config: InstructConfig) -> InstructConfig:
    """The configuration itself.

    Raises:
        UserError: naming the flag and what would be right.
    """
    required(
        config, model="give a folder with a language model, or its hub name", data="metamathqa, commonsense or a file"
    )
    at_least(
        config, rank=1, alpha=0, limit=0, batch_size=1, gradient_accumulation_steps=1, max_length=2, warmup_ratio=0,
        warmup_iters=0, weight_decay=0, grad_clip=0, val_samples=0, eval_interval=1, log_interval=1,
    )  # fmt: skip
    positive(config, "learning_rate", "epochs")
    below_one(config, "warmup_ratio")
    if config.keep == "best" and not config.val_samples:
        raise UserError("--keep best needs a validation loss: give --val-samples")
    if len(config.fields) not in (0, 2):
        raise UserError(f"--fields takes two names, instruction and response, got {' '.join(config.fields)}")
    return config


def main(command: str, argv: Sequence[str], description: str) -> None:
    description += """

Presets: math (the official settings for MetaMathQA: the defaults, with float16), commonsense (for commonsense_170k)."""
    config = configure(
        InstructConfig, argv, prog=PROG, description=description, presets=PRESETS, check=lambda c, _: check(c)
    )
    from .instruct import run_instruct

    run_instruct(config, argv)
