"""How a GaLore parameter group is set up, and how its bases are refreshed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from galore_vit.projection import PROJ_TYPES, layout_of
from galore_vit.tensors import check_rank

GALORE_DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "split": 1, "dim": 2}
OTHERS_KEYS = {
    "gap": "update_proj_gap", "update_gap": "update_proj_gap", "galore_rank": "rank", "galore_scale": "scale",
    "scale_type": "GaLoreScaled's scaling", "proj": "refresh=Refresh(method=…)",
}  # fmt: skip
"""What other packages, or the commands' flags, call a key, and what it is here."""
NEAR = 0.75
"""How alike (by difflib) an unknown key of a group and a known one are where the first is taken for the second."""
LAZY_LIMIT = 16
"""A lazy gap never grows beyond this many times `update_proj_gap`."""


@dataclass(frozen=True)
class Refresh:
    """How and when a basis is replaced."""

    method: Literal["power", "svd", "random"] = "power"
    """`power`: warm-started randomised iteration; `svd`: the exact decomposition of the paper; `random`: Gaussian
    columns drawn again at every step from a number that is kept, in GaLoreScaled alone, which never projects back."""
    iterations: int = 1
    """Products with GᵀG per refresh by `power`; one more for the first, which starts at random."""
    oversample: int = 8
    """Random columns beside the rank's own, by `power`."""
    stagger: bool = True
    """Spread the refreshes of the layers over the gap, so that no step pays for all of them."""
    rotate: bool | None = None
    """Carry the moments into the new basis; otherwise they are kept as they are, as published. None: carried, but not
    by `random`, whose bases have nothing in common."""
    decay: float = 1.0
    """Factor on the first moment at each refresh but the first, after it was carried over or kept; 0 forgets it."""
    lazy: float | None = None
    """Double a weight's gap (up to 16 times the first) while its new subspace keeps this share of the old
    one, between 0 and 1; back to the first gap when it keeps less. None: the gap is fixed."""

    def __post_init__(self) -> None:
        if self.method not in ("power", "svd", "random"):
            raise ValueError(f"refresh method must be 'power', 'svd' or 'random', not {self.method!r}")
        drawn = self.method == "random"
        if drawn and (self.rotate or self.lazy is not None):
            raise ValueError("random bases have nothing in common: leave rotate and lazy out, or take method 'power'")
        if self.rotate is None:
            object.__setattr__(self, "rotate", not drawn)
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"refresh decay must lie in [0, 1], not {self.decay}")
        if type(self.iterations) is not int or type(self.oversample) is not int:
            raise ValueError("refresh takes whole numbers of iterations and of oversample")
        if self.iterations < 1 or self.oversample < 0:
            raise ValueError("refresh needs iterations of at least 1 and an oversample of at least 0")
        if self.lazy is not None and not 0.0 < self.lazy <= 1.0:
            raise ValueError(f"refresh lazy must lie in (0, 1], not {self.lazy}")


def is_number(value: object) -> bool:
    """Whether it is an ordinary number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_rate(value: object) -> bool:
    """Whether it can be a learning rate: a finite number of at least 0, or a tensor of no dimensions that holds one."""
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex() or value.dtype == torch.bool:
            return False
        return value.is_meta or 0.0 <= float(value) < math.inf
    return isinstance(value, Real) and is_number(value) and 0.0 <= float(value) < math.inf


def rate_of(group: Mapping[str, Any]) -> Any:
    """The group's learning rate as a number, in a tensor or not."""
    lr = group["lr"]
    return float(lr) if isinstance(lr, Tensor) else lr


AS_PUBLISHED = Refresh(method="svd", stagger=False, rotate=False)
"""What `paper=True` uses."""


def check_refresh(refresh: Refresh, *, draws: bool) -> None:
    """Raises ValueError where an optimizer that does not draw bases is to draw them."""
    if refresh.method == "random" and not draws:
        raise ValueError(
            "random bases are not orthonormal, and this optimizer projects back by them: take method 'power' or 'svd', "
            "or GaLoreScaled"
        )


def refresh_of(saved: Any) -> Refresh:
    """A group's refresh from the dict that a state holds.

    Raises:
        ValueError: if it is none.
    """
    try:
        return Refresh(**saved)
    except TypeError:
        raise ValueError(f"a group's refresh must be a Refresh, or its settings as a dict, not {saved!r}") from None


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError where a group's GaLore keys are outside their range."""
    if "rank" not in group:
        return
    tensor = isinstance(group["dim"], int) and group["dim"] > 2
    if tensor:
        check_rank(group["rank"], group["dim"])
    for key, low in (("rank", 1), ("update_proj_gap", 1), ("split", 1), ("dim", 1)):
        if key == "rank" and tensor:
            continue
        value = group[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{key} must be a whole number of at least {low}, not {value!r}")
    if not (isinstance(group["scale"], int | float) and 0.0 < group["scale"] < math.inf):
        raise ValueError(
            f"scale must be above 0 and finite, not {group['scale']!r}: at 0 no projected weight would move"
        )
    if tensor and (group["split"] != 1 or group.get("residual")):
        raise ValueError("a group with dim above 2 takes neither split nor residual: leave them out")
    if group["proj_type"] not in PROJ_TYPES:
        raise ValueError(f"proj_type must be one of {', '.join(PROJ_TYPES)}, not {group['proj_type']!r}")


def completed(given: Mapping[str, Any], *, residual: bool | None, draws: bool) -> dict[str, Any]:
    """A group with the defaults of those that are projected.

    Args:
        residual: the optimizer's own.
        draws: whether its bases may be random.

    Raises:
        ValueError: where its keys are outside their range, or have no meaning together.
    """
    group = dict(given)
    if others := sorted(OTHERS_KEYS.keys() & group.keys()):
        words = ", ".join(f"{key}, which is {OTHERS_KEYS[key]} here" for key in others)
        raise ValueError(f"a parameter group has {words}: rename it")
    if "rank" in group:
        group = {**GALORE_DEFAULTS, **group}
    elif stray := sorted((GALORE_DEFAULTS.keys() & group.keys()) - {"dim"}):  # the published code adds dim to all
        raise ValueError(f"a parameter group has {', '.join(stray)} but no rank: add rank, or drop them")
    check_group({"residual": residual, **group})
    if isinstance(own := group.get("refresh"), Refresh):
        group["refresh"] = own = asdict(own)
    if own is not None:
        check_refresh(refresh_of(own), draws=draws)
    return group


def misspelt(given: Mapping[str, Any], settings: Iterable[str]) -> list[str]:
    """A sentence for each key that nothing reads and that is nearly one which is read; torch.optim takes any key.

    Args:
        given: a parameter group.
        settings: the optimizer's own.
    """
    known = {"params", "rank", *GALORE_DEFAULTS, *settings}
    said = []
    for key in sorted(k for k in given if isinstance(k, str) and k not in known):
        near = [k for k in known if k not in given and abs(len(k) - len(key)) <= 2 and _alike(key.lower(), k)]
        if near:
            likest = max(near, key=lambda k: SequenceMatcher(None, key.lower(), k).ratio())
            said.append(f"a parameter group has {key!r}, which nothing reads: did you mean {likest!r}?")
    return said


def _alike(a: str, b: str) -> bool:
    """In most letters; of a word of three, in all but one that is added, or in another order."""
    ratio = SequenceMatcher(None, a, b).ratio()
    return sorted(a) == sorted(b) or ratio >= (NEAR if len(b) > 3 else NEAR + 0.05)


def fixed_keys(group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The keys of a group that decide the shapes of its states; groups of earlier versions lack some."""
    return tuple((key, group.get(key, GALORE_DEFAULTS.get(key))) for key in ("rank", "proj_type", "split", "dim"))


def check_weights(group: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of a group's weights that are too small to be projected.

    Raises:
        ValueError: for weights that cannot be in it.
    """
    small = []
    for p in group["params"]:
        if p.is_complex():
            raise ValueError("GaLore takes real parameters, and one is complex")
        if "rank" in group and group["dim"] > 2 and p.ndim != group["dim"]:
            raise ValueError(f"a group with dim {group['dim']} has a weight of {p.ndim} dimensions: group it apart")
        if p.ndim >= 2 and "rank" in group and layout_of(p.shape, group) is None:
            small.append(tuple(p.shape))
    return small
