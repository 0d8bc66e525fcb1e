"""``lora-xs demo``: flags and checks."""

from collections.abc import Sequence
from dataclasses import dataclass

from memtrain_common.commands.cli import parse
from memtrain_common.commands.configure import at_least, required


@dataclass(frozen=True)
class DemoConfig:
    """Every flag of lora-xs demo."""

    ranks: tuple[int, ...] = (2, 4, 8, 16)
    """Ranks of LoRA-XS."""
    lora_rank: int = 4
    """Rank of the plain LoRA beside it."""
    seeds: int = 3
    """Adaptations of each kind, with seeds 0, 1, …; figures are their means."""
    pretrain_steps: int = 300
    """Steps on the digits 0 to 4."""
    steps: int = 100
    """Steps of each adaptation to the digits 5 to 9."""
    out: str = ""
    """JSON file for the figures; empty writes none."""


def main(command: str, argv: Sequence[str], description: str) -> None:
    description += """

A small ViT learns scikit-learn's handwritten digits 0 to 4, then 5 to 9 by each method, from the same weights."""
    config = parse(DemoConfig, argv, prog="lora-xs demo", description=description)
    required(config, ranks="give at least one rank")
    at_least(config, lora_rank=1, seeds=1, pretrain_steps=1, steps=1)
    from .demo import run_demo

    run_demo(config, argv)
