"""What oneDNN keeps of an LSTM on the CPU for its backward pass, which torch's fake operation leaves out.

The rule is oneDNN's of 3.13 on processors with AVX-512, found by measuring. It is no promise of oneDNN's, so a small
real layer is asked, once a process, whether it holds here.
"""

import functools
import warnings
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

PAGE = 4096
SMALL = (3, 2, 17, 33)
"""Steps, samples, inputs and hidden numbers of the layer that is asked."""


def workspace_bytes(steps: int, samples: int, inputs: int, hidden: int) -> int:
    """Of one direction of one layer in float32: gates and gated states of each step, and of each state and its gradient
    what lies around the steps; each part fills pages."""
    around = 2 * (steps + 1) * samples
    wide = around * _leading(max(inputs, hidden))
    parts = (
        steps * samples * _leading(4 * hidden),
        steps * samples * _leading(hidden),
        *[wide] * 3,
        *[around * hidden] * 2,
    )
    return sum(-(-4 * part // PAGE) * PAGE for part in parts)


def _leading(numbers: int) -> int:
    """Whole cache lines, and one more where rows would fall onto the same ones."""
    whole = -(-numbers // 16) * 16
    return whole + 16 if whole % 256 == 0 else whole


def with_workspace(func: Any, args: Any, result: Any) -> Any:
    """The outputs of an operation on fake tensors, with the workspace that a real one would give."""
    if func is not torch.ops.aten.mkldnn_rnn_layer.default or not isinstance(args[0], FakeTensor):
        return result
    if not (args[-1] and torch.is_grad_enabled()):  # it keeps none without a backward pass
        return result
    x, hidden = args[0], args[10]
    if x.dtype != torch.float32 or not rule_holds():
        warnings.warn(
            f"the workspace that oneDNN keeps of an LSTM ({x.dtype}) is not known here: activations and peak are "
            "predicted without it, far too low; measure a real step",
            UserWarning,
            stacklevel=2,
        )
        return result
    steps, samples, inputs = x.shape
    n_bytes = workspace_bytes(steps, samples, inputs, hidden)
    return (*result[:3], torch.empty(n_bytes, dtype=torch.uint8, device=x.device))


@functools.cache
def rule_holds() -> bool:
    """Whether a small real layer keeps what the rule says."""
    steps, samples, inputs, hidden = SMALL
    with _disable_current_modes(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device="cpu")
        weights = [zeros(4 * hidden, n) for n in (inputs, hidden)]
        biases = [zeros(4 * hidden) for _ in range(2)]
        states = [zeros(samples, hidden) for _ in range(2)]
        found = torch.ops.aten.mkldnn_rnn_layer(
            zeros(steps, samples, inputs), *weights, *biases, *states, False, [], 2, hidden, 1, True, False,
            False, True,
        )  # fmt: skip
    return bool(found[3].nbytes == workspace_bytes(*SMALL))
