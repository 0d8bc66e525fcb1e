"""``lora-xs demo``: flags and checks."""

from dataclasses import dataclass


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
