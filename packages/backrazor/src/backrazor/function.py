"""What all operations share: saving by name, refusing a second derivative in words, dropping what was used."""

from typing import Any

import torch
from torch import Tensor

from .derived import made
from .errors import RazorError
from .saved import Affine, Recipe
from .store import Held, Rebuilt, seen_as


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
            ctx.holders.append((name, value.holder))
            value.holder.rebuilt.users += 1
            tensors += parts
        elif value is not None:
            ctx.plan.append((name, 1, None, None))
            tensors.append(value)
    ctx.save_for_backward(*tensors)


class Kept:
    """What :func:`save` kept, made dense one by one, so that an operation decides what is there at the same time."""

    def __init__(self, ctx: Any) -> None:
        tensors = ctx.saved_tensors
        self._rebuilt: dict[str, Rebuilt] = {}
        for name, holder in ctx.holders:
            self._rebuilt[name] = holder.rebuilt
            holder.rebuilt.users -= 1
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

    def times(self, name: str, g: Tensor) -> Tensor:
        """The levels that are kept as ``name`` (:class:`.coded.Coded`), times g."""
        tensors, recipe, _ = self._parts[name]
        return recipe.times(tensors, g)

    def dense(self, name: str, dtype: torch.dtype, *, own: bool = False) -> Tensor:
        """The dense tensor in ``dtype``; ``own`` copies what others use too, for work in place."""
        x, alone = self.dense_and_alone(name, dtype)
        return x.clone() if own and not alone else x

    def dense_and_alone(self, name: str, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """The dense tensor, and whether nobody else has it, so that it may be written over."""
        tensors, recipe, geometry = self._parts[name]
        if recipe is None:
            return tensors[0].to(dtype), tensors[0].dtype != dtype
        x, alone = self._made(name, recipe, tensors, dtype)
        return seen_as(x, geometry), alone

    def as_given(self, name: str, dtype: torch.dtype) -> Tensor:
        """As :meth:`dense`, but what was saved by reference and is no number keeps its type."""
        tensors, recipe, _ = self._parts[name]
        return self.dense(name, dtype) if recipe is not None or tensors[0].is_floating_point() else tensors[0]

    def affine(self, name: str, dtype: torch.dtype, features: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x̂, γ, β) where x̂ γ + β, with weights over the last ``features``, is what is kept; otherwise x and None."""
        tensors, recipe, geometry = self._parts[name]
        if not isinstance(recipe, Affine) or not all(t.shape == (features,) for t in tensors[recipe.base_tensors :]):
            return self.dense(name, dtype), None, None
        same = geometry is None or geometry.shape == recipe.geometry.shape
        if not same or recipe.geometry.shape[-1] != features:
            return self.dense(name, dtype), None, None
        x, _ = self._made(name, recipe.base, tensors[: recipe.base_tensors], dtype)
        return seen_as(x, geometry), *recipe.weights(tensors, dtype)

    def _made(self, name: str, recipe: Recipe, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """A recipe's tensor, and whether the caller alone has it."""
        return made(recipe, self._rebuilt.get(name), tensors, dtype)
