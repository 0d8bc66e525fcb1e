"""A grid of arms: lists of choices and settings, multiplied, for every seed. Read from TOML or flags; no torch here.

::

    seeds = 3                      # 0, 1, 2; or a list of seeds
    train = ["full", "lora"]       # choices on the three axes, and lists of their settings
    rank = [4, 8]
    [[grid]]                       # several products: what stands above holds for each
    save = ["all", "backrazor"]
    keep = [0.05, 0.1]
    [[grid]]
    optim = ["galore-adamw"]
    [lr]                           # peak learning rates: of a train, or of a train and an optim
    full = 5e-4
    "full+sgd" = 1e-2
    [finetune]                     # flags of finetune, for every arm
    data = "digits"
    [pretrain]                     # flags of one finetune before all arms, which start from its weights
    epochs = 30

Each arm is one ``finetune`` command.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from memtrain_common.commands.configure import flag

from ..compose.axes import OPTIM, SAVE, TRAIN, USED_BY, Axes, read_settings

AXES: dict[str, tuple[str, ...]] = {"train": TRAIN, "save": SAVE, "optim": OPTIM}
LISTED = (*AXES, *USED_BY, "lr")
"""What a grid may list."""
TABLES = ("grid", "lr", "finetune", "pretrain")
ALWAYS_SAID = ("rank", "keep", "galore_rank")
"""Settings that a command and a name hold even where they have their default."""
OWN_FLAGS = {"seed", "out", "resume", "device", "explain_memory", "budget"}
"""Flags of finetune that ablate gives each arm itself; budget would choose what the arms compare."""


def _short(number: float) -> str:
    """With six digits where they say all of it."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


@dataclass(frozen=True)
class Combination:
    """One choice on each axis with its settings: the arms of all seeds are its repetitions."""

    axes: Axes
    lr: float = 0.0
    """Peak learning rate; 0 leaves it to finetune."""
    lr_listed: bool = False
    """The grid lists learning rates, so that the name needs it."""

    @property
    def settings(self) -> dict[str, float | int | str]:
        """What the choices read and is worth saying: the principal settings, and those that differ from the default."""
        default = Axes()
        read = read_settings(self.axes)
        return {n: v for n, v in read.items() if n in ALWAYS_SAID or v != getattr(default, n)}

    @property
    def name(self) -> str:
        """Fit for a file's name: "lora-rank8+backrazor-keep0.1+adamw"."""
        parts = []
        for axis in AXES:
            own = [f"{n.replace('_', '-')}{v}" for n, v in self.settings.items() if USED_BY[n][0] == axis]
            parts.append("-".join([getattr(self.axes, axis), *own]))
        return "+".join(parts) + (f"+lr{_short(self.lr)}" if self.lr_listed else "")

    @property
    def words(self) -> list[str]:
        """finetune's flags for it."""
        words = [w for axis in AXES for w in (flag(axis), getattr(self.axes, axis))]
        words += [w for n, v in self.settings.items() for w in (flag(n), str(v))]
        return words + (["--lr", _short(self.lr)] if self.lr else [])


@dataclass(frozen=True)
class Arm:
    """One run: a combination with a seed."""

    combination: Combination
    seed: int

    @property
    def name(self) -> str:
        return f"{self.combination.name}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """What is compared, as plain values: kept in the ablation's config.json."""

    products: tuple[dict[str, list[Any]], ...] = ()
    """Each lists values by name; a choice that is not listed has its default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: dict[str, float] = field(default_factory=dict)
    """Peak learning rates by "train" or "train+optim"."""
    finetune: dict[str, Any] = field(default_factory=dict)
    """finetune's flags for every arm."""
    pretrain: dict[str, Any] | None = None
    """finetune's flags for the run before all arms; None has no such run."""

    def combinations(self) -> list[Combination]:
        """All that the products hold, meaningful or not, each once."""
        found: dict[Combination, None] = {}
        for product in self.products:
            for combination in self._multiply(product):
                found.setdefault(combination)
        return list(found)

    def _multiply(self, product: Mapping[str, list[Any]]) -> Iterator[Combination]:
        for choices in itertools.product(*(product.get(axis, [getattr(Axes(), axis)]) for axis in AXES)):
            chosen = dict(zip(AXES, choices, strict=True))
            read = [n for n, (axis, users) in USED_BY.items() if n in product and chosen[axis] in users]
            rates = product.get("lr")
            usual = self.lr.get(f"{chosen['train']}+{chosen['optim']}", self.lr.get(chosen["train"], 0.0))
            for values in itertools.product(*(product[n] for n in read), rates or [usual]):
                settings = dict(zip(read, values[:-1], strict=True))
                yield Combination(Axes(**{**chosen, **settings}), values[-1], rates is not None)

    def words(self, combination: Combination, more: Mapping[str, Any] | None = None) -> list[str]:
        """finetune's flags for a combination: its own, and those of every arm.

        Args:
            more: flags of every arm that the grid may set otherwise.
        """
        flags = {**(more or {}), **self.finetune}
        if combination.axes.train == "head" and combination.lr:
            flags.pop("head_lr", None)  # the rate of a head beside something else
        return [*combination.words, *flag_words(flags)]

    def arms(self) -> list[Arm]:
        """Every combination with the first seed, then with the second, …"""
        return [Arm(combination, seed) for seed in self.seeds for combination in self.combinations()]


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """A table of flags as words: ``labels = [5, 6]`` -> ``--labels 5 6``; ``compile = false`` -> ``--no-compile``."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + flag(name)[2:])
        else:
            words += [flag(name), *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return words
