"""Convolutions: the input is pruned; dx and db are exact, dW is approximate. A frozen weight keeps nothing of x."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..function import Function, Kept, save

if TYPE_CHECKING:
    from ..razor import Razor

Sizes = int | tuple[int, ...] | list[int]


class Conv(Function):
    """y = W ∗ x + b in one, two or three dimensions; (dx, dW, db) are those of x̂, the pruned x.

    x (N, C, …), W (C_out, C / groups, …). dx and db do not depend on x, so they are exact.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Any, settings: tuple[Any, ...], razor: "Razor"
    ) -> Tensor:
        ctx.x_like, ctx.settings = (x.shape, x.dtype), settings
        ctx.bias_like = (list(bias.shape), bias.dtype) if bias is not None else (None, None)
        ctx.weight_dtype = weight.dtype
        save(ctx, x=razor.hold(x, values="fp32") if ctx.needs_input_grad[1] else None, weight=weight)
        stride, padding, dilation, groups = settings
        return call(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.x_like
        kept = Kept(ctx)
        weight = kept.dense("weight", g.dtype)
        # Without dW only the shape of x matters.
        x = kept.dense("x", g.dtype) if "x" in kept else g.new_empty(1).expand(shape)
        stride, padding, dilation, groups = ctx.settings
        bias_shape, bias_dtype = ctx.bias_like
        zeros = [0] * len(stride)
        settings = (bias_shape, stride, padding, dilation, False, zeros, groups)
        dx, dweight, dbias = torch.ops.aten.convolution_backward(g, x, weight, *settings, ctx.needs_input_grad[:3])
        return (
            dx.to(dtype) if dx is not None else None,
            dweight.to(ctx.weight_dtype) if dweight is not None else None,
            dbias.to(bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


def _rule(call: Any, dimensions: int) -> Any:
    def conv(
        razor: "Razor",
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Tensor:
        def sizes(value: Sizes) -> list[int]:
            return [value] * dimensions if isinstance(value, int) else [*value] * (dimensions // len(value))

        if input.numel() == 0 or input.dim() not in (dimensions + 1, dimensions + 2):
            return NotImplemented
        if isinstance(padding, str):
            spans = [d * (k - 1) for d, k in zip(sizes(dilation), weight.shape[2:], strict=True)]
            if padding == "same" and any(s % 2 for s in spans):  # PyTorch pads one more at the end
                ends = [e for s in reversed(spans) for e in (s // 2, s - s // 2)]
                input, padding = torch.nn.functional.pad(input, ends), 0
            else:
                padding = [s // 2 for s in spans] if padding == "same" else 0
        batched = input.dim() == dimensions + 2
        settings = (sizes(stride), sizes(padding), sizes(dilation), groups)
        out: Tensor = Conv.apply(input if batched else input.unsqueeze(0), weight, bias, call, settings, razor)
        return out if batched else out.squeeze(0)

    return conv


conv1d = _rule(torch.conv1d, 1)
conv2d = _rule(torch.conv2d, 2)
conv3d = _rule(torch.conv3d, 3)
