"""What all operations share: saving by name, refusing a second derivative in words, dropping what was used."""

from typing import Any

import torch
from torch import Tensor

from .errors import RazorError
from .store import Holder


class Function(torch.autograd.Function):
    """An operation whose backward pass works from what :func:`save` kept. Subclasses give ``forward`` and ``grad``."""

    @staticmethod
    def grad(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def _backward(cls, ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RazorError(
                "Back Razor has no second derivative: what it keeps of an activation suffices for one backward pass; "
                "leave create_graph=False, or do not open the Razor around this model"
            )
        return cls.grad(ctx, *grads)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.backward = staticmethod(lambda ctx, *grads: cls._backward(ctx, *grads))  # type: ignore[method-assign]


def save(ctx: Any, **named: Holder | Tensor | None) -> None:
    """Save stored tensors (a :class:`Holder`) and tensors by reference, each under a name; None saves nothing."""
    tensors: list[Tensor] = []
    ctx.plan, ctx.holders = [], []
    for name, value in named.items():
        if isinstance(value, Holder):
            parts = value.saved.tensors
            ctx.plan.append((name, len(parts), value.saved.recipe))
            ctx.holders.append(value)
            tensors += parts
        elif value is not None:
            ctx.plan.append((name, 1, None))
            tensors.append(value)
    ctx.save_for_backward(*tensors)


def saved_parts(ctx: Any) -> dict[str, tuple[tuple[Tensor, ...], Any]]:
    """What :func:`save` kept: from a name to its tensors and its recipe (None for a tensor by reference)."""
    tensors = ctx.saved_tensors
    ctx.holders = []
    parts, start = {}, 0
    for name, count, recipe in ctx.plan:
        parts[name] = (tuple(tensors[start : start + count]), recipe)
        start += count
    return parts


def rebuild(ctx: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Dense tensors, in ``dtype``, of everything that :func:`save` kept."""
    return {
        name: recipe.rebuild(tensors, dtype) if recipe is not None else tensors[0].to(dtype)
        for name, (tensors, recipe) in saved_parts(ctx).items()
    }
