"""What is kept without loss in the fewest bits: dropout masks, the winners of max-pooling, nothing for mean pooling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import bits
from ..coded import mask_bits
from ..drawing import dropped, kept_of, scale_of
from ..function import Function, Kept, save
from ..keeper import Keeper
from ..store import Held, Holder

Sizes = int | tuple[int, ...] | list[int]


class Dropout(Function):
    """y = x · mask / (1 − p), dx = g · mask / (1 − p); the mask takes 1 bit an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, razor: Keeper) -> Tensor:
        if x.device.type == "cpu":
            mask = kept_of(x, p)
            y, scale = dropped(x, mask, p), scale_of(p, x.dtype)
        else:
            y, mask = torch.native_dropout(x, p, True)
            scale = 1 / (1 - p) if p < 1 else 0.0
        saved = mask_bits(mask, scale)
        save(ctx, mask=Held(Holder(saved), None))
        before = razor.find(x)
        if before is not None:  # y's next user makes it from what is kept of x
            razor.derive(y, torch.mul, (before, Held(Holder(saved), None)))
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return Kept(ctx).times("mask", g), None, None


def dropout(razor: Keeper, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``F.dropout``, ``torch.dropout``."""
    if not training or inplace or not 0 < p <= 1 or not input.requires_grad or input.numel() == 0:
        return NotImplemented
    return Dropout.apply(input, p, razor)


class MaxPool2d(Function):
    """Each output's winner as its place in the window: ceil(log2(kh · kw)) bits, 4 for a 3 × 3 window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Tensor:
        y, index = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
        ctx.window = (tuple(x.shape), tuple(y.shape), kernel, stride, padding, dilation)
        ctx.channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        width = x.shape[-1]
        top, left = _corners(ctx.window, index.device)
        row = torch.div(index, width, rounding_mode="floor")
        code = (row - top).div_(dilation[0], rounding_mode="floor") * kernel[1]
        code += (index - row * width - left).div_(dilation[1], rounding_mode="floor")
        width_bits = max(1, (kernel[0] * kernel[1] - 1).bit_length())
        save(ctx, code=bits.pack(code.to(torch.int32).reshape(-1), width_bits))
        return y

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, out_shape, kernel, _, _, dilation = ctx.window
        (packed,) = ctx.saved_tensors
        width_bits = max(1, (kernel[0] * kernel[1] - 1).bit_length())
        code = bits.unpack(packed, g.numel(), width_bits).view(out_shape).long()
        top, left = _corners(ctx.window, g.device)
        row = torch.div(code, kernel[1], rounding_mode="floor")
        index = (row * dilation[0] + top) * shape[-1] + (code - row * kernel[1]) * dilation[1] + left
        lead = shape[:-2]
        dx = g.new_zeros((*lead, shape[-2] * shape[-1]))
        dx.scatter_add_(-1, index.flatten(-2), g.flatten(-2))
        dx = dx.view(shape)
        if ctx.channels_last:
            dx = dx.contiguous(memory_format=torch.channels_last)
        return dx, None, None, None, None, None


def _corners(window: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each window's first place: (H_out, 1) and (1, W_out)."""
    _, out_shape, _, stride, padding, _ = window
    top = torch.arange(out_shape[-2], device=device) * stride[0] - padding[0]
    left = torch.arange(out_shape[-1], device=device) * stride[1] - padding[1]
    return top.view(-1, 1), left.view(1, -1)


def _pair(value: Sizes) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value] * (2 // len(value))


def max_pool2d(
    razor: Keeper,
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """``F.max_pool2d``."""
    if return_indices or not input.requires_grad or input.numel() == 0:
        return NotImplemented
    kernel = _pair(kernel_size)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return MaxPool2d.apply(input, kernel, stride, _pair(padding), _pair(dilation), ceil_mode)


class MeanPool(Function):
    """Pooling by means is linear: dx depends on the shape of x alone, where PyTorch keeps x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Any, backward: Any) -> Tensor:
        ctx.shape, ctx.pool_backward = x.shape, backward
        return call(x)

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pool_backward(g, g.new_empty(1).expand(ctx.shape)), None, None


def avg_pool2d(
    razor: Keeper,
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``F.avg_pool2d``."""
    if not input.requires_grad or input.numel() == 0:
        return NotImplemented
    kernel = _pair(kernel_size)
    step = kernel if stride is None or stride == [] else _pair(stride)
    settings = (kernel, step, _pair(padding), ceil_mode, count_include_pad, divisor_override)
    return MeanPool.apply(
        input,
        lambda x: F.avg_pool2d(x, *settings),
        lambda g, x: torch.ops.aten.avg_pool2d_backward(g, x, *settings),
    )


def adaptive_avg_pool2d(razor: Keeper, input: Tensor, output_size: Any) -> Tensor:
    """``F.adaptive_avg_pool2d``."""
    if not input.requires_grad or input.numel() == 0:
        return NotImplemented
    return MeanPool.apply(
        input, lambda x: F.adaptive_avg_pool2d(x, output_size), torch.ops.aten._adaptive_avg_pool2d_backward
    )
