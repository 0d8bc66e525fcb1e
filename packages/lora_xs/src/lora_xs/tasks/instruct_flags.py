"""``lora-xs instruct``: flags, presets, checks."""

from dataclasses import dataclass, replace
from typing import Literal

from memtrain_common.commands.configure import at_least, required
from memtrain_common.commands.run_flags import Dtype, LearningRate, Select
from memtrain_common.errors import UserError

from ..config import CAUSAL_LM_TARGETS
from .shared_flags import TrainingFlags, check_training

PROG = "lora-xs instruct"


@dataclass(frozen=True)
class InstructConfig(TrainingFlags):
    """Every flag of lora-xs instruct; kept in the run folder's config.json."""

    data: str = "metamathqa"
    """metamathqa, commonsense, or a JSON or JSON Lines file of instructions and responses."""
    fields: tuple[str, ...] = ()
    """The two fields of a row, instruction and response; empty finds a known pair in the first row."""
    prompt: Literal["auto", "alpaca", "commonsense"] = "auto"
    """What instructions are put into; auto takes the official one: commonsense's own, and Alpaca's for the rest."""
    limit: int = 100_000
    """Use the first so many rows; 0 uses all."""
    gradient_accumulation_steps: int = 64
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 after the warm-up."""
    warmup_iters: int = 0
    """Steps of warm-up, instead of --warmup-ratio; 0 leaves it to that."""
    val_samples: int = 0
    """Rows held out, evenly spread, for the validation loss; 0 holds out none and evaluates nothing."""
    base_dtype: Dtype = "float32"
    """Of the frozen weights; R is always float32."""
    # -- input and output
    data_dir: str = ""
    """Folder with MetaMathQA-395K.json or commonsense_170k.json (or that file); empty reads them from the hub."""
    rank: int = 64
    targets: tuple[str, ...] = CAUSAL_LM_TARGETS
    learning_rate: LearningRate = 4e-3
    epochs: float = 2.0
    batch_size: int = 2
    max_length: int = 512
    warmup_ratio: float = 0.02
    eval_interval: int = 100
    select: Select = "last"
    """Weights that the adapter gets: the last, or those of the lowest validation loss."""
    seed: int = 42


MATH = replace(InstructConfig(), dtype="float16")
PRESETS = {
    "math": MATH,
    "commonsense": replace(
        MATH, data="commonsense", rank=32, alpha=64.0, learning_rate=2e-3, schedule="linear", epochs=3.0, limit=0,
        batch_size=1, max_length=256, warmup_ratio=0.0, warmup_iters=100, grad_clip=0.5, val_samples=120,
        eval_interval=40, select="best",
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
        config, rank=1, alpha=0, limit=0, gradient_accumulation_steps=1, warmup_iters=0, val_samples=0, eval_interval=1
    )
    check_training(config)
    if config.select == "best" and not config.val_samples:
        raise UserError("--select best needs a validation loss: give --val-samples")
    if len(config.fields) not in (0, 2):
        raise UserError(f"--fields takes two names, instruction and response, got {' '.join(config.fields)}")
    return config
