"""What CUDA saves and the CPU does not, on fake tensors of the CPU.

Autograd on fake CUDA tensors needs a CUDA driver, so a step is predicted on fake CPU tensors. Where PyTorch takes
another way on CUDA, and the other way saves other bytes, that way is taken here:

- dropout keeps a mask of one byte an element (``native_dropout``); on the CPU a scaled mask of the input's dtype;
- attention runs in a fused kernel that saves q, k, v, its output and one float32 a row, with dropout too; on the CPU
  dropout makes it save its probabilities;
- autocast computes layer norms, softmax, powers and losses in float32; on the CPU it leaves them in the lower
  precision.

Not covered: grouped keys and values in float32 without a padding mask (CUDA has no fused kernel for them and saves
probabilities); workspace inside kernels; the allocator's rounding and fragmentation; the CUDA context.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else F.dropout(x, p, training, inplace)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    words = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(words, args, strict=False)), **kwargs, "dropout_p": 0.0}
    return F.scaled_dot_product_attention(**given)


_IN_FLOAT32 = {
    F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss,
    F.binary_cross_entropy_with_logits, torch.softmax, torch.log_softmax, torch.pow, torch.rsqrt, torch.exp, torch.log,
    torch.cumsum, Tensor.softmax, Tensor.log_softmax, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.exp, Tensor.log,
    Tensor.cumsum,
}  # fmt: skip
_RULES: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _dropout,
    torch.dropout: lambda x, p, train: _dropout(x, p, train),
    F.scaled_dot_product_attention: _attention,
}


class CudaChoices(TorchFunctionMode):
    """While open, calls on CPU tensors save what they would save on CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_wide(a) for a in args)
            kwargs = {k: _wide(v) for k, v in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return _RULES.get(func, func)(*args, **kwargs)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value
