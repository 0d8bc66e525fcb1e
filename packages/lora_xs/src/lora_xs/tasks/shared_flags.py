"""Flags that several commands share. A command's own dataclass inherits them and gives its own defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from memtrain_common.commands.configure import at_least, below_one, positive, refuse_unused
from memtrain_common.commands.run_flags import Dtype, LearningRate, RunFlags, Select, StepFlags

Init = Literal["svd", "gradient", "random"]


@dataclass(frozen=True)
class AdapterFlags:
    """An adapter with its base model."""

    adapter: str = ""
    """Adapter folder."""
    model: str = ""
    """The base model's folder or hub name; empty takes the one that the adapter was trained on."""
    out: str = ""
    """Folder to write, new or empty."""
    base_dtype: Dtype = "float32"
    """Of the base weights; it must be the one that the adapter was trained with."""


@dataclass(frozen=True)
class TrainingFlags(RunFlags, StepFlags):
    """One training of an adapter."""

    ALIASES: ClassVar[Mapping[str, str]] = {"keep": "select"}
    PLACES: ClassVar[tuple[str, ...]] = ("data_dir", "model", "from_adapter", "data")
    MOVABLE: ClassVar[frozenset[str]] = frozenset({"model", "data"})  # both are known by their hashes

    # -- input and output
    model: str = ""
    """Folder of a transformers model with its tokenizer, or its name on the hub. A resumed run may name it anew."""
    data_dir: str = ""
    """Folder with the data set's files; empty reads it from the hub."""
    # -- LoRA-XS
    rank: int = 0
    """r: R is r×r."""
    alpha: float = 0.0
    """α: the update is scaled by α/r; 0 takes α = r."""
    targets: tuple[str, ...] = ()
    """Modules to adapt, by the ends of their names."""
    init: Init = "svd"
    """Bases from the SVD of each weight, from the gradient of the first batches, or random ones (the ablation)."""
    init_batches: int = 8
    """With --init gradient, micro-batches whose gradient gives the bases."""
    first_step: float = 0.0
    """With --init gradient, R starts at a step of this size down it (about the rate of full training), not at 0."""
    # -- optimizer
    learning_rate: LearningRate = 1e-3
    """Peak learning rate of R."""
    batch_size: int = 32
    """Rows a micro-batch, over all processes."""
    max_length: int = 128
    """Tokens a row is cut to."""
    warmup_ratio: float = 0.0
    """Part of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW weight decay, of R and the head."""
    # -- evaluation
    eval_interval: int = 0
    """Steps between evaluations and checkpoints."""
    select: Select = "last"
    """Weights that the adapter gets: the last, or those of the best evaluation (picked on the reported rows)."""
    seed: int = 0
    """Seed of R, the data order, dropout and whatever starts at random."""


def check_training(config: TrainingFlags) -> None:
    """What holds of the flags that glue and instruct share."""
    at_least(
        config, batch_size=1, max_length=2, warmup_ratio=0, weight_decay=0, grad_clip=0, log_interval=1, max_iters=0,
        init_batches=1, first_step=0,
    )  # fmt: skip
    if config.init != "gradient":
        names = ("init_batches", "first_step")
        refuse_unused(config, TrainingFlags(), names, f"it belongs to --init gradient, and this is {config.init}")
    positive(config, "learning_rate", "epochs")
    below_one(config, "warmup_ratio")
