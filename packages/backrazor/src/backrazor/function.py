"""What all operations share: saving by name, refusing a second derivative in words, dropping what was used."""

from typing import Any

import torch
from torch import Tensor

from .errors import RazorError
from .saved import Dense
from .store import Held, seen_as


class Function(torch.autograd.Function):
    """An operation whose backward pass works from what :func:`save` kept. Subclasses give ``forward`` and ``grad``."""

    @staticmethod
    def grad(ctx: Any, *grads: Any) -> Any:
        """dL/d(inputs) from dL/d(outputs)."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RazorError(
                    "Back Razor has no second derivative: what it keeps of an activation suffices for one backward "
                    "pass; leave create_graph=False, or do not open the Razor around this model"
                )
            return cls.grad(ctx, *grads)

        cls.backward = staticmethod(backward)  # type: ignore[method-assign]


def save(ctx: Any, **named: Held | Tensor | None) -> None:
    """Save stored tensors (:class:`.store.Held`) and tensors by reference, each under a name; None saves nothing."""
    tensors: list[Tensor] = []
    ctx.plan, ctx.holders = [], []
    for name, value in named.items():
        if isinstance(value, Held):
            parts = value.saved.tensors
            ctx.plan.append((name, len(parts), value.saved.recipe, value.geometry))
            ctx.holders.append(value.holder)
            tensors += parts
        elif value is not None:
            ctx.plan.append((name, 1, None, None))
            tensors.append(value)
    ctx.save_for_backward(*tensors)


class Kept:
    """What :func:`save` kept, made dense one by one, so that an operation decides what is there at the same time."""

    def __init__(self, ctx: Any) -> None:
        tensors = ctx.saved_tensors
        ctx.holders = []
        self._parts, start = {}, 0
        for name, count, recipe, geometry in ctx.plan:
            self._parts[name] = (tuple(tensors[start : start + count]), recipe, geometry)
            start += count

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def parts(self, name: str) -> tuple[tuple[Tensor, ...], Any]:
        """The tensors and the recipe (None: by reference) of ``name``, as they were saved."""
        tensors, recipe, _ = self._parts[name]
        return tensors, recipe

    def dense(self, name: str, dtype: torch.dtype, *, own: bool = False) -> Tensor:
        """The dense tensor in ``dtype``; ``own`` copies what is kept by reference, for work in place."""
        tensors, recipe, geometry = self._parts[name]
        if recipe is None:
            return tensors[0].to(dtype, copy=own)
        out = seen_as(recipe.rebuild(tensors, dtype), geometry)
        return out.clone() if own and isinstance(recipe, Dense) else out
