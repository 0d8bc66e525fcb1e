"""The kinds of module that can be adapted, and each one's weight seen as a matrix W (out×in)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import LoRAXSError


@dataclass(frozen=True)
class Kind:
    """How one kind of module stores W (out×in)."""

    name: str
    to_matrix: Callable[[Tensor], Tensor]
    """weight → W (out×in)"""
    from_matrix: Callable[[Tensor, torch.Size], Tensor]
    """W (out×in), shape of the weight → weight"""


LINEAR = Kind("Linear", lambda w: w, lambda m, shape: m)
CONV1D = Kind("Conv1D", lambda w: w.t(), lambda m, shape: m.t())  # transformers: weight is in×out
EMBEDDING = Kind("Embedding", lambda w: w.t(), lambda m, shape: m.t())  # weight is vocabulary×width: in×out
CONV2D = Kind("Conv2d", lambda w: w.flatten(1), lambda m, shape: m.reshape(shape))  # out×(in·kh·kw)

SUPPORTED = "Linear, Conv1D (transformers), Embedding and Conv2d"


def kind_of(module: nn.Module) -> Kind | None:
    """The module's kind, or None where it is none that LoRA-XS knows."""
    if isinstance(module, nn.Linear):
        return LINEAR
    # Known by its name, so that transformers need not be installed.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, nn.Conv2d):
        return CONV2D
    return None


_PLAIN_FORWARDS = {"Linear": nn.Linear, "Embedding": nn.Embedding, "Conv2d": nn.Conv2d}


def refusal(module: nn.Module) -> str | None:
    """Why this module cannot be adapted, as the end of a sentence; None where it can."""
    kind = kind_of(module)
    if kind is None:
        return f"is a {type(module).__name__}; LoRA-XS adapts {SUPPORTED}"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "belongs to nn.MultiheadAttention, which reads its weight and never calls it"
    plain = _PLAIN_FORWARDS.get(kind.name)
    if plain is not None and type(module).forward is not plain.forward:  # type: ignore[attr-defined]
        return f"is a {type(module).__name__}, whose forward is not that of nn.{kind.name}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "is an Embedding with max_norm, which rewrites its weight while it runs"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"is a Conv2d with {module.groups} groups; only groups=1 has one matrix to decompose"
    weight = module.weight
    if not (isinstance(weight, Tensor) and weight.dtype.is_floating_point):
        return f"has a weight of type {getattr(weight, 'dtype', type(weight).__name__)}, not a floating one"
    return None


def is_quantized(weight: Tensor) -> bool:
    """Whether `weight` is a tensor subclass that dequantises itself (torchao)."""
    return is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor")


def dense(weight: Tensor) -> Tensor:
    """The weight as an ordinary tensor, dequantised where it is quantised."""
    if hasattr(weight, "full_tensor"):
        raise LoRAXSError("the weights are already sharded; call lora_xs before fully_shard, not after")
    return weight.detach().dequantize() if is_quantized(weight) else weight.detach()


def matrix_of(module: nn.Module) -> Tensor:
    """W (out×in) in the precision of the decomposition: float64 for float64 weights, else float32."""
    kind, weight = kind_of(module), module.weight
    assert kind is not None
    assert isinstance(weight, Tensor)
    matrix = kind.to_matrix(dense(weight))
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of W, without dequantising."""
    kind, weight = kind_of(module), module.weight
    assert kind is not None
    assert isinstance(weight, Tensor)
    out, width = kind.to_matrix(torch.empty(weight.shape, device="meta")).shape
    return out, width
