"""Activation functions: not x is kept, but the derivative at x, as a code of 2 to 4 bits; dx = g · level(code).

The levels are evenly spaced, and 0 and 1 are among them, so that units which are switched off or fully on pass their
gradient exactly. Where a derivative takes two or three values (ReLU), 1 or 2 bits hold it without loss.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..coded import Levels, Steps, code, mask_bits, steps_of
from ..function import Function, Kept, save
from ..internals import is_fake, on_real_tensors
from ..keeper import Keeper
from ..store import Held, Holder

aten = torch.ops.aten
OVERSHOOTING = {2: Levels(2, 0.0, 1 / 3), 3: Levels(3, -1 / 5, 1 / 5), 4: Levels(4, -2 / 11, 1 / 11)}
"""For derivatives within [-0.13, 1.13], as GELU's and SiLU's: errors at most 1/6, 1/10 and 1/22."""
UNIT = {b: Levels(b, 0.0, 1 / ((1 << b) - 1)) for b in (2, 3, 4)}
"""For derivatives within [0, 1]: errors at most 1/6, 1/14 and 1/30."""
QUARTER = {b: Levels(b, 0.0, 1 / 4 / ((1 << b) - 1)) for b in (2, 3, 4)}
"""For derivatives within [0, 1/4]: a quarter of the errors for [0, 1]."""

WIDE = {2: Levels(3, -2 / 3, 1 / 3), 3: Levels(3, -2 / 3, 1 / 3), 4: Levels(4, -4 / 7, 1 / 7)}
"""For derivatives within [-1/2, 3/2], as hardswish's: errors at most 1/6, 1/6 and 1/14, in 3 bits at least."""

SIXTH = torch.tensor(1 / 6).item()
"""In float32, as PyTorch has it in every type."""


@dataclass(frozen=True, eq=False)  # hashed by identity
class Activation:
    """An activation function: its derivative times g, and the levels that its derivative is rounded to."""

    backward: Callable[..., Tensor]
    """(g, x, *settings) -> g · f'(x)."""
    levels: dict[int, Levels]
    into: Callable[..., Tensor] | None = None
    """The same, which writes its result over x."""


def _sigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    return g * y * (1 - y)


def _tanh_backward(g: Tensor, x: Tensor) -> Tensor:
    return g * (1 - torch.tanh(x).square_())


def _quick_gelu_backward(g: Tensor, x: Tensor) -> Tensor:
    return aten.silu_backward(g, 1.702 * x)  # x σ(c x) = silu(c x) / c


ACTIVATIONS: dict[Any, Activation] = {
    F.gelu: Activation(
        lambda g, x, approximate="none": aten.gelu_backward(g, x, approximate=approximate),
        OVERSHOOTING,
        lambda g, x, approximate="none": aten.gelu_backward(g, x, approximate=approximate, grad_input=x),
    ),
    F.silu: Activation(
        lambda g, x: aten.silu_backward(g, x), OVERSHOOTING, lambda g, x: aten.silu_backward(g, x, grad_input=x)
    ),
    F.hardswish: Activation(lambda g, x: aten.hardswish_backward(g, x), WIDE),
    F.mish: Activation(lambda g, x: aten.mish_backward(g, x), OVERSHOOTING),
    F.softplus: Activation(lambda g, x, beta=1, threshold=20: aten.softplus_backward(g, x, beta, threshold), UNIT),
    torch.sigmoid: Activation(_sigmoid_backward, QUARTER),
    torch.tanh: Activation(_tanh_backward, UNIT),
    "quick_gelu": Activation(_quick_gelu_backward, OVERSHOOTING),
}


@functools.cache
def derivative_steps(activation: Activation, settings: tuple[tuple[str, Any], ...], levels: Levels) -> Steps:
    """From x to the code of f'(x)."""

    def derivative(x: Tensor) -> Tensor:
        return activation.backward(torch.ones_like(x), x, **dict(settings))

    with on_real_tensors():
        return steps_of(derivative, levels)


class Pointwise(Function):
    """y = f(x), dx = g · f'(x̃) in the mode "low-bit", whose y is made from x̃ too if it is needed.

    In the mode "pruned" dx = g · level of f'(x); in "paper" x is kept in float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: Any,
        settings: dict[str, Any],
        activation: Activation,
        razor: Keeper,
        inplace: bool = False,
        held: Held | None = None,
    ) -> Tensor:
        ctx.dtype, ctx.by_x, ctx.into_x = x.dtype, None, None
        if razor.keep == 1 or razor.mode != "pruned":
            ctx.by_x = functools.partial(activation.backward, **settings)
            ctx.into_x = functools.partial(activation.into, **settings) if activation.into is not None else None
            save(ctx, x=held or (x if razor.keep == 1 else x.detach().to(torch.float16, copy=inplace)))
        else:
            levels = activation.levels[razor.derivative_bits]
            saved = code(x, derivative_steps(activation, tuple(settings.items()), levels), levels)
            save(ctx, derivative=Held(Holder(saved), None))
        if inplace:
            ctx.mark_dirty(x)
            return call(x, **settings, inplace=True)
        return call(x, **settings)

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        if ctx.by_x is None:
            dx = kept.times("derivative", g)
        else:
            x, alone = kept.dense_and_alone("x", g.dtype)
            over = alone and ctx.into_x is not None and x.shape == g.shape
            dx = ctx.into_x(g, x) if over else ctx.by_x(g, x)
        return dx.to(ctx.dtype), None, None, None, None, None, None


def activate(
    razor: Keeper,
    x: Tensor,
    call: Any,
    settings: dict[str, Any],
    activation: Activation,
    remake: Any,
    inplace: bool = False,
) -> Tensor:
    """f(x) by ``call``; in the mode "low-bit" ``remake`` makes it again."""
    held = None
    if razor.mode == "low-bit" and not (inplace and razor.keep == 1):
        held = razor.hold(x, "activation", (channel_of(x),))
    y: Tensor = Pointwise.apply(x, call, settings, activation, razor, inplace, held)
    if held is not None:
        razor.derive(y, lambda x: remake(x, **settings), (held,))
    return y


def channel_of(x: Tensor) -> int:
    """The dimension of channels: that of the convolution or norm which made ``x``, otherwise the last."""
    name = x.grad_fn.name() if x.grad_fn is not None else ""
    return 1 if x.dim() > 2 and name.startswith(_CHANNELS_FIRST) else -1


_CHANNELS_FIRST = ("Conv", "BatchNorm", "GroupNorm", "NativeBatchNorm", "NativeGroupNorm")


class Piecewise(Function):
    """ReLU and its kin, without loss: the derivative is one of two ``slopes``, told by 1 bit."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: Any,
        mask: Held,
        slopes: tuple[float, float],
        inplace: bool,
    ) -> Tensor:
        ctx.slopes = slopes
        save(ctx, mask=mask)
        y: Tensor = call(x)
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        low, high = ctx.slopes
        if low == 0:
            dx = kept.times("mask", g)
            return dx if high == 1 else dx.mul_(high), None, None, None, None, None, None
        mask = kept.dense("mask", g.dtype)
        return mask.mul_(high - low).add_(low).mul_(g), None, None, None, None, None


SETTINGS: dict[Any, tuple[str, ...]] = {
    F.softplus: ("beta", "threshold"),
    F.gelu: ("approximate",),
    torch.sigmoid: (),
    torch.tanh: (),
}
"""What an activation function takes beside its input; of the others "inplace"."""


LEVELLING = frozenset({torch.sigmoid, torch.tanh, F.softplus, F.hardswish})
"""Those whose gradient at ±∞ is a number, in dense training too."""


def activation(call: Any) -> Any:
    """The rule of one activation function."""

    def rule(razor: Keeper, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = SETTINGS.get(call, ("inplace",))
        if len(args) > len(names) or not kwargs.keys() <= set(names):
            return NotImplemented
        settings = {**dict(zip(names, args, strict=False)), **kwargs}
        inplace = settings.pop("inplace", False)
        if not input.requires_grad or not input.is_floating_point():
            return NotImplemented
        if call in LEVELLING and razor.mode == "low-bit" and not is_fake(input) and not input.isfinite().all():
            return NotImplemented  # a router's scores, −∞ where an expert is not chosen: no end of a range of codes
        if inplace:
            if input._is_view() or input.is_leaf or razor.keep == 1:
                return NotImplemented
            return activate(razor, input, call, settings, ACTIVATIONS[call], call, True)
        y = activate(razor, input, call, settings, ACTIVATIONS[call], call)
        return razor.chains.label(y, input, ("activation", call, tuple(settings.items())))

    return rule


def _piecewise(
    razor: Keeper,
    x: Tensor,
    call: Any,
    in_place_call: Any,
    where: Any,
    slopes: tuple[float, float],
    inplace: bool,
    remake: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """``remake`` makes y from x̃ and the mask of 0 and 1."""
    if not x.requires_grad or not x.is_floating_point() or (inplace and (x._is_view() or x.is_leaf)):
        return NotImplemented
    before = razor.find(x) if razor.mode == "low-bit" else None
    saved = mask_bits(where(x))
    y: Tensor = Piecewise.apply(x, in_place_call if inplace else call, Held(Holder(saved), None), slopes, inplace)
    if before is not None and remake is not None:  # y's next user makes it from what is kept of x, and the exact mask
        razor.derive(y, remake, (before, Held(Holder(saved), None)))
    return y


def _relu_again(x: Tensor, mask: Tensor) -> Tensor:
    return x.clamp_min(0).mul_(mask)


def relu(razor: Keeper, input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``, ``torch.relu``."""
    return _piecewise(razor, input, torch.relu, torch.relu_, lambda x: x > 0, (0.0, 1.0), inplace, _relu_again)


def relu_(razor: Keeper, input: Tensor) -> Tensor:
    """``torch.relu_``."""
    return relu(razor, input, True)


def relu6(razor: Keeper, input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu6``."""
    return hardtanh(razor, input, 0.0, 6.0, inplace)


def hardtanh(
    razor: Keeper, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """``F.hardtanh``."""
    return _piecewise(
        razor,
        input,
        lambda x: F.hardtanh(x, min_val, max_val),
        lambda x: torch._C._nn.hardtanh_(x, min_val, max_val),
        lambda x: (x > min_val) & (x < max_val),
        (0.0, 1.0),
        inplace,
        lambda x, mask: torch.where(mask > 0, x.clamp(min_val, max_val), _nearer(x, min_val, max_val)),
    )


def _nearer(x: Tensor, low: float, high: float) -> Tensor:
    """Whichever of two numbers is nearer."""
    return torch.where(x > (low + high) / 2, high, low).to(x.dtype)


def leaky_relu(razor: Keeper, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``F.leaky_relu``."""
    return _piecewise(
        razor,
        input,
        lambda x: F.leaky_relu(x, negative_slope),
        lambda x: torch._C._nn.leaky_relu_(x, negative_slope),
        lambda x: x > 0,
        (negative_slope, 1.0),
        inplace,
        lambda x, mask: torch.where(mask > 0, x.clamp_min(0), x.clamp_max(0) * negative_slope),
    )


def hardsigmoid(razor: Keeper, input: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``."""
    return _piecewise(
        razor, input, F.hardsigmoid, torch._C._nn.hardsigmoid_, lambda x: (x > -3) & (x < 3), (0.0, SIXTH), inplace
    )
