"""What others have put on a layer (hooks, attributes) goes to what takes its place, and comes back with it."""

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


def lend_attributes(old: nn.Module, new: nn.Module) -> tuple[str, ...]:
    """Let ``new`` have what else is set on ``old`` and the model around may read (``layer.gain``).

    Returns:
        its names: not what ``new`` has of its own, nor a forward that was set on the layer, nor names with an
        underscore, which are torch's and accelerate's.
    """
    names = tuple(n for n in vars(old) if n[0] != "_" and n != "forward" and not hasattr(new, n))
    vars(new).update({name: vars(old)[name] for name in names})
    return names


def give_back_attributes(new: nn.Module, old: nn.Module, names: tuple[str, ...]) -> None:
    """What became of them meanwhile."""
    for name in names:
        vars(old).pop(name, None)
        if name in vars(new):
            vars(old)[name] = vars(new)[name]


def without_numbers(layer: nn.Module) -> nn.Module:
    """A copy of a layer on the meta device, without what was registered on it."""
    bare = copy.copy(layer)
    for name in HOOKS:
        setattr(bare, name, getattr(nn.Module(), name))
    return copy.deepcopy(bare).to("meta")
