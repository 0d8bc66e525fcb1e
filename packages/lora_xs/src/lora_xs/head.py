"""A trained task head for each adapter.

The first adapter trains the model's own head in place. Every later one has a copy, attached to the head
module as its submodule `lora_xs_head`; a forward hook answers with the copy of the active adapter, or of
each row's adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRAXSError

ATTRIBUTE = "lora_xs_head"


class XSHead(nn.Module):
    """The heads of all adapters of one head module."""

    def __init__(self, name: str, first: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.first = first  # the adapter that the model's own head belongs to
        self.copies = nn.ModuleDict()
        self.active: str | None = first
        self.rows: tuple[str | None, ...] | None = None
        self.before_merge: list[str | None] = []  # the active adapter, while one is merged
        # What a new adapter starts from: the head as it was, not as the first adapter has trained it.
        self.start = {key: value.detach().clone() for key, value in module.state_dict().items()}

    def add(self, module: nn.Module, name: str) -> None:
        """A copy of the untrained head for adapter `name`."""
        plain = copy.copy(module)
        plain._modules = {k: v for k, v in module._modules.items() if k != ATTRIBUTE}
        plain._forward_hooks = type(module._forward_hooks)()
        plain._forward_hooks_with_kwargs = type(module._forward_hooks_with_kwargs)()
        plain._forward_pre_hooks = type(module._forward_pre_hooks)()
        plain._forward_pre_hooks_with_kwargs = type(module._forward_pre_hooks_with_kwargs)()
        clone = copy.deepcopy(plain)
        device = next(module.parameters()).device
        clone.load_state_dict({key: value.to(device) for key, value in self.start.items()})
        self.copies[name] = clone

    def of(self, module: nn.Module, name: str) -> nn.Module:
        """The head of adapter `name`: the module itself or a copy."""
        if name == self.first:
            return module
        return self.copies[name]

    def parameters_of(self, module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the head of adapter `name`."""
        for key, parameter in self.of(module, name).named_parameters():
            if not key.startswith(ATTRIBUTE + "."):
                yield key, parameter

    def activate(self, module: nn.Module, name: str | None) -> None:
        """Use and train the head of adapter `name`; None uses the model's own and trains none."""
        self.active = name
        for key in (self.first, *self.copies):
            for _, parameter in self.parameters_of(module, key):
                parameter.requires_grad_(key == name)

    @torch.no_grad()
    def settle(self, module: nn.Module, name: str) -> None:
        """Make the head of adapter `name` the module's own."""
        if name != self.first:
            own = dict(self.parameters_of(module, self.first)) | dict(module.named_buffers())
            for key, value in self.copies[name].state_dict().items():
                own[key].copy_(value)

    def check(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The forward pre-hook: the module's own head runs first, whichever one answers."""
        other = next((name for name in self.rows or (self.active,) if name is not None and name in self.copies), None)
        if other is not None and self._moves_statistics(module):
            raise LoRAXSError(
                f"the head {self.name} has running statistics, and training {other!r} would change those of "
                f"{self.first!r} too: train a model with one adapter, or put what has them into eval()"
            )

    def _moves_statistics(self, module: nn.Module) -> bool:
        """Whether a forward pass of the module's own head changes running statistics."""
        copies = {id(part) for part in self.modules()}
        return any(
            m.training and getattr(m, "running_mean", None) is not None for m in module.modules() if id(m) not in copies
        )

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        """The forward hook: the answer of the head that is asked for."""
        if self.rows is None:
            if self.active is None or self.active == self.first:
                return None
            return self.copies[self.active](*args, **kwargs)
        if out.shape[0] != len(self.rows):
            raise LoRAXSError(f"{self.name} got {out.shape[0]} rows, but adapters were given for {len(self.rows)}")
        answers = {None: out, self.first: out}
        for name in {row for row in self.rows if row is not None and row in self.copies}:
            answers[name] = self.copies[name](*args, **kwargs)
        return torch.stack([answers[name][i] for i, name in enumerate(self.rows)])


def head_of(module: nn.Module) -> XSHead | None:
    """The module's heads, if it is a task head."""
    head = module._modules.get(ATTRIBUTE)
    return head if isinstance(head, XSHead) else None


def heads(model: nn.Module) -> list[tuple[nn.Module, XSHead]]:
    """Every task-head module with its heads."""
    found = [(module, head_of(module)) for module in model.modules()]
    return [(module, head) for module, head in found if head is not None]
