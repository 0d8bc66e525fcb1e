"""A linear layer with H LoRA heads, in the reset-less form of LTE (paper, Appendix A.2).

In training, chunk h of the batch meets head h:  ``y_h = W x_h + b + s (B_h A_h − B'_h A'_h) x_h``, where A', B' are
the factors at the last merge, whose product is in W already. Both products are one: with Ã = [A; A'] (2r×n) and
B̃ = [B, −B'] (m×2r), ``y_h = W x_h + b + s B̃_h (Ã_h x_h)``, batched over the heads.

In evaluation there are no chunks and one defined weight: ``W + s·mean_h(B_h A_h − B'_h A'_h)``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .config import LTEConfig


class LTELinear(nn.Linear):
    """A frozen ``nn.Linear`` and its heads; made by :func:`lte.inject`.

    Parameters and buffers, for W (m, n):

    - ``weight`` (m, n): the frozen master W, float32 at least; :func:`lte.merge` adds to it.
    - ``bias`` (m,): the layer's own, if it has one.
    - ``lora_A`` (H, r, n), ``lora_B`` (H, m, r): the heads. B begins at 0, so the layer's function is unchanged.
    - ``merged_A``, ``merged_B``: buffers of the same shapes, the factors at the last merge.

    The loss of a batch is the mean over its chunks, which gives a head 1/H of the gradient of its own chunk's mean
    loss. Here that factor is taken out: **each head's gradient is that of its own mean loss**, as if it trained
    alone, while shared parameters (embeddings, norms) get the gradient of the mean over the batch. This holds for
    losses that are means over equal chunks.
    """

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    merged_A: Tensor
    merged_B: Tensor

    def __init__(self, linear: nn.Linear, config: LTEConfig) -> None:
        nn.Module.__init__(self)  # the linear layer's own parameters are taken over, not made anew
        self.in_features, self.out_features = linear.in_features, linear.out_features
        master = linear.weight.detach()
        if master.dtype in (torch.bfloat16, torch.float16):
            master = master.float()  # merges add small deltas: in bfloat16 a tenth of their sum would be lost
        self.weight = nn.Parameter(master, requires_grad=False)
        self.bias = linear.bias
        self.heads, self.rank, self.scale = config.heads, config.rank, config.scale
        H, r, (m, n) = config.heads, config.rank, self.weight.shape
        gain = math.sqrt(m / n) if config.init == "paper" else math.sqrt(n / r)
        A = self.weight.new_empty(H, r, n)
        if not A.is_meta:
            for head in A:
                nn.init.orthogonal_(head, gain)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(self.weight.new_zeros(H, m, r))
        self.register_buffer("merged_A", A.detach().clone())
        self.register_buffer("merged_B", self.weight.new_zeros(H, m, r))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (N, …, n) -> (N, …, m)
        if not self.training:
            return F.linear(x, self.effective_weight(), self.bias)
        H = self.heads
        if x.shape[0] % H:
            raise ValueError(f"a batch of {x.shape[0]} cannot be cut into {H} equal chunks, one a head")
        factors: list[Tensor] = [self.lora_A, self.lora_B, self.merged_A, self.merged_B]
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            factors = [f.to(dtype) for f in factors]
        chunks = x.reshape(H, -1, x.shape[-1])  # (H, t, n): dim 0 of the batch is cut, in order
        y = HeadedLinear.apply(chunks, weight, bias, *factors, self.scale, float(H))  # (H, t, m)
        return y.view(*x.shape[:-1], self.out_features)

    def mean_delta(self) -> Tensor:
        """s·mean_h(B_h A_h − B'_h A'_h), (m, n): what is not merged yet, in the master's precision."""
        with torch.autocast(self.weight.device.type, enabled=False):  # the difference of two sums needs all digits
            now = _sum_of_products(self.lora_B, self.lora_A)
            return (self.scale / self.heads) * (now - _sum_of_products(self.merged_B, self.merged_A))

    def effective_weight(self) -> Tensor:
        """The weight that evaluation uses, (m, n): W plus the mean of all unmerged deltas."""
        return self.weight + self.mean_delta()

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + mean delta; A', B' ← A, B. The layer's evaluated function does not change; twice is once."""
        self.weight.add_(self.mean_delta())
        self.merged_A.copy_(self.lora_A)
        self.merged_B.copy_(self.lora_B)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}, rank={self.rank}, scale={self.scale:g}"


def _sum_of_products(B: Tensor, A: Tensor) -> Tensor:
    """Σ_h B_h A_h for B (H, m, r), A (H, r, n): one (m, H·r) by (H·r, n) product."""
    H, m, r = B.shape
    return B.transpose(0, 1).reshape(m, H * r) @ A.reshape(H * r, -1)


class HeadedLinear(torch.autograd.Function):
    """``y = x Wᵀ + b + s (x Ãᵀ) B̃ᵀ`` for x (H, t, n), with Ã = [A; A'], B̃ = [B, −B'] stacked over the heads.

    Saved for the backward pass: x, the factors, and u = x Aᵀ (H, t, r); nothing of the offset's half.
    With g = ∂L/∂y and v = s g B̃: dx = g W + v Ã; dA = c·v_Aᵀ x and dB = c·s gᵀ u, where v_A is the half of v that
    belongs to A, and c (``head_gradient``) undoes the mean over the chunks: see :class:`LTELinear`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        A0: Tensor,
        B0: Tensor,
        scale: float,
        head_gradient: float,
    ) -> Tensor:
        both_A = torch.cat([A, A0], dim=1)  # (H, 2r, n)
        both_B = torch.cat([B, -B0], dim=2)  # (H, m, 2r)
        u = x @ both_A.mT  # (H, t, 2r)
        y = torch.baddbmm(F.linear(x, weight, bias), u, both_B.mT, alpha=scale)  # (H, t, m)
        ctx.save_for_backward(x, weight, A, B, A0, B0, u[..., : A.shape[1]].contiguous())
        ctx.scale, ctx.head_gradient = scale, head_gradient
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, A0, B0, u = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dx = dweight = dbias = dA = dB = None
        r, c = A.shape[1], ctx.head_gradient
        if needs_x or needs_A:
            wanted_B = torch.cat([B, -B0], dim=2) if needs_x else B
            v = (g @ wanted_B).mul_(ctx.scale)  # (H, t, 2r), or (H, t, r) where only dA is wanted
            if needs_A:
                dA = (v[..., :r].mT @ x).mul_(c)  # (H, r, n)
            if needs_x:
                dx = torch.baddbmm(g @ weight, v, torch.cat([A, A0], dim=1))  # (H, t, n)
        if needs_B:
            dB = (g.mT @ u).mul_(c * ctx.scale)  # (H, m, r)
        if needs_weight:
            dweight = g.flatten(0, 1).T @ x.flatten(0, 1)  # (m, n)
        if needs_bias:
            dbias = g.sum((0, 1))  # (m,)
        return dx, dweight, dbias, dA, dB, None, None, None, None
