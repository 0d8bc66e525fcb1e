"""What LTE is asked to do. No torch here: the command builds its flags from these names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

REST = ("embeddings", "norms", "biases", "skipped")
REPLICAS = ("embeddings", "norms", "skipped")
VECTORS = ("norms", "biases")


@dataclass(frozen=True)
class LTEConfig:
    """Which layers get heads, how many and how large, how they are merged, and what else is trained."""

    heads: int = 4
    """H: LoRA heads a layer. In training the batch is cut into H equal chunks, one a head."""
    rank: int = 32
    """r: rank of one head. H·r should exceed the layers' width for full-rank updates (paper, §4.2)."""
    alpha: float = 128.0
    """α: a head's product is scaled by s = α/r."""
    init: Literal["paper", "upstream"] = "paper"
    """A is orthogonal, scaled by sqrt(m/n) as the paper says, or by sqrt(n/r) as its published code does (W is m×n)."""
    mode: Literal["parallel", "sequential"] = "parallel"
    """"parallel": chunk h of the batch meets head h. "sequential": every head meets all data and their mean is the
    layer (multi-head LoRA); it cannot be spread over processes."""
    targets: tuple[str, ...] = ()
    """Name suffixes of the linear and convolution layers that get heads, matched at dots ("attn.c_attn"); empty
    means all."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Name suffixes of layers that get none. A head tied to an embedding must be here. Embeddings and norms that are
    here have no copies and no vectors either; a linear layer or a convolution is "skipped" by it."""
    trainable: tuple[str, ...] = REST
    """What is trained besides the heads: "embeddings"; "norms"; "biases" of layers with heads; "skipped" layers
    and standalone parameters. All four is nanoGPT-LTE's choice; none is upstream's strict mode. A tied parameter is
    trained if any of its places is listed."""
    replicas: tuple[str, ...] = ()
    """Of what is trainable, what every head has its own copy of, averaged at merges (the paper's rule for embeddings):
    any of "embeddings", "norms", "skipped". What is trainable and neither here nor in vectors is one for all heads,
    and its gradient is the mean over the batch."""
    vectors: tuple[str, ...] = ()
    """Of what is trainable, what gets heads as vectors, w + s·b·a with one number a (the paper's rule for norms): any
    of "norms", "biases"."""
    base: Literal["float32", "bfloat16", "4bit"] = "float32"
    """How the frozen weights of linear layers are kept; see :mod:`lte.bases`."""
    reset: Literal["none", "B", "all"] = "none"
    """What begins anew at a merge: nothing (A' and B' take its place), every B at 0, or every A as well."""
    reset_optimizer: bool = True
    """The optimizer forgets its state of what is reset."""
    outer_momentum: float = 0.0
    """μ of Nesterov momentum over merges (DiLoCo): v ← μ v + Δ, W ← W + η (Δ + μ v). 0 keeps no v."""
    outer_lr: float = 1.0
    """η: how much of the mean delta is merged; 1 is LTE's merge."""
    merge_density: float = 1.0
    """Share of each head's delta that a merge sends, the largest of every 256 numbers. What is not sent the head keeps,
    computes with, and adds to its next delta (error feedback); 1 sends all of it, exactly."""
    merge_density_replicas: float | None = None
    """The same of copies (``replicas``), where they want another share; None: ``merge_density``."""
    merge_bits: int = 4
    """Bits of each number that is sent of a share below 1: its sign, and one of 2^(bits − 1) magnitudes; with 1 the
    sign alone, and for all of a block one magnitude, their mean."""
    merge_delay: int = 0
    """d: optimizer steps from the sending of a sparse merge's messages to their merging, while training goes on; 0
    waits for them. The :class:`lte.Merger` counts the steps."""

    def __post_init__(self) -> None:
        for name in ("heads", "rank", "merge_bits", "merge_delay"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        for name in ("alpha", "outer_momentum", "outer_lr", "merge_density"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("targets", "exclude", "trainable", "replicas", "vectors"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{name} must be a tuple of words, such as ('lm_head',), got {value!r}")
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, got {self.heads}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite (0 would multiply every head by 0), got {self.alpha}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = " or ".join(repr(c) for c in choices)
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        for name, allowed in (("trainable", REST), ("replicas", REPLICAS), ("vectors", VECTORS)):
            unknown = set(getattr(self, name)) - set(allowed)
            if unknown:
                raise ValueError(f"{name} takes {', '.join(allowed)}; got {', '.join(sorted(unknown))}")
        both = set(self.vectors) & set(self.replicas)
        if both:
            raise ValueError(f"{', '.join(sorted(both))} cannot be in vectors and in replicas: choose one of the two")
        frozen = {*self.vectors, *self.replicas} - set(self.trainable)
        if frozen:
            raise ValueError(f"vectors and replicas take what is trainable: add {', '.join(sorted(frozen))} to it")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"outer_momentum must be in [0, 1), got {self.outer_momentum}")
        if not 0 < self.outer_lr < math.inf:
            raise ValueError(f"outer_lr must be positive and finite, got {self.outer_lr}")
        if not 0 < self.merge_density <= 1:
            raise ValueError(f"merge_density must be above 0 and at most 1, got {self.merge_density}")
        copies = self.merge_density_replicas
        if copies is not None and not (isinstance(copies, int | float) and 0 < copies < 1):
            raise ValueError(f"merge_density_replicas must be above 0 and below 1, got {copies!r}")
        if copies is not None and (self.merge_density == 1 or not self.replicas):
            raise ValueError(
                "merge_density_replicas is for sparse merges of copies: give a merge_density below 1 and replicas"
            )
        if not 1 <= self.merge_bits <= 8:
            raise ValueError(f"merge_bits must be from 1 to 8, got {self.merge_bits}")
        if self.merge_delay < 0:
            raise ValueError(f"merge_delay must be 0 or a number of optimizer steps, got {self.merge_delay}")
        if self.merge_delay and self.merge_density == 1:
            raise ValueError("merge_delay is for sparse merges: give a merge_density below 1, or leave it out")
        if self.merge_delay and self.reset != "none":
            raise ValueError(
                f"merge_delay needs reset='none', got {self.reset!r}: a reset head would lose what is under way"
            )
        if self.mode == "sequential" and self.replicas:
            raise ValueError("sequential heads all see the whole batch and have no replicas: drop one of the two")

    @property
    def scale(self) -> float:
        """s = α/r, in floating point: upstream's integer division gives 0 for r > α."""
        return self.alpha / self.rank

    @property
    def outer(self) -> bool:
        """Whether a merge is more than adding the mean delta."""
        return self.outer_momentum > 0 or self.outer_lr != 1


_CHOICES = {
    "init": ("paper", "upstream"),
    "mode": ("parallel", "sequential"),
    "base": ("float32", "bfloat16", "4bit"),
    "reset": ("none", "B", "all"),
}
