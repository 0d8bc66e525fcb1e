"""What :class:`galore_vit.InBackward` puts beside a model's weights, and which of its layers it may feed from."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from galore_vit.factored import FactoredLinear

_takers = WeakTensorKeyDictionary()
"""Weight -> a weak reference to who takes its gradients."""


def claim(weights: Iterable[Tensor], taker: object) -> None:
    """From now on `taker` takes these weights' gradients.

    Raises:
        ValueError: if another one, which is not closed, takes one of them: the gradients would go there.
    """
    weights = list(weights)
    for p in weights:
        reference = _takers.get(p)
        if reference is not None and reference() is not None:
            raise ValueError("another InBackward takes these weights' gradients: close() it first")
    for p in weights:
        _takers[p] = weakref.ref(taker)


def give_up(weights: Iterable[Tensor], taker: object) -> None:
    """The end of :func:`claim`."""
    for p in weights:
        reference = _takers.get(p)
        if reference is not None and reference() is taker:
            del _takers[p]


def check_processes(model: nn.Module | None, process_group: dist.ProcessGroup | None) -> None:
    """Refuse, or warn of, several processes whose gradients nobody would average.

    Raises:
        ValueError: if the model is wrapped in DistributedDataParallel.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel averages gradients after InBackward has taken them: give the model that is in it, "
            "and process_group=torch.distributed.group.WORLD, and train without the wrapper"
        )
    if process_group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"this is one of {dist.get_world_size()} processes, and without a process_group InBackward averages "
            "nothing, nor can DistributedDataParallel, which finds no gradients: each trains a model of its own",
            UserWarning,
            stacklevel=3,
        )


def linears_of(model: nn.Module, projected: Mapping[Tensor, Any]) -> list[nn.Linear]:
    """The plain linear layers whose own parameter `weight` is among the projected."""
    found = [
        module for module in model.modules()
        if isinstance(module, nn.Linear) and type(module) in (nn.Linear, FactoredLinear)
        and "forward" not in vars(module) and module._parameters.get("weight") in projected
    ]  # fmt: skip
    if not found:
        raise ValueError("none of the model's nn.Linear layers has a projected weight: leave model out")
    return found


def stand_in(p: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of p's dtype and device that takes a gradient of `shape` and has no storage of its own."""
    return nn.Parameter(torch.zeros((), dtype=p.dtype, device=p.device).expand(shape))


def add(to: nn.Parameter, grad: Tensor) -> None:
    to.grad = grad if to.grad is None else to.grad.add_(grad)
