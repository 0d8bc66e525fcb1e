"""What is asked of torch beyond its public interface, in one place. Tried on torch 2.15.0."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def backward_pass() -> int:
    """A number of the backward pass that runs now, another for each."""
    return torch._C._current_graph_task_id()


def gradient_is_asked_for(p: Tensor) -> bool | None:
    """Whether the backward pass that runs now adds to p's `.grad`; None where `torch.autograd.grad` is to return it."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(p).node)
    except RuntimeError:  # torch does not say of what it captures, and nothing else raises here
        return None


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def without_autocast(p: Tensor) -> AbstractContextManager[Any]:
    """Projections have the weights' precision, also where the backward pass runs inside of autocast."""
    kind = p.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
