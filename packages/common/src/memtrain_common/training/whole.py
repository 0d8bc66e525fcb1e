"""The whole model out of one that FSDP2 shares out: gathered tensor by tensor onto the process that writes.

plain = skeleton(model)         # before the model is wrapped: its modules without its numbers
…                               # wrap, train
gather_whole(model, plain)      # collective; on the process that passes a skeleton it is the whole model then
"""

import copy

import torch
from torch import Tensor, nn


def skeleton(model: nn.Module) -> nn.Module:
    """A copy whose parameters have no values and take no memory; tied ones are tied in it too. Buffers are copied."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def gather_whole(model: nn.Module, into: nn.Module | None) -> None:
    """Fill a skeleton with the values of ``model``, on the CPU. A collective call: one tensor at a time is whole, and
    only where it is kept.

    Args:
        model: whose parameters are DTensors, or plain tensors.
        into: made by :func:`skeleton`; None on the processes that only take part.
    """
    values: dict[str, Tensor] = {}
    for name, shared in model.state_dict().items():
        if not isinstance(shared, Tensor):
            continue
        full = shared.full_tensor() if hasattr(shared, "full_tensor") else shared
        if into is not None:
            values[name] = full.detach().to("cpu", copy=True)
    if into is None:
        return
    for name, buffer in into.named_buffers():
        if name in values:
            buffer.data = values[name]
    whole = {id(p): nn.Parameter(values[n], p.requires_grad) for n, p in into.named_parameters()}
    for module in into.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = whole[id(parameter)]
