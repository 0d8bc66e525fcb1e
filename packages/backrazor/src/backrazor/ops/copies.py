"""Copies of a stored tensor in another layout, shape, type or frame: made from what is stored of the original."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
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


def pad(razor: Keeper, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """``F.pad`` by a constant, as convolutions of TensorFlow's models want it: x̂ in the same frame."""
    if mode != "constant" or razor.mode != "low-bit" or not input.requires_grad:
        return NotImplemented
    before, frame = razor.find(input), tuple(pad)
    y = F.pad(input, frame, value=value)
    if before is not None and y.untyped_storage()._cdata != input.untyped_storage()._cdata:
        razor.derive(y, lambda x: F.pad(x, frame, value=value), (before,))
    return y
