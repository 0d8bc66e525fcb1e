"""What lives during a step on fake tensors, and what leaves for host memory."""

from typing import Any

import torch
from memtrain_common.measuring.flops import flops_of
from memtrain_common.measuring.prediction import LiveBytes
from torch import Tensor, nn


class StepBytes(LiveBytes):
    """Live bytes, also beside accumulated gradients, and the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.accumulated = 0
        self.flops = 0
        self.rises: list[int] = []
        """Live bytes after each new storage since the last restart; the largest is the peak."""
        self.besides: list[int] = []
        """Live bytes beside accumulated gradients, after each operation that made a storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls: no bytes, no FLOPs
            return super().__torch_dispatch__(func, types, args, kwargs)
        risen = len(self.rises)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.flops += flops_of(func, args, kwargs, result)
        if len(self.rises) > risen:
            self.besides.append(self.bytes - self.accumulated)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        before = self.bytes
        super()._note(storage)
        if self.bytes > before:
            self.rises.append(self.bytes)

    def count_gradients(self, model: nn.Module) -> None:
        """Know a gradient as accumulated from the moment when it lies in ``.grad``."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulate)

    def _accumulate(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.accumulated += parameter.grad.nbytes

    def restart(self) -> None:
        super().restart()
        self.rises = [self.bytes]
        self.besides = [self.bytes - self.accumulated]


class HostMemory(torch.autograd.graph.saved_tensors_hooks):
    """What ``torch.autograd.graph.save_on_cpu`` does to a GPU: what is saved leaves it, and comes back when needed."""

    def __init__(self) -> None:
        self.bytes = 0
        super().__init__(self._leave, lambda packed: torch.empty(packed[0], dtype=packed[1]))

    def _leave(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.bytes += tensor.nbytes
        return tensor.shape, tensor.dtype
