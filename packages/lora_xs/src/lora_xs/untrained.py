"""What has no adapter, and which adapters no forward pass ever reaches: nothing goes untrained without a word."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .config import LoRAXSConfig
from .errors import LoRAXSError
from .head import heads
from .layer import XSLayer, XSMatrices, is_adapted, layers
from .targets import find_heads, looks_like_experts, numberless, parameters_to_adapt

WORTH_SAYING = 0.01
"""Smallest part of the blocks' weights without an adapter that is said at injection."""


NOT_REACHED = "the first step trained nothing at"
"""How the warning about adapters that no forward pass reached begins."""


@dataclass(frozen=True)
class Coverage:
    """Which of the weights in a model's blocks (its numbered modules) have an adapter."""

    total: int
    """Entries of the blocks' weights of two or more dimensions."""
    missing: dict[str, int]
    """Entries without an adapter, by name with the blocks' numbers starred."""

    @property
    def part(self) -> float:
        """What is missing, of all."""
        return sum(self.missing.values()) / max(1, self.total)

    def __str__(self) -> str:
        listed = sorted(self.missing, key=lambda name: -self.missing[name])
        names = ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
        return f"{100 * self.part:.0f} % of the weights of the blocks have no adapter" + (f": {names}" if names else "")


def coverage(model: nn.Module) -> Coverage:
    """Count what :func:`lora_xs.inject` left without an adapter, in an adapted model."""
    adapted = {id(module._parameters.get(layer.parameter)) for module, layer in layers(model)}
    seen = {id(p) for module, _ in heads(model) for p in module.parameters()}
    total, missing = 0, Counter[str]()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding | XSLayer | XSMatrices):
            continue
        for leaf, weight in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if weight.ndim < 2 or leaf.endswith("bias") or id(weight) in seen or not re.search(r"(^|\.)\d+\.", name):
                continue
            seen.add(id(weight))
            total += weight.numel()
            if id(weight) not in adapted:
                missing[numberless(name.removesuffix(".weight"))] += weight.numel()
    return Coverage(total, dict(missing))


def say_what_has_no_adapter(model: nn.Module, config: LoRAXSConfig) -> None:
    """Warn where "all-linear" left weights out that its user may think it adapts, and where targets chosen by name
    left out stacked experts, which no module's name shows."""
    found = coverage(model)
    if config.targets != "all-linear":
        head_names = tuple(name + "." for name in find_heads(model, config))
        experts = {
            numberless(name.removesuffix(".weight"))
            for name, target in parameters_to_adapt(model).items()
            if looks_like_experts(target) and not name.startswith(head_names)
        }
        found = Coverage(found.total, {n: size for n, size in found.missing.items() if n in experts})
    elif config.exclude or config.layers_to_transform is not None:
        return  # its user left some out
    if found.part >= WORTH_SAYING:
        warnings.warn(f"{found}", stacklevel=3)


def say_which_bases_are_zero(model: nn.Module) -> None:
    """Warn of weights of zeros: A = S Vᵀ is zero too, and with it the gradient of R."""
    zero = [layer.name for _, layer in layers(model) if not layer.A.is_meta and not bool(layer.A.any())]
    if zero:
        warnings.warn(
            f"{', '.join(sorted(set(map(numberless, zero))))} have weights of zeros, whose bases are zero too: their "
            'adapters train nothing; exclude them, or take init="random"',
            stacklevel=3,
        )


def uncalled(model: nn.Module) -> list[str]:
    """Names of adapters that no forward pass has come to yet although it came to others, in the model's order.

    A module counts as reached if the same one of another block (a name that differs in numbers alone) was: an expert
    to which no token was sent is not untrained for ever.
    """
    pairs = layers(model)
    reached = {numberless(layer.name) for _, layer in pairs if layer.called}
    return [layer.name for _, layer in pairs if numberless(layer.name) not in reached]


def updated(model: nn.Module) -> list[str]:
    """Names of modules outside the task heads whose running statistics change with each batch, in the model's order."""
    inside = {id(part) for module, _ in heads(model) for part in module.modules()}
    return [
        name
        for name, module in model.named_modules()
        if module.training and getattr(module, "running_mean", None) is not None and id(module) not in inside
    ]


def check_called(model: nn.Module) -> None:
    """For after the first step.

    Raises:
        LoRAXSError: naming the adapters that the step did not reach, and what to do.
    """
    if names := uncalled(model):
        raise LoRAXSError(advice(names))


def advice(names: list[str]) -> str:
    """The sentence about adapters that were not reached."""
    kinds = Counter(map(numberless, names))
    listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in kinds.items())
    leaf = next(iter(kinds)).rpartition(".")[2]
    return (
        f"{NOT_REACHED} {listed}: the model never calls these modules, their parents may read "
        f'their weights; adapt them through_weight=("{leaf}",), or exclude them'
    )


def watch(model: nn.Module) -> None:
    """Look once, in the first backward pass of the active adapter, whether its modules were all reached; warn of those
    that were not."""
    _, first = layers(model)[0]
    if first.active is None or first.active in first.watched:
        return
    first.watched |= {first.active}
    look = _Look(model)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_meta:
            look.handles.append(parameter.register_post_accumulate_grad_hook(look))


class _Look:
    """Called when the first gradient arrives: every forward pass of the step is over by then."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.handles: list[Any] = []

    def __call__(self, parameter: Tensor) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if not is_adapted(self.model):  # they were removed, or merged for good
            return
        if names := uncalled(self.model):
            warnings.warn(advice(names), stacklevel=2)
        if names := updated(self.model):
            warnings.warn(
                f"{names[0]} ({len(names)} such modules) updates its running statistics in training, and an adapter "
                "file does not hold them: put these modules into eval(), or save the whole model",
                stacklevel=2,
            )
