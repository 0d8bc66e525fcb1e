"""Which tensors are weights: leaves, their views, transposes, casts and slices, and what is computed of weights alone.

A weight is there in any case, so a product keeps it by reference and the gradient of the other factor is exact. It is
found through the graph, so that it does not matter where ``W.t()`` or ``E[0]`` was written.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

PARAMETER, LEAF, ACTIVATION = 2, 1, 0
"""Of a Parameter; of another leaf that needs a gradient; neither."""

VIEWS = frozenset(
    f"{name}Backward{i}"
    for name in (
        "Alias", "AsStrided", "Clone", "Diagonal", "Flip", "Permute", "ReshapeAlias", "Select", "Slice", "Split",
        "SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze",
        "View",
    )
    for i in range(3)
)  # fmt: skip
EXPANDED = VIEWS | {"ExpandBackward0"}
_MARK = "backrazor: computed of weights"


def rank(x: Tensor, *, names: frozenset[str] = EXPANDED) -> int:
    """How much of a weight ``x`` is: of two factors, the higher one is the weight.

    Args:
        names: of the graph's nodes that a weight stays a weight through.
    """
    node: Any = x.grad_fn
    if node is None:
        if isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter):
            return PARAMETER
        return LEAF if x.requires_grad else ACTIVATION
    while node.name() in names and len(node.next_functions) == 1:
        if _MARK in node.metadata:
            return PARAMETER
        node = node.next_functions[0][0]
        if node is None:
            return ACTIVATION
    if hasattr(node, "variable"):
        return PARAMETER if isinstance(node.variable, nn.Parameter) else LEAF
    return PARAMETER if _MARK in node.metadata else ACTIVATION


def of_weights_alone(values: Iterable[Any]) -> bool:
    """Whether all tensors among ``values`` (lists are looked into) are weights, or one number each without gradient.

    A weight that is expanded is not: what is made of a table, once a sample, is an activation.
    """
    found = False
    for value in values:
        if isinstance(value, Tensor):
            if value.numel() == 1 and not value.requires_grad:
                continue
            if rank(value, names=VIEWS) != PARAMETER:
                return False
            found = found or value.requires_grad
        elif isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
            if not of_weights_alone(value):
                return False
            found = True
    return found


def mark(result: Any) -> Any:
    """Remember that ``result`` was computed of weights alone."""
    if isinstance(result, Tensor) and result.grad_fn is not None and result.grad_fn.name() not in EXPANDED:
        node: Any = result.grad_fn
        node.metadata[_MARK] = True
    return result
