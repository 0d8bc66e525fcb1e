"""Hooks that others have registered on a layer go to what takes its place, and come back with it."""

import copy

from torch import nn

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
"""Where a module keeps what was registered on it. Tried on torch 2.15.0."""


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """Both have the same dicts then, so that a handle's ``remove()`` still finds its hook."""
    for name in HOOKS:
        setattr(new, name, getattr(old, name))


def without_numbers(layer: nn.Module) -> nn.Module:
    """A copy of a layer on the meta device, without what was registered on it."""
    bare = copy.copy(layer)
    for name in HOOKS:
        setattr(bare, name, getattr(nn.Module(), name))
    return copy.deepcopy(bare).to("meta")
