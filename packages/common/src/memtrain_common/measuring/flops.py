"""Floating-point operations of matrix products, as torch counts them."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Of one operation of ATen; 0 of what is no matrix product."""
    count = flop_registry.get(func._overloadpacket)
    return count(*args, **(kwargs or {}), out_val=result) if count is not None else 0


class Flops(TorchDispatchMode):
    """Within, adds them up in ``total``; entered again, it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs, result)
        return result
