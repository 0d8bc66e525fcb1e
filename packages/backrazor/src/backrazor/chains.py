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
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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
