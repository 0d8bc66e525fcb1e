"""The specification: every operation that is met, what of it is exact, what is approximated, what is kept, and why.

x̂ is what is kept of x: all of it in few bits (:mod:`.lowbit`), or, in the mode "pruned", its largest elements
(:mod:`.packing`). ~x is an 8-bit copy, in the mode "low-bit" x̂ too; g is the gradient that arrives. Anything that is
not in this table is PyTorch's own, saves what PyTorch saves, and is exact; :data:`DENSE` names the common ones and says
why they are so.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .keeper import Keeper
from .ops import attention, chains, conv, copies, linear, loss, lossless, norms, pointwise
from .weights import mark, of_weights_alone


@dataclass(frozen=True)
class Operation:
    """A row of the table."""

    name: str
    calls: tuple[Any, ...]
    """What is met: functions of torch and methods of ``Tensor``."""
    rule: Callable[..., Any]
    exact: str
    approximate: str
    keeps: str
    why: str


def _methods(*names: str) -> tuple[Any, ...]:
    return tuple(getattr(Tensor, name) for name in names)


def _either(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    def rule(razor: Any, *args: Any, **kwargs: Any) -> Any:
        result = first(razor, *args, **kwargs)
        return second(razor, *args, **kwargs) if result is NotImplemented else result

    return rule


_CODE_WHY = "f' is bounded and smooth: few levels bound the error of dx, pruning x would set f' of most units to f'(0)"


def _coded(
    name: str, call: Any, calls: tuple[Any, ...], bound: str, first: Callable[..., Any] | None = None
) -> Operation:
    rule = pointwise.activation(call)
    return Operation(
        name,
        calls,
        _either(first, rule) if first else rule,
        "y",
        f"dx = g · f'(x̂); pruned: g · level of f'(x), |level − f'(x)| ≤ {bound} for 2, 3, 4 bits",
        "x̂, from which the next layer makes its input too; pruned: f'(x) in 2 (default), 3 or 4 bits",
        _CODE_WHY,
    )


_OVERSHOOT = "1/6, 1/10, 1/22"
_MASK_WHY = "two values of f': one bit tells them apart"

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "linear",
        (F.linear,),
        linear.linear,
        "y, dx, db",
        "dW = gᵀ x̂",
        "x̂, once for all layers that take x; after a norm its x̂ (then dW uses x̂ γ + β); nothing if W is frozen",
        "dW is a sum over rows, in which the largest inputs weigh most",
    ),
    Operation(
        "linear, then cross_entropy",
        tuple(getattr(F, name) for name in ("linear_cross_entropy",) if hasattr(F, name)),  # of torch 2.15
        loss.linear_cross_entropy,
        "loss, dx, dW, db",
        "nothing",
        "x, log Σ exp of each row, targets; logits are made in chunks, in the forward and again in the backward pass",
        "logits over a vocabulary are the largest tensor of a language model, and x makes them again",
    ),
    Operation(
        "addmm",
        (torch.addmm, *_methods("addmm")),
        linear.addmm,
        "y, dx, db",
        "dW = x̂ᵀ g",
        "x̂",
        "GPT-2's Conv1D is a linear layer",
    ),
    Operation(
        "matmul",
        (torch.matmul, torch.bmm, torch.mm, *_methods("matmul", "__matmul__", "bmm", "mm")),
        attention.matmul,
        "y; dx where the other factor is a weight: a leaf, or a view, transpose, cast or slice of one",
        "dW = gᵀ x̂; two activations: dA = g B̂ᵀ, dB = Âᵀ g",
        "x̂ beside a weight; otherwise Â, B̂; P̂ once for softmax and product",
        "the paper's: Q, K, P and V are pruned alike; attention='exact' leaves it to PyTorch",
    ),
    Operation(
        "softmax",
        (F.softmax, torch.softmax, *_methods("softmax")),
        attention.softmax,
        "P",
        "dS = P̂ ∘ (g − Σ g ∘ P̂)",
        "nothing but Q̂ and K̂, from which P is made again; pruned: P̂, its values in 8 bits",
        "rows of P are mostly near 0, and a probability needs no exponent",
    ),
    Operation(
        "scaled_dot_product_attention",
        (F.scaled_dot_product_attention,),
        attention.scaled_dot_product_attention,
        "O",
        "dQ, dK, dV, dmask from P̂, Q̂, K̂, V̂",
        "Q̂, K̂, V̂, from which P and O are made again; pruned: P̂ too, and dropout's mask in 1 bit",
        "the same as written out; pruning Q and K under a flash backward would exponentiate their error",
    ),
    Operation("conv1d", (torch.conv1d,), conv.conv1d, "y, dx, db", "dW of x̂", "x̂; nothing if W is frozen", "as linear"),
    Operation("conv2d", (torch.conv2d,), conv.conv2d, "y, dx, db", "dW of x̂", "x̂; nothing if W is frozen", "as linear"),
    Operation("conv3d", (torch.conv3d,), conv.conv3d, "y, dx, db", "dW of x̂", "x̂; nothing if W is frozen", "as linear"),
    *(
        Operation(
            name,
            (getattr(torch, name),),
            getattr(conv, name),
            "y, dx, db",
            "dW of x̂",
            "x̂; nothing if W is frozen",
            "as linear",
        )
        for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    ),
    Operation(
        "layer_norm",
        (F.layer_norm,),
        norms.layer_norm,
        "y, mean, rstd, dβ",
        "dγ = Σ g x̂, and the term of dx along x̂",
        "x̂ of the normalised input (shared with the next layer), rstd",
        "the other two terms of dx need rstd alone",
    ),
    Operation(
        "rms_norm",
        (F.rms_norm,),
        norms.rms_norm,
        "y, rstd",
        "dγ = Σ g x̂, and the term of dx along x̂",
        "x̂ of the normalised input (shared with the next layer), rstd",
        "as layer_norm",
    ),
    Operation(
        "batch_norm",
        (F.batch_norm,),
        norms.batch_norm,
        "y, running statistics, dβ; dx with frozen statistics",
        "dγ = Σ g x̂, and the term of dx along x̂",
        "x̂ (pruned: in 4 bits), shared with a ReLU and convolution after; nothing with frozen statistics and weights",
        "a ReLU follows, so no product shares x̂; near normal, it errs by 0.1 in 4 bits and by 0.75 pruned to a tenth",
    ),
    Operation(
        "group_norm",
        (F.group_norm,),
        norms.group_norm,
        "y, dβ",
        "dγ = Σ g x̂, and the term of dx along x̂",
        "x̂ (pruned: in 4 bits), which a ReLU and convolution after it share",
        "as batch_norm",
    ),
    _coded("gelu", F.gelu, (F.gelu,), _OVERSHOOT),
    _coded("silu", F.silu, (F.silu,), _OVERSHOOT),
    _coded("hardswish", F.hardswish, (F.hardswish,), "1/6 (in 3 bits), 1/6, 1/14"),
    _coded("mish", F.mish, (F.mish,), _OVERSHOOT),
    _coded("softplus", F.softplus, (F.softplus,), "1/6, 1/14, 1/30"),
    _coded(
        "sigmoid",
        torch.sigmoid,
        (torch.sigmoid, *_methods("sigmoid")),
        "1/24, 1/56, 1/120",
        chains.link("sigmoid", torch.sigmoid),
    ),
    _coded("tanh", torch.tanh, (torch.tanh, *_methods("tanh")), "1/6, 1/14, 1/30", chains.link("tanh", torch.tanh)),
    Operation(
        "relu", (F.relu, torch.relu, *_methods("relu")), pointwise.relu, "y, dx", "nothing", "x > 0 in 1 bit", _MASK_WHY
    ),
    Operation(
        "relu_", (torch.relu_, *_methods("relu_")), pointwise.relu_, "y, dx", "nothing", "x > 0 in 1 bit", _MASK_WHY
    ),
    Operation("relu6", (F.relu6,), pointwise.relu6, "y, dx", "nothing", "0 < x < 6 in 1 bit", _MASK_WHY),
    Operation("hardtanh", (F.hardtanh,), pointwise.hardtanh, "y, dx", "nothing", "a < x < b in 1 bit", _MASK_WHY),
    Operation(
        "hardsigmoid", (F.hardsigmoid,), pointwise.hardsigmoid, "y, dx", "nothing", "|x| < 3 in 1 bit", _MASK_WHY
    ),
    Operation("leaky_relu", (F.leaky_relu,), pointwise.leaky_relu, "y, dx", "nothing", "x > 0 in 1 bit", _MASK_WHY),
    Operation(
        "dropout",
        (F.dropout, torch.dropout),
        lossless.dropout,
        "y, dx",
        "nothing",
        "the mask in 1 bit; the next product makes its input from x̂ and the mask",
        "a mask is all that dx needs",
    ),
    Operation(
        "max_pool2d",
        (F.max_pool2d, torch.max_pool2d),
        lossless.max_pool2d,
        "y, dx",
        "nothing",
        "the winner's place in its window: 2 bits for 2 × 2, 4 for 3 × 3",
        "PyTorch keeps x and a 64-bit index",
    ),
    Operation(
        "avg_pool2d", (F.avg_pool2d,), lossless.avg_pool2d, "y, dx", "nothing", "nothing", "linear; PyTorch keeps x"
    ),
    Operation(
        "adaptive_avg_pool2d",
        (F.adaptive_avg_pool2d,),
        lossless.adaptive_avg_pool2d,
        "y, dx",
        "nothing",
        "nothing",
        "linear; PyTorch keeps x",
    ),
    Operation(
        "mul",
        (torch.mul, *_methods("mul", "__mul__", "__rmul__")),
        chains.mul,
        "y; dx where the other factor is a weight or small; a factor without gradient is kept by reference",
        "d small = Σ g x̂; dW = g ~x; two activations: dA = g ~B, dB = g ~A; known chains as one operation",
        "x̂ for a small factor's gradient, ~x for a weight's; two 8-bit copies for two activations",
        "an elementwise gradient needs every element, a sum needs the largest",
    ),
    *(
        Operation(
            name,
            calls,
            copies.copy(calls[0]),
            "all",
            "nothing",
            "nothing; the next operation makes its input from what is kept of the original",
            "attention's output is laid out anew before its projection",
        )
        for name, calls in {
            "contiguous": _methods("contiguous"),
            "reshape": (Tensor.reshape, torch.reshape),
            "to": _methods("to"),
        }.items()
    ),
    Operation(
        "pad",
        (F.pad,),
        copies.pad,
        "all",
        "nothing",
        "nothing; the next operation makes its input from what is kept of the original",
        "before a convolution of a model that TensorFlow trained; its frame is constant",
    ),
    *(
        Operation(
            f"link: {name}",
            calls,
            chains.link(name, calls[0]),
            "all",
            "nothing",
            "what PyTorch keeps, let go when the chain is complete",
            "links of RMSNorm as Llama writes it, gelu_new, quick_gelu",
        )
        for name, calls in {
            "pow": (torch.pow, *_methods("pow", "__pow__")),
            "add": (torch.add, *_methods("add", "__add__", "__radd__")),
            "mean": (torch.mean, *_methods("mean")),
            "rsqrt": (torch.rsqrt, *_methods("rsqrt")),
            "div": (torch.div, *_methods("div", "__truediv__")),
        }.items()
    ),
    *(
        Operation(
            f"scores: {name}",
            calls,
            chains.scores_step(step, calls[0]),
            "all",
            "nothing",
            "what PyTorch keeps; P is made from Q̂ and K̂ through this step too",
            "attention as nanoGPT, GPT-J and T5 write it out",
        )
        for name, step, calls in (
            ("masked_fill", "fill", (torch.masked_fill, *_methods("masked_fill"))),
            ("masked_fill_", "fill", _methods("masked_fill_")),
            ("where", "where", (torch.where, *_methods("where"))),
            ("add_", "add", _methods("add_", "__iadd__")),
            ("mul_", "mul", _methods("mul_", "__imul__")),
            ("div_", "div", _methods("div_", "__itruediv__")),
        )
    ),
)

DENSE: dict[str, str] = {
    "cross_entropy of other logits, log_softmax": "the loss: an error here would be an error of every gradient",
    "embedding": "keeps indices alone",
    "add, cat, reshape, transpose, mean, sum": "keep nothing, or sizes",
    "rotary embedding": "its factors cos and sin need no gradient: kept by reference, once for all layers",
    "exp, log, pow, div, sqrt outside a known chain": "rare in models, and an error in them may grow",
    "einsum, baddbmm": "any contraction may be meant, of which some are no product of matrices: write it as matmul",
    "LSTM, GRU": "one fused call, which keeps its own states",
    "local_response_norm, lp_pool2d, gumbel_softmax and other compositions of torch.nn.functional": "rare; left whole",
    "complex numbers; sparse and nested tensors; calls with other arguments (out=)": "left to PyTorch",
    "what is computed of weights alone": "a weight too: standardised, merged with an adapter, a mixture of layers",
    "attention='exact'": "softmax, product and scaled_dot_product_attention keep what PyTorch keeps",
}


_LAYERS = ("linear", "addmm", "conv", "scaled_dot_product_attention")
_MAKES_ACTIVATIONS = frozenset(
    {F.embedding, *(call for o in OPERATIONS if o.name.startswith(_LAYERS) for call in o.calls)}
)
"""What a layer makes of a learned table is an activation, whatever it is made of."""


@functools.cache
def rules() -> dict[Any, Callable[..., Any]]:
    """From a function of torch to its rule, which answers NotImplemented to arguments that it does not know."""
    return {call: _known_arguments_only(operation.rule, call) for operation in OPERATIONS for call in operation.calls}


def _known_arguments_only(rule: Callable[..., Any], call: Any) -> Callable[..., Any]:
    parameters = list(inspect.signature(rule).parameters.values())[1:]
    kinds = [p.kind for p in parameters]
    places = len(parameters) if inspect.Parameter.VAR_POSITIONAL in kinds else kinds.count(_EITHER)
    least = sum(p.default is p.empty and p.kind is _EITHER for p in parameters)
    anything = inspect.Parameter.VAR_KEYWORD in kinds
    names = {p.name for p in parameters}
    layer = call in _MAKES_ACTIVATIONS

    def known(razor: Keeper, *args: Any, **kwargs: Any) -> Any:
        if not anything and (len(args) > places or not kwargs.keys() <= names or len(args) + len(kwargs) < least):
            return NotImplemented
        if not layer and of_weights_alone((*args, *kwargs.values())):
            return NotImplemented
        return rule(razor, *args, **kwargs)

    return known


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def mark_computed(call: Any, result: Any, values: tuple[Any, ...]) -> Any:
    """The result of a call that PyTorch answered: a weight, where it was computed of weights alone."""
    if isinstance(result, Tensor):
        if result.grad_fn is not None and call not in _MAKES_ACTIVATIONS and of_weights_alone(values):
            mark(result)
    elif type(result) in (tuple, list) and of_weights_alone(values):
        for part in result:
            mark(part)
    return result


def names() -> dict[Any, str]:
    """From a function of torch to the name of its operation."""
    return {call: operation.name for operation in OPERATIONS for call in operation.calls}


def describe() -> list[dict[str, str]]:
    """The table as rows of text: name, exact, approximate, keeps, why; then what stays dense."""
    fields = ("name", "exact", "approximate", "keeps", "why")
    met = [{f: getattr(operation, f) for f in fields} for operation in OPERATIONS]
    return met + [
        {"name": name, "exact": "all", "approximate": "nothing", "keeps": "as PyTorch", "why": why}
        for name, why in DENSE.items()
    ]
