"""Flags of every command that trains. A command's own dataclass inherits them and gives its own defaults. No torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

LearningRate = Annotated[float, tyro.conf.arg(aliases=("--lr",))]
"""Of a field learning_rate, as nanoGPT and transformers call it; timm's name of the flag does too."""
Lr = Annotated[float, tyro.conf.arg(aliases=("--learning-rate",))]
"""Of a field lr, likewise."""
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class RunFlags:
    """Where a run goes, what it tells, and what it runs on."""

    out: str = ""
    """Run folder to make; empty names one in runs/ by date and time."""
    resume: str = ""
    """Run folder to go on with, from its newest valid checkpoint; other flags come from its config.json."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    log_interval: int = 10
    """Steps between logged rows."""
    seed: int = 0
    """Seed of the initial weights, the data order, augmentation and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Dtype = "float32"
    """Autocast's dtype; weights stay float32."""
