"""One model of the zoo: how it is built, what it is given, and the loss that is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 4
CLASSES = 4


@dataclass(frozen=True)
class Case:
    """A model by a tiny random configuration."""

    make: Callable[[], nn.Module]
    batch: Callable[[nn.Module], dict[str, Any]]
    """The model's keyword arguments, of random numbers from torch's generator."""

    def build(self) -> nn.Module:
        """The same weights at each call. A layer of zeros, as some heads begin, is drawn: it stops all gradients."""
        torch.manual_seed(0)
        model = self.make()
        for module in model.modules():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Linear) and weight is not None and not weight.any():
                nn.init.normal_(weight, std=0.02)
        return model

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        torch.manual_seed(1)
        return self.batch(model)


def outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Every floating-point tensor that the model returns but its own loss, in its order."""
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.dim() > 1:
                found.append(value)
        elif isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part)

    walk(model(**batch))
    return found


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's own loss where it gives one, else a fixed random projection of its first output."""
    torch.manual_seed(2)  # of dropout
    made = model(**batch)
    loss = made.get("loss") if isinstance(made, dict) else None
    if loss is not None:
        return loss
    first: Any = made
    while not isinstance(first, Tensor):
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(3))
    return (first.float() * direction).mean()
