"""What nobody asked for yields: the tokenizer to what bins say, heads to a batch, the warm-up to a short run.

No torch here.
"""

from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from .train_config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


def settle(config: Config, plain: TrainConfig, asked: Set[str], *, nanogpts: bool) -> tuple[Config, list[str]]:
    """The configuration as it is meant: -> (configuration, lines to say).

    Args:
        config: flags over ``plain``, not yet checked.
        plain: the preset, or the defaults.
        asked: the fields that the command line or a file sets.
        nanogpts: whether ``plain`` are the defaults of nanoGPT or of a fork of it.
    """
    notes: list[str] = []
    if "tokenizer" not in asked:
        config = with_tokenizer_of_bins(config)
    uneven = config.method == "lte" and config.lte_mode == "parallel" and config.batch_size % max(config.lte_heads, 1)
    if nanogpts and uneven and config.batch_size > 0 and "lte_heads" not in asked:
        heads = max(h for h in range(1, config.lte_heads + 1) if config.batch_size % h == 0)
        notes.append(f"lte_heads: {heads}, because {config.lte_heads} cannot share a batch of {config.batch_size}")
        config = replace(config, lte_heads=heads)
    if "warmup_iters" not in asked and not config.lr_decay_iters and not plain.lr_decay_iters:
        config = with_shorter_warmup(config, config.max_iters, plain.max_iters)
    return config, notes


def with_nanogpts_choice(config: TrainConfig, processes: int) -> TrainConfig:
    """With nanoGPT's always_save_checkpoint=False the best checkpoint is the only one that it leaves: the best weights
    are then what comes out, where each process holds all heads."""
    apart = processes > 1 and config.method == "lte" and config.parallel == "heads"
    return config if config.always_save_checkpoint or apart else replace(config, select="best")


def with_shorter_warmup(config: Config, steps: int, usual: int) -> Config:
    """The warm-up takes the same part of a run of ``steps`` as of one of ``usual``, where that is longer."""
    return replace(config, warmup_iters=config.warmup_iters * max(steps, 0) // usual) if steps < usual else config


def with_tokenizer_of_bins(config: Config) -> Config:
    """The configuration with the tokenizer of the bins in ``data_dir``, if that is where they are."""
    if not config.data_dir:
        return config
    from memtrain_common.data.text.bins import is_bins, read_tokenizer

    folder = Path(config.data_dir)
    return replace(config, tokenizer=read_tokenizer(folder).name) if is_bins(folder) else config  # type: ignore[arg-type]


def said_of_warmup(config: TrainConfig) -> str:
    """A line where the warm-up is longer than the run or the decay, as nanoGPT allows; else nothing."""
    warmup, decay, steps = config.warmup_iters, config.lr_decay_iters, config.max_iters
    if not config.decay_lr or warmup < min(decay, steps) or not steps:
        return ""
    if warmup >= steps:
        return f"the warm-up of {warmup} steps is longer than the run of {steps}: the learning rate rises to the end"
    return (
        f"the warm-up of {warmup} steps is longer than the decay, which ends at {decay}: after it the learning rate is "
        "the lowest"
    )
