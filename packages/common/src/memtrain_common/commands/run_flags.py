"""Flags of every command that trains. A command's own dataclass inherits them and gives its own defaults. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

LearningRate = Annotated[float, tyro.conf.arg(aliases=("--lr",))]
"""Of a field learning_rate, as nanoGPT and transformers call it; timm's name of the flag does too."""
Lr = Annotated[float, tyro.conf.arg(aliases=("--learning-rate",))]
"""Of a field lr, likewise."""
Dtype = Literal["float32", "bfloat16", "float16"]
Select = Literal["last", "best"]
CLASSIFIERS = frozenset(
    {
        "vit-mini", "vit-ti-16", "vit-s-16", "vit-b-16", "vit-l-16", "resnet18", "resnet50", "mobilenet_v2",
        "proxyless_mobile", "resnet20", "imagenet",
    }
)  # fmt: skip
"""What --model and --weights say of pictures that is no place."""
Recipe = Literal["none", "flip", "flip-shift", "vit", "cotuning", "cnn"]


@dataclass(frozen=True)
class RunFlags:
    """Where a run goes, what it tells, and what it runs on."""

    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Fields by their old names: understood on the command line and in the config.json of older runs."""

    OLD_VALUES: ClassVar[Mapping[tuple[str, Any], Any]] = {}
    """(field, value of older runs) -> what it is called today."""

    WITHOUT: ClassVar[Mapping[str, Any]] = {}
    """Fields that the config.json of older runs lacks -> the value that those runs had."""

    PLACES: ClassVar[tuple[str, ...]] = ("data_dir",)
    """Fields that may name a file or a folder, which config.json keeps absolute: a run goes on from anywhere."""

    MOVABLE: ClassVar[frozenset[str]] = frozenset()
    """Those of them that a resumed run may name anew, since its weights are its checkpoint's."""

    NAMES: ClassVar[frozenset[str]] = frozenset()
    """What such a field says that is no place, whatever lies there by that name."""

    # -- run
    out: str = ""
    """New run folder; empty names one under runs/ by date and time."""
    resume: str = ""
    """Run folder to resume from its newest valid checkpoint; its config.json gives the other flags."""
    data_changed: Literal["refuse", "ok"] = "refuse"
    """When a resumed run finds changed data: refuse, or continue and record it in config.json."""
    tracker: Literal["auto", "tensorboard", "wandb", "trackio", "none"] = "auto"
    """Where metrics go besides metrics.jsonl; auto is TensorBoard where it is installed."""
    log_interval: int = 10
    """Steps between logged rows."""
    seed: int = 0
    """Seed of initial weights, data order, augmentation and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Dtype = "float32"
    """Autocast's dtype; weights stay float32."""

    def trainings(self) -> int:
        """How many trainings a run has, each with checkpoints of its own."""
        return 1

    @classmethod
    def modernise(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The flags that an older run wrote, under the names of today."""
        named = {**cls.WITHOUT, **{cls.ALIASES.get(name, name): value for name, value in values.items()}}
        return {n: v if isinstance(v, dict | list) else cls.OLD_VALUES.get((n, v), v) for n, v in named.items()}


@dataclass(frozen=True)
class StepFlags:
    """How many optimizer steps, and what each of them does."""

    # -- optimization
    epochs: float = 10.0
    """Passes over the training rows if --max-iters is 0."""
    max_iters: int = 0
    """Optimizer steps; 0 uses --epochs."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    grad_clip: float = 1.0
    """Gradient clipping norm; 0 does not clip."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    select: Select = "last"
    """Final weights: the last, or those of the best evaluation."""

    def total_steps(self, rows: int, per_step: int) -> int:
        """Optimizer steps: those asked for, or those of the epochs.

        Args:
            rows: of the training split.
            per_step: rows that an optimizer step uses, over all processes.
        """
        return self.max_iters or max(1, math.ceil(round(self.epochs * rows / per_step, 6)))


@dataclass(frozen=True)
class ImageFlags:
    """Which pictures, and how they are read."""

    # -- data and model
    data_dir: str = ""
    """Folder with the set's files in their published form, or the folder or zip of pictures."""
    size: int = 28
    """Pixels of a MedMNIST file: 28, 64, 128 or 224."""
    verify: bool = True
    """Check a MedMNIST file's published MD5; --no-verify reads your own file of that form."""
    image_size: int = 0
    """Pixels that the model sees; 0 takes the model's usual size, or the pictures' own."""
    augment: Recipe = "none"
    """Augmentation; vit, cotuning and cnn are those of Back Razor's code."""
