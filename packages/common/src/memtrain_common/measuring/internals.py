"""What is used or changed of torch's and transformers' internals.

Tried with torch 2.11 to 2.15 and transformers 4.57 to 5.23. Everything else of the package stands on public interfaces.
"""

import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def innermost_hooks() -> Any:
    """The saved-tensor hooks (pack, unpack) that autograd would call now; None where there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def selective_checkpoints(note: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """Within, ``note`` is given what selective activation checkpointing caches: no saved-tensor hook sees that. Each
    cached value is wrapped, in all of these versions, in an object of a class of its own."""
    wrapper = torch.utils.checkpoint._VersionWrapper

    class Noted(wrapper):  # type: ignore[misc, valid-type]
        def __init__(self, val: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(val, *args, **kwargs)
            note(val)

    return mock.patch.object(torch.utils.checkpoint, "_VersionWrapper", Noted)


def as_if_real() -> AbstractContextManager[Any]:
    """transformers takes other ways for fake tensors (an attention mask is made where the kernel's own would do), since
    it takes them for a sign that a graph is traced; here they stand for real ones."""
    utilities = sys.modules.get("transformers.utils.import_utils")
    if utilities is None:
        return nullcontext()
    return mock.patch.object(utilities, "is_fake_tensor", return_value=False)


def one_fake_mode() -> AbstractContextManager[Any]:
    """Within, a deep copy of a fake tensor (PEFT copies task heads) keeps its mode.

    Copied too, the mode would bring weak references that are freed twice.
    """
    return mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True)


def swap_fakes() -> AbstractContextManager[Any]:
    """Within, ``module.to(...)`` may swap fake parameters with converted ones; see :func:`swap_of`."""
    return mock.patch.object(torch.utils, "swap_tensors", swap_of(torch.utils.swap_tensors))


def swap_of(original: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
    """``module.to(...)`` swaps fake parameters with converted ones, which weak references forbid. Where nothing would
    be converted (PEFT moves each adapter to the device where it is), nothing need be swapped; elsewhere those of the
    fake mode itself, which only remember what was made, are overlooked."""

    def swap(old: Tensor, new: Tensor) -> None:
        if (old.dtype, old.device, old.shape) != (new.dtype, new.device, new.shape):
            with mock.patch.object(weakref, "getweakrefs", return_value=[]):
                original(old, new)

    return swap
