"""Functions of ``torch.nn.functional`` that are compositions, such as ``multi_head_attention_forward``.

Such a function first asks whether a mode is on, and if so hands itself over to it whole. A copy of it that does not
ask runs with the mode on, so that the calls within it are met.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@functools.cache
def unasking(func: Any) -> Callable[..., Any] | None:
    """A copy of a Python function of ``torch.nn.functional`` that does not hand itself over; None for anything else."""
    if not isinstance(func, types.FunctionType) or func.__globals__ is not vars(F):
        return None
    if not set(func.__code__.co_names) & set(_QUESTIONS):
        return None
    names = {**func.__globals__, **dict.fromkeys(_QUESTIONS, lambda *_: False)}
    copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
