"""What LTE is asked to do. No torch here: the command builds its flags from these names."""

from dataclasses import dataclass
from typing import Literal

REST = ("embeddings", "norms", "biases", "skipped")


@dataclass(frozen=True)
class LTEConfig:
    """Which layers get heads, how many and how large, and what else is trained."""

    heads: int = 4
    """H: LoRA heads a layer. In training the batch is cut into H equal chunks, one a head."""
    rank: int = 32
    """r: rank of one head. H·r should exceed the layers' width for full-rank updates (paper, §4.2)."""
    alpha: float = 128.0
    """α: a head's product is scaled by s = α/r."""
    init: Literal["paper", "upstream"] = "paper"
    """A is orthogonal, scaled by sqrt(m/n) as the paper says, or by sqrt(n/r) as its published code does (W is m×n)."""
    targets: tuple[str, ...] = ()
    """Name suffixes of the linear layers that get heads, matched at dots ("attn.c_attn"); empty means all."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Name suffixes of linear layers that get none. A head tied to an embedding must be here."""
    trainable: tuple[str, ...] = REST
    """What is trained besides the heads: "embeddings"; "norms"; "biases" of layers with heads; "skipped" layers
    and standalone parameters. All four is nanoGPT-LTE's choice; none is upstream's strict mode. A tied parameter is
    trained if any of its places is listed."""

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, got {self.heads}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive (0 would multiply every head by 0), got {self.alpha}")
        if self.init not in ("paper", "upstream"):
            raise ValueError(f"init must be 'paper' or 'upstream', got {self.init!r}")
        unknown = set(self.trainable) - set(REST)
        if unknown:
            raise ValueError(f"trainable takes {', '.join(REST)}; got {', '.join(sorted(unknown))}")

    @property
    def scale(self) -> float:
        """s = α/r, in floating point: upstream's integer division gives 0 for r > α."""
        return self.alpha / self.rank
