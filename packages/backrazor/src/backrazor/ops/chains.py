"""Products, links of chains, and the operation that takes the place of a chain when a product completes it.

A chain is recognised by what was computed (:class:`..chains.Chains`), not by the name of the module that computed it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chains import HALF_X, MEAN_SQUARE, ONE_PLUS_TANH, QUICK, alike
from ..keeper import Keeper
from ..weights import rank
from .pointwise import ACTIVATIONS, activate
from .products import SMALL, Gated, Normalised, Product, Scaled


def mul(razor: Keeper, input: Any, other: Any) -> Any:
    """``*`` and ``torch.mul``."""
    scores = razor.scores.step("mul", input, other)
    if scores is not None:
        return razor.scores.put(torch.mul(input, other), scores)
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        found = razor.chains.follow("mul", input, other)
        return NotImplemented if found is NotImplemented else razor.chains.label(torch.mul(input, other), *found)
    whole = finish(razor, input, other)
    if whole is not None:
        return whole
    if not (input.is_floating_point() and other.is_floating_point()) or not input.numel() or not other.numel():
        return NotImplemented
    left, right = rank(input), rank(other)
    if left != right:
        x, weight = (input, other) if right > left else (other, input)
        is_small = weight.numel() * SMALL <= x.numel()
        # A frozen weight, or a constant beside a trained one, is kept by reference by PyTorch.
        return (
            Scaled.apply(x, weight, razor) if weight.requires_grad and (x.requires_grad or is_small) else NotImplemented
        )
    if left:
        return NotImplemented  # two weights: PyTorch keeps both by reference
    if not (input.requires_grad and other.requires_grad):
        big, small = (input, other) if input.numel() >= other.numel() else (other, input)
        if small.requires_grad and small.numel() * SMALL <= big.numel():
            return Scaled.apply(big, small, razor)
        return NotImplemented  # PyTorch keeps the factor without gradient, by reference
    for big, small in ((input, other), (other, input)):
        fits = big.shape == torch.broadcast_shapes(big.shape, small.shape)
        if fits and small.numel() * SMALL <= big.numel():
            return Scaled.apply(big, small, razor)
    return Product.apply(input, other, razor)


def finish(razor: Keeper, a: Tensor, b: Tensor) -> Any:
    """The product a · b as one operation, if it completes a known chain; otherwise None."""
    for left, right in ((a, b), (b, a)):
        known = razor.chains.of(right)
        if known is None or _observed(left) or _observed(right):
            continue
        x, expression = known
        if expression[0] == "rsqrt" and left is x and expression[1][0] == "add" and expression[1][1] == MEAN_SQUARE:
            return Normalised.apply(x, right.detach(), expression[1][2], razor)
        own = razor.chains.of(left)
        if alike(expression, ONE_PLUS_TANH) and own is not None and own[0] is x and alike(own[1], HALF_X):
            y = a.detach() * b.detach()
            settings = {"approximate": "tanh"}
            return activate(razor, x, lambda _, y=y, **__: y, settings, ACTIVATIONS[F.gelu], F.gelu)
        if alike(expression, QUICK) and left is x:
            y = a.detach() * b.detach()
            return activate(
                razor, x, lambda _, y=y, **__: y, {}, ACTIVATIONS["quick_gelu"], lambda x: x * torch.sigmoid(1.702 * x)
            )
        if expression[0] == "activation" and left is not x and left.requires_grad and left.shape == x.shape:
            call, settings = expression[1:]
            return Gated.apply(x, left, a.detach() * b.detach(), call, dict(settings), razor)
    return None


def _observed(x: Tensor) -> bool:
    """Whether somebody wants the gradient of a link, which the whole operation would not make."""
    return bool(x._backward_hooks) or x.retains_grad


def link(name: str, call: Any) -> Any:
    """The rule of a link: compute it as it is, and label the result."""

    def rule(razor: Keeper, *args: Any, **kwargs: Any) -> Any:
        if name == "mean":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
            if dim not in (-1, (-1,), [-1]) or not keepdim or set(kwargs) - {"dim", "keepdim"}:
                return NotImplemented
            found = razor.chains.follow(name, args[0])
        elif kwargs or not 1 <= len(args) <= 2:
            return NotImplemented
        elif name in ("add", "div") and (scores := razor.scores.step(name, *args)) is not None:
            return razor.scores.put(call(*args), scores)
        else:
            found = razor.chains.follow(name, *args)
        if found is NotImplemented:
            return NotImplemented
        return razor.chains.label(call(*args, **kwargs), *found)

    return rule


def scores_step(name: str, call: Any) -> Any:
    """The rule of what attention's scores may go through besides: an operation in place, or a mask that replaces
    entries. Scores stay scores; everything else is left to PyTorch."""

    def rule(razor: Keeper, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != (2 if name in ("add", "mul", "div") else 3):
            return NotImplemented
        if name == "where":
            if isinstance(args[1], Tensor) and args[1].dtype == torch.bool:  # a.where(mask, b)
                args = (args[1], args[0], args[2])
            mask, a, b = args
            scores = razor.scores.masked(a, mask, b, False) or razor.scores.masked(b, mask, a, True)
        elif name == "fill":
            s, mask, value = args
            scores = razor.scores.masked(s, mask, value, True)
        else:
            scores = razor.scores.step(name, *args, in_place=True)
        return NotImplemented if scores is None else razor.scores.put(call(*args), scores)

    return rule
