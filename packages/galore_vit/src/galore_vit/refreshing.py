"""What replaces a weight's basis: its moments are carried over, and the next refresh is set."""

from __future__ import annotations

from collections.abc import Callable

from galore_vit import sharding
from galore_vit.basis import overlap, without_basis
from galore_vit.counters import count, has_no_numbers
from galore_vit.item import Item
from galore_vit.projection import Bases
from galore_vit.settings import LAZY_LIMIT


def needs_old(item: Item) -> bool:
    """Whether :func:`put_bases` asks for the bases until now."""
    refresh = item.group["refresh"]
    return bool(refresh["rotate"]) or refresh["lazy"] is not None


def put_bases(
    item: Item, old: Bases, new: Bases, *, rotate: Callable[[Item, Bases, Bases], None], projected: int
) -> None:
    """Put `new` bases in place of `old` ones, and set when they are replaced.

    Args:
        rotate: carries the item's moments from the old bases to the new.
        projected: weights that are projected, over which first refreshes are spread.
    """
    state, refresh = item.state, item.group["refresh"]
    step, base_gap = count(state["step"]), item.group["update_proj_gap"]
    first = count(state["refresh_at"]) == 0
    if not first:
        if refresh["rotate"]:
            rotate(item, old, new)
        if (decay := refresh.get("decay", 1.0)) != 1.0:  # which earlier versions did not save
            for key in {"exp_avg", "exp_avg_scales"} & state.keys():  # of 8-bit moments the scales
                state[key].mul_(decay)
    gap = base_gap
    if refresh["lazy"] is not None:
        if not first:
            kept = 1.0 if has_no_numbers(state["gap"]) else float(sharding.gathered(overlap(old, new)))
            if kept >= refresh["lazy"]:
                gap = min(2 * count(state["gap"]), LAZY_LIMIT * base_gap)
        state["gap"].fill_(gap)
    assert item.layout is not None
    if "drawn_at" in state:
        state["drawn_at"].fill_(step)
    for key, value in zip(item.layout.keys, new, strict=True):
        if value is not None and key in state:
            state[key].copy_(value)
    if without_basis(new):
        gap = min(gap, max(step // 4, 1))  # its first gradient may come at any step, and is asked for ever more seldom
    phase = item.record.order * base_gap // projected if first and refresh["stagger"] else 0
    state["refresh_at"].fill_(step + min(phase or gap, gap))
