"""What to adapt and how: the configuration and its matching of module names."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, InitVar, dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from .errors import LoRAXSError

if TYPE_CHECKING:
    from peft import LoraConfig

# The modules that the paper adapts, by model family.
ROBERTA_TARGETS = ("query", "value", "attention.output.dense", "output.dense")
CAUSAL_LM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Task heads that transformers creates for classification; trained where present unless `head` names others.
USUAL_HEADS = ("classifier", "score")

# PEFT's word: ours.
PEFT_WORDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "head",
    "lora_dropout": "dropout",
}


@dataclass(frozen=True)
class LoRAXSConfig:
    """h = W x + (α/r)·B R A x, with A and B from the SVD of W; only R (r×r) is trained (arXiv 2405.17604).

    PEFT's words mean the same as ours: `LoRAXSConfig(r=8, lora_alpha=16, target_modules=["q_proj"])`. Each thing is
    given by one of its two words; both can be read.
    """

    rank: int = 0
    """r: rows and columns of R. There is no default."""

    alpha: float | None = None
    """α: the update is scaled by α/r. None means α = r, a scale of 1 (the official choice for mathematics;
    the official GLUE runs fix 16)."""

    targets: tuple[str, ...] | str = "all-linear"
    """Module names, matched by suffix at a dot ("query", "attention.output.dense"); or one regular expression
    that the whole name must match; or "all-linear": every Linear and Conv1D except head and output
    embedding."""

    init: Literal["svd", "random", "gradient"] = "svd"
    """Bases from the SVD of each weight; random ones (the paper's ablation); or the leading subspaces of each weight's
    gradient over the batches that `inject` is given (as LoRA-SB), which are stored with the adapter."""

    svd: Literal["randomized", "exact", "official"] = "randomized"
    """Randomised block Krylov iteration; LAPACK's full SVD; or what the official code computes (scikit-learn's
    TruncatedSVD, which must be installed then)."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for modules whose name ends in the key."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other α for modules whose name ends in the key."""

    exclude: tuple[str, ...] = ()
    """Names, matched by suffix, that stay frozen although a target matches them."""

    head: tuple[str, ...] | None = None
    """Task-head modules, matched by suffix, that are trained in full and saved beside the adapter. None means
    `classifier` and `score` where the model has them; () means none."""

    dropout: float = 0.0
    """Probability of dropping an entry of A x. Applied at width r, so that the saved mask stays small."""

    train_bases: bool = False
    """Train A and B too. They are then saved with the adapter, and no second adapter can share them."""

    r_std: float = 1e-5
    """Standard deviation of R at the start."""

    seed: int = 0
    """Seed of R and, with init="random", of A and B. Each module draws from its own stream."""

    first_step: float = 0.0
    """η of init="gradient": R starts where B R A·(α/r) is the first step down the gradient in the bases' span, with a
    root mean square of η in each weight, instead of at zero. AdamW's first step of rate η has the same."""

    layers_to_transform: tuple[int, ...] | None = None
    """Adapt only in these blocks: the first number in a module's name must be one of them. None means in all."""

    layers_pattern: tuple[str, ...] = ()
    """Names of the lists that `layers_to_transform` counts in ("layers", "h"); () means whatever precedes a number."""

    through_weight: tuple[str, ...] = ()
    """Targets, matched by suffix, that are adapted through their weight: while their parent's forward runs it finds
    W + (α/r)·B R A in its place. For modules whose weight the parent reads without calling them."""

    _: KW_ONLY
    r: InitVar[int | None] = None
    """PEFT's word for `rank`."""
    lora_alpha: InitVar[float | None] = None
    """PEFT's word for `alpha`."""
    target_modules: InitVar[Iterable[str] | str | None] = None
    """PEFT's word for `targets`."""
    exclude_modules: InitVar[Iterable[str] | None] = None
    """PEFT's word for `exclude`."""
    modules_to_save: InitVar[Iterable[str] | None] = None
    """PEFT's word for `head`."""
    lora_dropout: InitVar[float | None] = None
    """PEFT's word for `dropout`."""

    def __post_init__(
        self,
        r: int | None,
        lora_alpha: float | None,
        target_modules: Iterable[str] | str | None,
        exclude_modules: Iterable[str] | None,
        modules_to_save: Iterable[str] | None,
        lora_dropout: float | None,
    ) -> None:
        theirs = (r, lora_alpha, target_modules, exclude_modules, modules_to_save, lora_dropout)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for (word, name), value in zip(PEFT_WORDS.items(), theirs, strict=True):
            if value is not None:
                if getattr(self, name) != defaults[name]:
                    raise LoRAXSError(f"{word} is PEFT's word for {name}: give one of the two")
                object.__setattr__(self, name, value)
        if isinstance(self.layers_to_transform, int):
            object.__setattr__(self, "layers_to_transform", (self.layers_to_transform,))
        if isinstance(self.layers_pattern, str):
            object.__setattr__(self, "layers_pattern", (self.layers_pattern,))
        # A lone string would be iterated letter by letter; lists come from JSON and from callers used to
        # PEFT, sets from its configurations.
        for name in ("exclude", "head", "targets", "layers_to_transform", "layers_pattern", "through_weight"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "targets":
                raise LoRAXSError(f"{name} must be a tuple of names, not the string {value!r}")
            if isinstance(value, list | set | frozenset):
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, set | frozenset) else value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise LoRAXSError("layers_pattern says where layers_to_transform counts; give that too")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise LoRAXSError(f"rank must be a whole number of at least 1, not {self.rank!r}")
        for key, rank in self.rank_pattern.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise LoRAXSError(f"rank_pattern[{key!r}] must be a whole number of at least 1, not {rank!r}")
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for what, alpha in alphas.items():
            # α = 0 would train nothing without a word.
            if alpha is not None and not 0 < alpha < math.inf:
                raise LoRAXSError(f"{what} must be greater than 0 and finite, not {alpha!r}")
        if not self.targets:
            raise LoRAXSError('targets is empty; name modules by suffix, or give "all-linear"')
        if self.init not in ("svd", "random", "gradient"):
            raise LoRAXSError(f'init must be "svd", "random" or "gradient", not {self.init!r}')
        if not 0 <= self.first_step < math.inf:
            raise LoRAXSError(f"first_step must be 0 or a small positive number, not {self.first_step!r}")
        if self.first_step and self.init != "gradient":
            raise LoRAXSError(f'first_step follows the gradient, which init="{self.init}" does not look at')
        if self.svd not in ("randomized", "exact", "official"):
            raise LoRAXSError(f'svd must be "randomized", "exact" or "official", not {self.svd!r}')
        if not 0 <= self.dropout < 1:
            raise LoRAXSError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.r_std < 0:
            raise LoRAXSError(f"r_std must not be negative, but is {self.r_std!r}")

    def rank_of(self, name: str) -> int:
        """r of the module called `name`."""
        return _lookup(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """α of the module called `name`."""
        alpha = _lookup(self.alpha_pattern, name, self.alpha)
        return float(self.rank_of(name) if alpha is None else alpha)

    def scale_of(self, name: str) -> float:
        """α/r of the module called `name`."""
        return self.alpha_of(name) / self.rank_of(name)

    def to_json(self) -> str:
        """One line of JSON."""
        fields = dataclasses.asdict(self)
        # Files without them stay as they were before these fields.
        for name in ("layers_to_transform", "layers_pattern", "through_weight", "first_step"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LoRAXSConfig:
        """The inverse of `to_json`; unknown or missing fields are refused."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise LoRAXSError(f"this is not a LoRA-XS configuration: {error}") from error

    @classmethod
    def from_peft(cls, config: LoraConfig, **ours: Any) -> LoRAXSConfig:
        """The configuration that adapts what PEFT's `LoraConfig` would adapt, at its rank and scale.

        Args:
            config: of PEFT. What LoRA-XS has no counterpart for (DoRA, trained biases, …) is refused by name.
            ours: fields of this class that PEFT does not have (`init`, `svd`, `seed`, `r_std`, …).
        """
        from .peft_config import fields_of

        return cls(**fields_of(config), **ours)


# A word of PEFT's can be read too. Taken from the dataclass, so that `dataclasses.replace` does not pass it on.
for _word, _name in PEFT_WORDS.items():
    del LoRAXSConfig.__dataclass_fields__[_word]
    setattr(LoRAXSConfig, _word, property(attrgetter(_name)))


def matches(name: str, suffixes: Iterable[str]) -> bool:
    """Whether `name` is one of `suffixes` or ends in "." and one of them."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def matches_targets(name: str, targets: tuple[str, ...] | str) -> bool:
    """As `matches`; a string is a regular expression for the whole name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return matches(name, targets)


def in_layers(name: str, config: LoRAXSConfig) -> bool:
    """Whether `layers_to_transform` allows the module called `name`: as in PEFT, its first number counts (an expert's
    stands behind it)."""
    if config.layers_to_transform is None:
        return True
    for pattern in config.layers_pattern or (r"[^.]+",):
        if found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)(?:\.|$)", name):
            return int(found[1]) in config.layers_to_transform
    return False


def _lookup(pattern: dict[str, Any], name: str, default: Any) -> Any:
    # The longest key wins: "attention.output.dense" is more specific than "output.dense".
    found = [key for key in pattern if matches(name, (key,))]
    return pattern[max(found, key=len)] if found else default
