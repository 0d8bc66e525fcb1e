"""A saved state comes back in the dtypes and on the devices that a GaLore optimizer would give it, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_vit.counters import COUNTERS
from galore_vit.projection import layout_of
from galore_vit.settings import GALORE_DEFAULTS, check_refresh, refresh_of


@contextmanager
def in_own_dtypes(optimizer: Any) -> Iterator[None]:
    """While open, `Optimizer.load_state_dict` checks before it changes anything, and does not cast by torch's rule.

    Both stand between the hooks of others: what theirs give is what is checked, and what is loaded is what they see.
    """
    loaded: dict[Tensor, dict[str, Tensor]] = {}

    def check(_: Optimizer, given: dict[str, Any]) -> None:
        for saved in given["param_groups"]:
            if missing := sorted(optimizer._keys - saved.keys() - optimizer.later):
                raise ValueError(f"this state was saved by another optimizer: its groups have no {', '.join(missing)}")
            check_refresh(refresh_of(saved["refresh"]), draws=optimizer.draws)
        loaded.update(_cast(optimizer, given))

    def put(_: Optimizer) -> None:
        for group in optimizer.param_groups:
            group.update(_with_what_is_later(optimizer, group))
        optimizer.state.update(loaded)

    before = optimizer.register_load_state_dict_pre_hook(check)
    after = optimizer.register_load_state_dict_post_hook(put, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _with_what_is_later(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """A saved group with the settings that states of earlier versions lack."""
    later = {key: optimizer.defaults[key] for key in optimizer.later}
    return {**later, **({"dim": GALORE_DEFAULTS["dim"]} if "rank" in group else {}), **group}


def _cast(optimizer: Any, given: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
    """The saved state of each parameter, copied.

    Raises:
        ValueError: if one does not fit its parameter.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    saved_of = [(i, group) for group in given["param_groups"] for i in group["params"]]
    found: dict[Tensor, dict[str, Tensor]] = {}
    for p, (i, saved_group) in zip(own, saved_of, strict=False):  # torch says where their numbers differ
        saved = given["state"].get(i)
        if saved is None:
            continue
        group = _with_what_is_later(optimizer, saved_group)
        fresh = optimizer._fresh_state(p, group, layout_of(p.shape, group), device=torch.device("meta"))
        if saved.keys() != fresh.keys() or any(saved[k].shape != fresh[k].shape for k in fresh):
            raise ValueError(
                f"the saved state of parameter {i} does not fit its shape {tuple(p.shape)}: it was saved "
                "by another optimizer or for another model"
            )
        found[p] = {
            k: v.to(device="cpu" if k in COUNTERS else p.device, dtype=fresh[k].dtype, copy=True)
            for k, v in saved.items()
        }
    return found
