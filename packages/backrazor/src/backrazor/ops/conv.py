"""Convolutions: the input is pruned; dx and db are exact, dW is approximate. A frozen weight keeps nothing of x."""

from typing import Any

import torch
from torch import Tensor

from ..function import Function, Kept, save
from ..keeper import Keeper

Sizes = int | tuple[int, ...] | list[int]
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


class Conv(Function):
    """y = W ∗ x + b in one, two or three dimensions; (dx, dW, db) are those of x̂, the pruned x.

    x (N, C, …), W (C_out, C / groups, …), of a transposed one (C, C_out / groups, …). dx and db do not depend on
    x, so they are exact.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Any, settings: tuple[Any, ...], razor: Keeper
    ) -> Tensor:
        ctx.x_like, ctx.settings, ctx.transposed = (x.shape, x.dtype), settings, call in TRANSPOSED
        ctx.bias_like = (list(bias.shape), bias.dtype) if bias is not None else (None, None)
        ctx.weight_dtype = weight.dtype
        save(ctx, x=razor.hold(x, "input", (1,), values="fp32") if ctx.needs_input_grad[1] else None, weight=weight)
        return call(x, weight, bias, *settings)

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.x_like
        kept = Kept(ctx)
        weight = kept.dense("weight", g.dtype)
        # Without dW only the shape of x matters.
        x = kept.dense("x", g.dtype) if "x" in kept else g.new_empty(1).expand(shape)
        bias_shape, bias_dtype = ctx.bias_like
        if ctx.transposed:
            stride, padding, extra, groups, dilation = ctx.settings
        else:
            stride, padding, dilation, groups = ctx.settings
            extra = [0] * len(stride)
        settings = (bias_shape, stride, padding, dilation, ctx.transposed, extra, groups)
        dx, dweight, dbias = torch.ops.aten.convolution_backward(g, x, weight, *settings, ctx.needs_input_grad[:3])
        return (
            dx.to(dtype) if dx is not None else None,
            dweight.to(ctx.weight_dtype) if dweight is not None else None,
            dbias.to(bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


def _sizes(value: Sizes, dimensions: int) -> list[int]:
    return [value] * dimensions if isinstance(value, int) else [*value] * (dimensions // len(value))


def _rule(call: Any, dimensions: int) -> Any:
    def conv(
        razor: Keeper,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Tensor:
        def sizes(value: Sizes) -> list[int]:
            return _sizes(value, dimensions)

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


def _transposed_rule(call: Any, dimensions: int) -> Any:
    def conv_transpose(
        razor: Keeper,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> Tensor:
        if input.numel() == 0 or input.dim() not in (dimensions + 1, dimensions + 2):
            return NotImplemented
        first = [_sizes(value, dimensions) for value in (stride, padding, output_padding)]
        settings = (*first, groups, _sizes(dilation, dimensions))
        batched = input.dim() == dimensions + 2
        out: Tensor = Conv.apply(input if batched else input.unsqueeze(0), weight, bias, call, settings, razor)
        return out if batched else out.squeeze(0)

    return conv_transpose


conv_transpose1d, conv_transpose2d, conv_transpose3d = (
    _transposed_rule(call, dimensions) for dimensions, call in enumerate(TRANSPOSED, 1)
)
