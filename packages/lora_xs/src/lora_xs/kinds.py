"""The kinds of weight that can be adapted, and each one's numbers seen as a matrix W (out×in) or a stack of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import LoRAXSError


@dataclass(frozen=True)
class Kind:
    """How one kind of weight stores W (out×in), or a stack (n×out×in)."""

    name: str
    to_matrix: Callable[[Tensor], Tensor]
    """weight → W (out×in)"""
    from_matrix: Callable[[Tensor, torch.Size], Tensor]
    """W (out×in), shape of the weight → weight"""

    def __reduce__(self) -> tuple[Any, ...]:
        return _known, (self.name,)  # a copied or pickled model keeps this very object


LINEAR = Kind("Linear", lambda w: w, lambda m, shape: m)
CONV1D = Kind("Conv1D", lambda w: w.t(), lambda m, shape: m.t())  # transformers: weight is in×out
EMBEDDING = Kind("Embedding", lambda w: w.t(), lambda m, shape: m.t())  # weight is vocabulary×width: in×out
CONV2D = Kind("Conv2d", lambda w: w.flatten(1), lambda m, shape: m.reshape(shape))  # out×(in·kh·kw)
# Parameters of modules that multiply by them themselves.
MATRIX = Kind("Matrix", lambda w: w, lambda m, shape: m)  # nn.MultiheadAttention's projections: out×in
STACK = Kind("Stack", lambda w: w, lambda m, shape: m)  # experts: n×out×in
STACK_T = Kind("StackT", lambda w: w.mT, lambda m, shape: m.mT)  # experts of Llama 4 and GPT-OSS: n×in×out


def _known(name: str) -> Kind:
    return next(k for k in (LINEAR, CONV1D, EMBEDDING, CONV2D, MATRIX, STACK, STACK_T) if k.name == name)


SUPPORTED = "Linear, Conv1D (transformers), Embedding, Conv2d, nn.MultiheadAttention's projections and stacked experts"


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


def refusal(module: nn.Module, *, called: bool = True) -> str | None:
    """Why this module cannot be adapted, as the end of a sentence; None where it can.

    Args:
        called: the update is added to what the module answers; False adds it to its weight, which the parent reads.
    """
    if isinstance(module, nn.MultiheadAttention):
        return "is a MultiheadAttention; name its in_proj_weight and out_proj"
    kind = kind_of(module)
    if kind is None:
        return f"is a {type(module).__name__}; LoRA-XS adapts {SUPPORTED}"
    if "weight" not in module._parameters:
        return (
            f"has no weight of its own: it is computed from others ({_computed_by(module)}), and merging would have "
            "nothing to write to; take that off before (the base is frozen anyway)"
        )
    if called:
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "belongs to nn.MultiheadAttention, which reads its weight and never calls it"
        plain = _PLAIN_FORWARDS.get(kind.name)
        own = plain is not None and type(module).forward is not plain.forward  # type: ignore[attr-defined]
        if own and not answers_linearly(module):
            return f"is a {type(module).__name__}, whose forward is not that of nn.{kind.name}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "is an Embedding with max_norm, which rewrites its weight while it runs"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"is a Conv2d with {module.groups} groups; only groups=1 has one matrix to decompose"
    weight = module.weight
    if not (isinstance(weight, Tensor) and weight.dtype.is_floating_point):
        return f"has a weight of type {getattr(weight, 'dtype', type(weight).__name__)}, not a floating one"
    return None


@torch.no_grad()
def answers_linearly(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear with a forward of its own (Falcon's, timm's) answers x Wᵀ + b all the same.

    Its forward is tried on two rows, where it has nothing but a weight and a bias.
    """
    extras = set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules
    if not isinstance(module, nn.Linear) or extras or module.weight.is_meta:
        return False
    width = module.in_features
    x = torch.linspace(-1, 1, 2 * width, dtype=module.weight.dtype, device=module.weight.device).view(2, width)
    try:
        answer = type(module).forward(module, x)
        expected = nn.functional.linear(x, module.weight, module.bias)
    except Exception:  # another signature, a type that has no such product: not a linear layer to us
        return False
    tolerance = 16 * torch.finfo(x.dtype).eps * width**0.5
    return (
        isinstance(answer, Tensor)
        and answer.shape == expected.shape
        and bool(((answer - expected).abs() <= tolerance * (1 + expected.abs())).all())
    )


def _computed_by(module: nn.Module) -> str:
    """What makes the weight: torch.nn.utils' weight_norm, spectral_norm, or a parametrization."""
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        steps = ", ".join(type(step).__name__.strip("_") for step in module.parametrizations.weight)  # type: ignore
        return f"the parametrization {steps}; torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
    if "weight_g" in module._parameters:
        return "weight_norm; torch.nn.utils.remove_weight_norm(module)"
    if "weight_orig" in module._parameters:
        return "weight_orig, by spectral_norm or pruning; torch.nn.utils.remove_spectral_norm(module)"
    return "none of them named weight"


def is_quantized(weight: Tensor) -> bool:
    """Whether `weight` is a tensor subclass that dequantises itself (torchao)."""
    return is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor")


def dense(weight: Tensor) -> Tensor:
    """The weight as an ordinary tensor, dequantised where it is quantised."""
    if hasattr(weight, "full_tensor"):
        raise LoRAXSError("the weights are already sharded; call lora_xs before fully_shard, not after")
    return weight.detach().dequantize() if is_quantized(weight) else weight.detach()


def matrix_of(weight: Tensor, kind: Kind) -> Tensor:
    """W (out×in) in the precision of the decomposition: float64 for float64 weights, else float32."""
    matrix = kind.to_matrix(dense(weight))
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def matrix_shape(weight: Tensor, kind: Kind) -> tuple[int, ...]:
    """(out, in) of W, or (n, out, in) of a stack, without dequantising."""
    return tuple(kind.to_matrix(torch.empty(weight.shape, device="meta")).shape)
