"""What is used of PyTorch beyond its documented interface, all of it here. Tried on torch 2.15.

Most of it asks a question that PyTorch has no public answer to: which saved-tensor hook is on, whether a compiled
function or a ``torch.func`` transform is running. One thing is changed: functions of ``torch.nn.functional`` that are
compositions first ask whether a mode is on, and if so hand themselves over to it whole. A copy of
``multi_head_attention_forward`` that does not ask runs with the mode on, so that the calls within it are met. Other
compositions (``local_response_norm``, ``lp_pool2d``, losses) are left whole to PyTorch, and so are exact.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
    is_traceable_wrapper_subclass,
)

_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


ENTERED = frozenset({F.multi_head_attention_forward})


@functools.cache
def unasking(func: Any) -> Callable[..., Any] | None:
    """A copy of a composition that does not hand itself over; None for what is not entered."""
    if func not in ENTERED:
        return None
    names = {**func.__globals__, **dict.fromkeys(_QUESTIONS, lambda *_: False)}
    copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def open_modes() -> list[Any]:
    """The function modes that are on, outermost first."""
    return list(_get_current_function_mode_stack())


def is_fake(x: Tensor) -> bool:
    """Whether ``x`` has no elements to look at (``FakeTensorMode``, which plans without allocating)."""
    return x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor)


def is_wrapper(x: Any) -> bool:
    """Whether ``x`` is a tensor made of other tensors (quantised weights, DTensor): more than its elements."""
    return type(x) not in PLAIN and isinstance(x, Tensor) and is_traceable_wrapper_subclass(x)


UNCOUNTED = frozenset({Tensor.data.__get__, Tensor.data.__set__})  # type: ignore[attr-defined]
"""What gives a tensor, or takes one, whose changes in place the version does not count."""
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def on_real_tensors() -> AbstractContextManager[Any]:
    """Within a prediction on fake tensors, compute with numbers."""
    made: AbstractContextManager[Any] = _disable_current_modes()
    return made


def saved_tensor_hook() -> Any:
    """The innermost hook on what autograd saves, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None else None


def is_of_checkpoint(hook: Any) -> bool:
    """Whether a hook on what autograd saves is that of ``torch.utils.checkpoint``, in its first run or a later one."""
    return "checkpoint" in getattr(hook, "__module__", "")


@contextmanager
def before_checkpoints(since: Any) -> Iterator[None]:
    """Within it we compute as if before the checkpoints that were begun after ``since`` was the hook: they do not count
    what is saved, and do not remember results (selective checkpointing), so that later runs need not do so again."""
    taken: list[tuple[Any, Any]] = []
    while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None and hooks[0] is not since:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        taken.insert(0, hooks)
    begun = [i for i, (pack, _) in enumerate(taken) if is_of_checkpoint(pack)]
    outer, inner = (taken[: begun[0]], taken[begun[0] :]) if begun else (taken, [])
    for hooks in outer:
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    modes = list(_get_current_dispatch_mode_stack()) if begun else []
    others = [mode for mode in modes if not isinstance(mode, _REMEMBER)]
    if others != modes:
        _exchange(modes, others)
    try:
        yield
    finally:
        if others != modes:
            _exchange(others, modes)
        for hooks in inner:
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


_REMEMBER = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)


def _exchange(on: list[Any], then: list[Any]) -> None:
    """Dispatch modes that are on give place to others, both outermost first."""
    for _ in on:
        _pop_mode()
    for mode in then:
        _push_mode(mode)


def within_transform() -> bool:
    """Whether a transform of ``torch.func`` (vmap, grad, jvp) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def within_trace() -> bool:
    """Whether ``torch.jit.trace`` is recording."""
    return torch._C._get_tracing_state() is not None


def within_compiled_call() -> bool:
    """Whether a function made by ``torch.compile`` is running, compiled or fallen back to Python."""
    return callable(eval_frame.get_eval_frame_callback())


def own_saving() -> AbstractContextManager[Any]:
    """Within it hooks on saved tensors, of a ledger say, do not see what is saved: it is gone at once.

    ``detach``, since a saved output that is kept as it is holds the graph that holds it.
    """
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t)


def random_state(x: Tensor) -> Tensor:
    """The state of the random numbers of the device of ``x``."""
    if is_fake(x):
        return x.new_empty(len(torch.get_rng_state()) if x.device.type == "cpu" else 16, dtype=torch.uint8)
    return torch.get_rng_state() if x.device.type == "cpu" else torch.cuda.get_rng_state(x.device)


@contextmanager
def random_numbers(device: torch.device, state: Tensor) -> Iterator[None]:
    """Within it random numbers begin at ``state``; after it they go on as if nothing had been drawn."""
    if is_fake(state):
        yield
        return
    get, put = (torch.get_rng_state, torch.set_rng_state) if device.type == "cpu" else _cuda_state(device)
    before = get()
    put(state)
    try:
        yield
    finally:
        put(before)


def _cuda_state(device: torch.device) -> tuple[Any, Any]:
    return lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device)
