"""Tensors that are not stored, since they are made from ones that are: an activation's output, attention's P and O."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .saved import Affine, Dense, Geometry, Recipe, Saved
from .store import Held, Rebuilt, seen_as


def made(
    recipe: Recipe, rebuilt: Rebuilt | None, tensors: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """A recipe's tensor, and whether the caller alone has it. Others that need it too find it in ``rebuilt``, and what
    makes a derived tensor may need it again."""
    if isinstance(recipe, Affine):
        x, alone = made(recipe.base, rebuilt, tensors[: recipe.base_tensors], dtype)
        return recipe.apply(x, tensors, alone), alone or recipe.has_weight or recipe.has_bias
    if isinstance(recipe, Dense):
        return recipe.rebuild(tensors, dtype), tensors[0].dtype != dtype
    x, alone = rebuilt.get(recipe, tensors, dtype) if rebuilt is not None else (recipe.rebuild(tensors, dtype), True)
    return x, alone and not isinstance(recipe, Derived)


@dataclass(frozen=True)
class Part:
    """A stored tensor that another one is made from: its recipe, how many tensors that takes, and its shape there."""

    recipe: Recipe
    tensors: int
    geometry: Geometry | None
    rebuilt: Rebuilt = field(compare=False)


@dataclass(frozen=True)
class Derived(Recipe):
    """What ``make`` makes of the dense parts, and of tensors that are kept by reference."""

    geometry: Geometry
    parts: tuple[Part, ...]
    make: Callable[..., Tensor]
    """From the parts and the referenced tensors, all in one type, which it must not change."""
    least: torch.dtype | None = None
    """The type is promoted with this one: of attention's scores that were made in float32 by a model in float16."""

    def rebuild(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        given: list[Tensor] = []
        start, type_ = 0, dtype if self.least is None else torch.promote_types(dtype, self.least)
        for part in self.parts:
            own = tensors[start : start + part.tensors]
            given.append(seen_as(made(part.recipe, part.rebuilt, own, type_)[0], part.geometry))
            start += part.tensors
        references = (t.to(type_) if t.is_floating_point() else t for t in tensors[start:])
        return self.geometry.impose(self.make(*given, *references).to(dtype))


def derive(
    y: Tensor,
    make: Callable[..., Tensor],
    parts: tuple[Held, ...],
    references: tuple[Tensor, ...] = (),
    least: torch.dtype | None = None,
) -> Saved:
    """How to make ``y`` again: ``make`` of what is kept of its ``parts``, and of ``references``."""
    tensors = [t for held in parts for t in held.saved.tensors]
    recipes = tuple(
        Part(held.saved.recipe, len(held.saved.tensors), held.geometry, held.holder.rebuilt) for held in parts
    )
    references = tuple(t.detach() for t in references)
    return Saved((*tensors, *references), Derived(Geometry.of(y), recipes, make, least))
