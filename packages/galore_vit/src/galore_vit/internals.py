"""What is asked of torch beyond its public interface, in one place. Tried on torch 2.15.0."""

from __future__ import annotations

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
