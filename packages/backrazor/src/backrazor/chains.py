"""Chains of pointwise operations written in Python, each link of which would save a tensor.

While a chain is computed, each link's result is labelled with the expression that it is, over the tensor x it began
with. When the last link, a product, completes a known expression, one operation on x (:mod:`.ops.chains`) takes its
place: the forward value is the one that the chain computed, and the nodes of the links are let go. Known:

    x · rsqrt(mean(x²) + ε)                                        RMSNorm as Llama writes it
    0.5 x · (1 + tanh(√(2/π) (x + 0.044715 x³)))                   transformers' gelu_new
    x · sigmoid(1.702 x)                                           quick_gelu
    f(gate) · up, f any activation of the table                    gated MLPs
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .store import Held

Expression = tuple[Any, ...]
"""("x",) or (operation, expression, …, numbers)."""

X: Expression = ("x",)
CUBE = ("pow", X, 3.0)
CUBE_TERM = ("mul", CUBE, 0.044715)
SUM = ("add", X, CUBE_TERM)
INNER = ("mul", SUM, math.sqrt(2 / math.pi))
ONE_PLUS_TANH = ("add", ("tanh", INNER), 1.0)
HALF_X = ("mul", X, 0.5)
MEAN_SQUARE = ("mean", ("pow", X, 2.0))
QUICK = ("sigmoid", ("mul", X, 1.702))
LINKS = (
    CUBE,
    CUBE_TERM,
    SUM,
    INNER,
    ONE_PLUS_TANH[1],
    ONE_PLUS_TANH,
    HALF_X,
    MEAN_SQUARE[1],
    MEAN_SQUARE,
    QUICK[1],
    QUICK,
)


class Chains:
    """Labels of the tensors that are links of a chain; a label lives as long as its tensor."""

    def __init__(self) -> None:
        self._labels: Any = WeakIdKeyDictionary()

    def clear(self) -> None:
        self._labels.clear()

    def forget(self, tensor: Tensor) -> None:
        """Drop a label, and with it the tensor that the chain began with."""
        self._labels.pop(tensor, None)

    def label(self, result: Tensor, x: Tensor, expression: Expression) -> Tensor:
        self._labels[result] = (x, x._version, result._version, expression)
        return result

    def of(self, tensor: Any) -> tuple[Tensor, Expression] | None:
        """The tensor that a chain began with and the expression; None for one changed since."""
        found = self._labels.get(tensor) if isinstance(tensor, Tensor) else None
        if found is None:
            return None
        x, x_version, version, expression = found
        return (x, expression) if x._version == x_version and tensor._version == version else None

    def follow(self, name: str, first: Any, second: Any = None) -> Any:
        """Label the result of a link with one tensor, or two of the same chain; NotImplemented where it is none."""
        if isinstance(second, Tensor) and not isinstance(first, Tensor) and name in ("add", "mul"):
            first, second = second, first
        if not isinstance(first, Tensor) or not first.is_floating_point() or not first.requires_grad:
            return NotImplemented
        known = self.of(first)
        x, left = known if known is not None else (first, X)
        expression: Expression
        if isinstance(second, Tensor):
            other = self.of(second)
            if other is None or other[0] is not x or known is not None:
                return NotImplemented
            expression = (name, X, other[1])
        elif second is None:
            expression = (name, left)
        elif not isinstance(second, int | float):
            return NotImplemented
        else:
            expression = (name, left, float(second))
        return (x, expression) if _begins_known(expression) else NotImplemented


@dataclass(frozen=True)
class Scores:
    """Attention's scores as written out: Q Kᵀ, then products with numbers, sums with masks, and entries that masks
    replace, in their order."""

    q: Held
    k: Held
    """As the second factor of the product."""
    steps: tuple[tuple[str, float], ...]
    """("mul", c), ("div", c), ("add", 0) for the next of the masks, ("fill", c) where the next one is true, ("keep", c)
    where it is not, ("drop", 0) for the one after the next one where that is true, ("pick", 0) where it is not."""
    masks: tuple[Tensor, ...]
    versions: tuple[int, ...]
    """Of the masks, when they were met: one that was changed since is another mask."""
    dtype: torch.dtype
    """Of the scores: a model may make them, and P, in float32 and the rest in half precision."""

    def unchanged(self) -> bool:
        """Whether the masks are what they were."""
        return all(m._version == v for m, v in zip(self.masks, self.versions, strict=True))

    def then(self, step: str, number: float, *masks: Tensor) -> "Scores":
        """After one more step."""
        return replace(
            self,
            steps=(*self.steps, (step, number)),
            masks=(*self.masks, *masks),
            versions=(*self.versions, *(m._version for m in masks)),
        )

    def make(self, q: Tensor, k: Tensor, *masks: Tensor) -> Tensor:
        """The scores, from Q and K again."""
        s, left = torch.matmul(q, k), list(masks)
        for step, number in self.steps:
            if step in ("mul", "div"):
                s = s.mul_(number) if step == "mul" else s.div_(number)
            elif step == "add":
                s = s + left.pop(0)
            elif step in ("fill", "keep"):
                mask = left.pop(0)
                s = s.masked_fill_(mask, number) if step == "fill" else torch.where(mask, s, number)
            else:
                mask, other = left.pop(0), left.pop(0)
                s = torch.where(mask, other, s) if step == "drop" else torch.where(mask, s, other)
        return s


COPIED = 100
"""A tensor of so many times fewer elements than the scores is kept as a copy of its own."""


class ScoresInSight:
    """Which tensors are attention's scores; forgotten with the tensor, or when it is changed in place."""

    def __init__(self) -> None:
        self._of: Any = WeakIdKeyDictionary()
        self._met: Any = WeakIdKeyDictionary()

    def clear(self) -> None:
        self._of.clear()
        self._met.clear()

    def put(self, s: Tensor, scores: Scores) -> Tensor:
        self._of[s] = (s._version, scores)
        return s

    def get(self, s: Any) -> Scores | None:
        found = self._of.get(s) if isinstance(s, Tensor) else None
        return found[1] if found is not None and found[0] == s._version else None

    def step(self, name: str, s: Any, other: Any, *, in_place: bool = False) -> Scores | None:
        """The scores after one more step, if ``s`` are scores and the step is one of theirs."""
        before = self.get(s)
        if before is None and name in ("add", "mul") and not in_place:
            s, other = other, s
            before = self.get(s)
        if before is None:
            return None
        if name == "add" and isinstance(other, Tensor):
            if not other.is_floating_point() or torch.broadcast_shapes(s.shape, other.shape) != s.shape:
                return None
            kept = self._lasting(other, s) if in_place else other
            return before.then("add", 0.0, kept) if kept is not None else None
        if name in ("mul", "div") and isinstance(other, int | float):
            return before.then(name, float(other))
        return None

    def masked(self, s: Any, mask: Any, other: Any, true: bool) -> Scores | None:
        """The scores after ``other`` replaces them where the mask is ``true``, if ``s`` are scores."""
        before = self.get(s)
        if before is None or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            return None
        if isinstance(other, Tensor) and (other.requires_grad or other.dtype != s.dtype):
            return None
        shapes = (mask.shape, other.shape) if isinstance(other, Tensor) else (mask.shape,)
        if torch.broadcast_shapes(s.shape, *shapes) != s.shape:
            return None
        if not isinstance(other, Tensor):  # the mask is one that PyTorch keeps too
            return before.then("fill" if true else "keep", float(other), mask)
        kept = self._lasting(other, s)
        return before.then("drop" if true else "pick", 0.0, mask, kept) if kept is not None else None

    def _lasting(self, other: Tensor, s: Tensor) -> Tensor | None:
        """What to keep of an operand that PyTorch does not keep: a copy of a small one, and a large one itself where it
        is met again unchanged, as a bias that all layers share is; one for this layer alone would outweigh P."""
        if other.numel() * COPIED <= s.numel():
            return other.detach().clone()
        before = self._met.get(other)
        self._met[other] = other._version
        return other if before == other._version else None


def _begins_known(expression: Expression) -> bool:
    """Whether a known chain has this link; nothing else is labelled."""
    if expression[0] == "rsqrt":
        return _begins_known(expression[1]) and expression[1][0] == "add"
    if expression[0] == "add" and expression[1] == MEAN_SQUARE:
        return len(expression) == 3
    return any(alike(expression, link) for link in LINKS)


def alike(a: Any, b: Any) -> bool:
    """Equal expressions, numbers to one part in a million."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)
