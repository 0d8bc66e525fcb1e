"""The numbers that a program reads out of fake tensors, which have none; and the sentence where none can be made up."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import UserError

_aten = torch.ops.aten
REFUSED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


class NotPredictedError(UserError):
    """A step that needs numbers, which fake tensors do not have. It can be trained all the same."""


class Numbers:
    """What ``.item()`` answers: True, False of an ``any``, 1, what a ``linspace`` holds, and the product in a scalar
    that began as 1 (NAdam divides by 1 minus it)."""

    def __init__(self) -> None:
        self._any = WeakIdKeyDictionary()  # results of ``any``
        self._lines: dict[int, tuple[float, float, int]] = {}  # storages of ``linspace`` -> from, to, numbers
        self._products: dict[int, float] = {}  # storages of scalars

    def note(self, func: Any, args: Any, result: Any) -> None:
        """Look at an operation that ran."""
        if func.overloadpacket is _aten.any:
            self._any[result] = True
        if (self._lines or self._products) and func._schema.is_mutable and args:
            self._change(func, args)
        if func is _aten.linspace.default:
            self._lines[_key(result)] = args[:3]
        elif func is _aten.lift_fresh.default and _is_one(args[0]):  # torch.tensor(1.0)
            self._products[_key(result)] = 1.0

    def _change(self, func: Any, args: Any) -> None:
        """A number that was changed is known no longer, but for a product with another number."""
        changed = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        by = args[1] if len(args) > 1 and func.overloadpacket in (_aten.mul_, _aten._foreach_mul_) else None
        factors = by if isinstance(by, (list, tuple)) else [by] * len(changed)
        for tensor, factor in zip(changed, factors, strict=True):
            if isinstance(tensor, Tensor):
                key = _key(tensor)
                self._lines.pop(key, None)
                product = self._products.pop(key, None)
                if product is not None and isinstance(factor, (int, float)):
                    self._products[key] = product * factor

    def read(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return tensor not in self._any
        if tensor.dtype.is_floating_point:
            key = _key(tensor)
            if key in self._products:
                return self._products[key]
            line = self._lines.get(key)
            if line is not None:
                start, end, numbers = line
                return start + (end - start) * int(tensor.storage_offset()) / max(1, numbers - 1)
            return 1.0
        return 1

    def forget(self, key: int) -> None:
        """A storage that is gone; its key may come again."""
        self._lines.pop(key, None)
        self._products.pop(key, None)


def _is_one(tensor: Tensor) -> bool:
    if tensor.dim() or not tensor.dtype.is_floating_point or isinstance(tensor, FakeTensor):
        return False
    with _disable_current_modes():
        return bool(tensor == 1)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def refusal(error: Exception) -> NotPredictedError:
    """One sentence for what torch refuses on fake tensors."""
    name = str(getattr(error, "func", error)).removesuffix(".default")
    if isinstance(error, DynamicOutputShapeException):
        why = "gives a tensor whose size follows from numbers (as logits[mask] does; torch.where keeps the size)"
    elif isinstance(error, DataDependentOutputException):
        why = "looks at the numbers of a tensor"
    else:
        why = "is not known for tensors without numbers"
    return NotPredictedError(
        f"this step cannot be predicted: {name} {why}, and a prediction has no numbers; predict a model and loss "
        "without it, or measure a real step (measuring.memory)"
    )


def refuse_lazy(name: str = "") -> UserError:
    """Lazy modules take their sizes from the first batch."""
    where = f" ({name})" if name else ""
    return UserError(
        f"a lazy module{where} cannot be predicted before its first forward pass, since it has no sizes: name them, as "
        "nn.Linear(16, 8) for nn.LazyLinear(8), or call the real model once and let build return it"
    )


def warn_of_sparse(model: nn.Module) -> None:
    """How many rows a sparse gradient has is a number, too: torch's fake one has none."""
    named = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.layout != torch.strided]
    if named:
        warnings.warn(
            f"the sparse gradient of {named[0]} is predicted as 0 bytes, and takes as many rows as the batch has "
            "tokens: leave sparse=True out, or measure a real step",
            UserWarning,
            stacklevel=3,
        )
