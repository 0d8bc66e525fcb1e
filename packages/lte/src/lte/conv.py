"""A convolution with H heads, by the paper's rule: A is a convolution like the layer's own with r output channels, B a
1×1 convolution from r to the layer's channels.

With W (m, c, kh, kw) seen as a matrix (m, n), n = c·kh·kw, that is LTE's linear layer on the patches: D_h = B_h A_h,
with A_h (r, c·kh·kw) and B_h (m, r), and everything else (offsets, merges, resets) is a linear layer's.
"""

from collections.abc import Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .chunks import ScaleGradient
from .config import LTEConfig
from .headed import Headed
from .layer import bias_of
from .vectors import LTEVector


class LTEConv2d(Headed, nn.Conv2d):
    """A frozen ``nn.Conv2d`` and its heads; made by :func:`lte.inject`. Gradients as in :class:`lte.LTELinear`."""

    def __init__(
        self,
        conv: nn.Conv2d,
        config: LTEConfig,
        share: tuple[int, int] | None = None,
        frozen: Set[Tensor] = frozenset(),
    ) -> None:
        nn.Module.__init__(self)
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(
                f"a convolution with groups={conv.groups} and padding_mode={conv.padding_mode!r} cannot have heads: "
                "add it to exclude"
            )
        for name in nn.Conv2d.__constants__:
            setattr(self, name, getattr(conv, name))
        self.add_heads(conv.weight, config, share, "float32")
        self.bias = bias_of(conv, config, share, frozen)
        self.train(conv.training)

    def in_own_shape(self, matrix: Tensor) -> Tensor:
        return matrix.view(len(matrix), self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, c, h, w) -> (N, m, h', w')
        x = self.in_plain_type(x)
        biases = self.bias() if isinstance(self.bias, LTEVector) else None  # (H, m)
        bias: Tensor | None = self.bias if biases is None else None if self.training else biases[0]
        bias = None if bias is None else bias.to(x.dtype)
        if not self.training:
            return self._convolved(x, self.effective_weight(), bias)
        if x.dim() != 4:
            raise ValueError(f"{self.path} needs (batch, channels, height, width) to share out, got {tuple(x.shape)}")
        A, B = (ScaleGradient.apply(p, float(self.heads)).to(x.dtype) for p in (self.lora_A, self.lora_B))
        A0, B0 = self.offsets()
        if A0 is not None and B0 is not None:
            A, B = torch.cat([A, A0.to(A)], 1), torch.cat([B, -B0.to(B)], 2)  # (H, ρ, n), (H, m, ρ)
        scale = self.scale
        if self.config.mode == "sequential":
            A, B, scale = A.flatten(0, 1)[None], B.transpose(0, 1).flatten(1)[None], scale / self.heads
        chunks, rho = self.cut(x)[0], A.shape[1]
        rows = len(x) // chunks
        grouped = x.view(chunks, rows, *x.shape[1:]).transpose(0, 1).flatten(1, 2)  # (rows, H·c, h, w)
        kernels = A.reshape(chunks * rho, self.in_channels, *self.kernel_size)
        if self.sparse is None:
            y = self._convolved(x, self.weight, bias)
        else:  # W + s e is a weight of each chunk's own, which is made again in the backward pass
            y = checkpoint(self._with_owed, grouped, bias, chunks, use_reentrant=False, preserve_rng_state=False)
            y = y.unflatten(1, (chunks, -1)).transpose(0, 1).flatten(0, 1)  # (rows, H·m, h', w') -> (N, m, h', w')
        u = self._convolved(grouped, kernels, None, chunks)
        u = u.view(rows, chunks, rho, -1)  # (rows, H, ρ, h'·w')
        delta = (B.to(u.dtype) @ u).transpose(0, 1).reshape(y.shape)  # (rows, H, m, h'·w') -> (N, m, h', w')
        y = torch.add(y, delta, alpha=scale)
        if biases is not None:
            y = y + biases.repeat_interleave(rows, 0)[..., None, None].to(y.dtype)  # (N, m, 1, 1)
        return y

    def _with_owed(self, grouped: Tensor, bias: Tensor | None, chunks: int) -> Tensor:
        owed = self.feedback if chunks == self.heads else self.feedback.mean(0, keepdim=True)
        own = torch.add(self.weight, owed.view(chunks, *self.weight.shape), alpha=self.scale).flatten(0, 1)
        return self._convolved(grouped, own, None if bias is None else bias.repeat(chunks), chunks)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        return F.conv2d(x, weight.to(x.dtype), bias, self.stride, self.padding, self.dilation, groups)
