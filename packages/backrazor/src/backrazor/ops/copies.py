"""Copies of a stored tensor in another layout, shape or type: made from what is stored of the original."""

from typing import Any

from torch import Tensor

from ..keeper import Keeper


def copy(call: Any) -> Any:
    """The rule of a call that copies a tensor, or gives a view of it."""

    def rule(razor: Keeper, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = razor.find(input) if razor.mode == "low-bit" and input.requires_grad else None
        y = call(input, *args, **kwargs)
        if before is None or not isinstance(y, Tensor) or not y.requires_grad or y.device != input.device:
            return y
        if y.untyped_storage()._cdata != input.untyped_storage()._cdata:
            shape = y.shape
            razor.derive(y, lambda x: x.reshape(shape), (before,))
        return y

    return rule
