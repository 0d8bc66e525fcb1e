"""Activation functions: not x is kept, but the derivative at x, as a code of 2 to 4 bits; dx = g · level(code).

The levels are evenly spaced, and 0 and 1 are among them, so that units which are switched off or fully on pass their
gradient exactly. Where a derivative takes two or three values (ReLU), 1 or 2 bits hold it without loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..coded import Levels, code
from ..function import Function, Kept, save
from ..saved import mask_bits
from ..store import Held, Holder

if TYPE_CHECKING:
    from ..razor import Razor

aten = torch.ops.aten
OVERSHOOTING = {2: Levels(2, 0.0, 1 / 3), 3: Levels(3, -1 / 5, 1 / 5), 4: Levels(4, -2 / 11, 1 / 11)}
"""For derivatives within [-0.13, 1.13], as GELU's and SiLU's: errors at most 1/6, 1/10 and 1/22."""
UNIT = {b: Levels(b, 0.0, 1 / ((1 << b) - 1)) for b in (2, 3, 4)}
"""For derivatives within [0, 1]: errors at most 1/6, 1/14 and 1/30."""
QUARTER = {b: Levels(b, 0.0, 1 / 4 / ((1 << b) - 1)) for b in (2, 3, 4)}
"""For derivatives within [0, 1/4]: a quarter of the errors for [0, 1]."""


@dataclass(frozen=True)
class Activation:
    """An activation function: its derivative times g, and the levels that its derivative is rounded to."""

    backward: Callable[..., Tensor]
    """(g, x, *settings) -> g · f'(x)."""
    levels: dict[int, Levels]


def _sigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    return g * y * (1 - y)


def _tanh_backward(g: Tensor, x: Tensor) -> Tensor:
    return g * (1 - torch.tanh(x).square_())


def _quick_gelu_backward(g: Tensor, x: Tensor) -> Tensor:
    return aten.silu_backward(g, 1.702 * x)  # x σ(c x) = silu(c x) / c


ACTIVATIONS: dict[Any, Activation] = {
    F.gelu: Activation(
        lambda g, x, approximate="none": aten.gelu_backward(g, x, approximate=approximate), OVERSHOOTING
    ),
    F.silu: Activation(lambda g, x: aten.silu_backward(g, x), OVERSHOOTING),
    F.mish: Activation(lambda g, x: aten.mish_backward(g, x), OVERSHOOTING),
    F.softplus: Activation(lambda g, x, beta=1, threshold=20: aten.softplus_backward(g, x, beta, threshold), UNIT),
    torch.sigmoid: Activation(_sigmoid_backward, QUARTER),
    torch.tanh: Activation(_tanh_backward, UNIT),
    "quick_gelu": Activation(_quick_gelu_backward, OVERSHOOTING),
}


class Pointwise(Function):
    """y = f(x), dx = g · level of f'(x). In the mode "paper" x is kept in float16 and f' is exact there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Any, settings: dict[str, Any], activation: Activation, razor: Any) -> Tensor:
        ctx.dtype, ctx.by_x = x.dtype, None
        y: Tensor = call(x, **settings)
        if razor.keep == 1 or razor.mode == "paper":
            ctx.by_x = lambda g, x: activation.backward(g, x, **settings)
            save(ctx, x=x if razor.keep == 1 else x.detach().half())
        else:
            derivative = lambda ones, part: activation.backward(ones, part, **settings)  # noqa: E731
            saved = code(x, derivative, activation.levels[razor.derivative_bits])
            save(ctx, derivative=Held(Holder(saved), None))
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(ctx)
        if ctx.by_x is not None:
            dx = ctx.by_x(g, kept.dense("x", g.dtype))
        else:
            dx = kept.dense("derivative", g.dtype).mul_(g)
        return dx.to(ctx.dtype), None, None, None, None


class Piecewise(Function):
    """ReLU and its kin, without loss: the derivative is one of two values, told by 1 bit."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: Any, where: Callable[[Tensor], Tensor], slope: float, inplace: bool, razor: Any
    ) -> Tensor:
        ctx.slope = slope
        mask = where(x)
        saved = mask_bits(mask)
        del mask
        save(ctx, mask=Held(Holder(saved), None))
        y: Tensor = call(x)
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        mask = Kept(ctx).dense("mask", g.dtype)
        if ctx.slope:
            mask = mask.mul_(1 - ctx.slope).add_(ctx.slope)
        return mask.mul_(g), None, None, None, None, None


def activation(call: Any) -> Any:
    """The rule of one activation function."""

    def rule(razor: "Razor", input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inplace = kwargs.pop("inplace", bool(args and args[0] is True))
        if inplace or not input.requires_grad or not input.is_floating_point():
            return NotImplemented
        names = {F.softplus: ("beta", "threshold"), F.gelu: ("approximate",)}.get(call, ())
        settings = {**dict(zip(names, args, strict=False)), **kwargs}
        y: Tensor = Pointwise.apply(input, call, settings, ACTIVATIONS[call], razor)
        return razor.chains.label(y, input, ("activation", call, tuple(settings.items())))

    return rule


def _piecewise(
    razor: "Razor", x: Tensor, call: Any, in_place_call: Any, where: Any, slope: float, inplace: bool
) -> Tensor:
    if not x.requires_grad or not x.is_floating_point() or (inplace and (x._is_view() or x.is_leaf)):
        return NotImplemented
    y: Tensor = Piecewise.apply(x, in_place_call if inplace else call, where, slope, inplace, razor)
    return y


def relu(razor: "Razor", input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``, ``torch.relu``."""
    return _piecewise(razor, input, torch.relu, torch.relu_, lambda x: x > 0, 0.0, inplace)


def relu_(razor: "Razor", input: Tensor) -> Tensor:
    """``torch.relu_``."""
    return relu(razor, input, True)


def relu6(razor: "Razor", input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu6``."""
    return hardtanh(razor, input, 0.0, 6.0, inplace)


def hardtanh(
    razor: "Razor", input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """``F.hardtanh``."""
    return _piecewise(
        razor,
        input,
        lambda x: F.hardtanh(x, min_val, max_val),
        lambda x: torch._C._nn.hardtanh_(x, min_val, max_val),
        lambda x: (x > min_val) & (x < max_val),
        0.0,
        inplace,
    )


def leaky_relu(razor: "Razor", input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``F.leaky_relu``."""
    return _piecewise(
        razor,
        input,
        lambda x: F.leaky_relu(x, negative_slope),
        lambda x: torch._C._nn.leaky_relu_(x, negative_slope),
        lambda x: x > 0,
        negative_slope,
        inplace,
    )
