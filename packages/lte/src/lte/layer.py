"""A linear layer with H LoRA heads, in the reset-less form of LTE (paper, Appendix A.2).

In training, chunk h of the batch meets head h:  ``y_h = W x_h + b + s (B_h A_h − B'_h A'_h) x_h``, where A', B' are
the factors at the last merge, whose product is in W already. Both products are one: with Ã = [A; A'] (2r×n) and
B̃ = [B, −B'] (m×2r), ``y_h = W x_h + b + s B̃_h (Ã_h x_h)``, batched over the heads. With sparse merges head h has
W + s e_h in the place of W, where e_h is what it owes.

In sequential mode there are no chunks: ``y = W x + b + s·mean_h(B_h A_h − B'_h A'_h) x``, the heads side by side as one
LoRA of rank H·r.

In evaluation there is one defined weight: ``W + s·mean_h(B_h A_h − B'_h A'_h)``, or, with sparse merges, of what is
owed, too: ``W + s·mean_h(B_h A_h − B'_h A'_h + e_h)``.
"""

from collections.abc import Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .bases import join_float32, materialize
from .config import LTEConfig
from .headed import Headed
from .vectors import LTEVector


class LTELinear(Headed, nn.Linear):
    """A frozen ``nn.Linear`` and its heads; made by :func:`lte.inject`. Its tensors: see :class:`lte.headed.Headed`.

    The loss of a batch is the mean over its chunks, which gives a head 1/H of the gradient of its own chunk's mean
    loss. Here that factor is taken out: **each head's gradient is that of its own mean loss**, as if it trained
    alone, while shared parameters (embeddings, norms) get the gradient of the mean over the batch. This holds for
    losses that are means over equal chunks. In sequential mode the factor is the same, so that one learning rate
    means the same in both modes.
    """

    def __init__(
        self,
        linear: nn.Linear,
        config: LTEConfig,
        share: tuple[int, int] | None = None,
        frozen: Set[Tensor] = frozenset(),
    ) -> None:
        nn.Module.__init__(self)  # the linear layer's own parameters are taken over, not made anew
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.add_heads(linear.weight, config, share, config.base)
        self.bias = bias_of(linear, config, share, frozen)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (N, …, n) -> (N, …, m)
        x = self.in_plain_type(x)
        biases: Tensor | None = self.bias() if isinstance(self.bias, LTEVector) else None  # (H, m)
        bias: Tensor | None = self.bias if biases is None else None
        if not self.training:
            bias = bias if biases is None else biases[0]
            return F.linear(x, self.evaluation_weight().to(x.dtype), None if bias is None else bias.to(x.dtype))
        factors: list[Tensor | None] = [self.lora_A, self.lora_B, *self.offsets()]
        owed = None if self.sparse is None else self.feedback
        # with what is owed W goes in with all its digits: rounded first, it would swallow what is small
        weight: Tensor | None = self.weight if self.base == "float32" or owed is None else None
        full = weight if owed is not None else None
        # W and the factors stay float32 where the rest of a model was made bfloat16, or computes in it
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64  # which it leaves alone
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        x, weight, bias, *factors = (None if t is None else t.to(dtype) for t in (x, weight, bias, *factors))  # type: ignore[assignment]
        weight = weight if full is None else full
        scale = self.scale
        if self.config.mode == "sequential":
            factors, scale = (
                [_side_by_side(f, dim) for f, dim in zip(factors, (1, 2, 1, 2), strict=True)],
                scale / self.heads,
            )
        if x.dim() < 2 and self.config.mode == "parallel":
            raise ValueError(f"{self.path} needs (batch, …, {self.in_features}) to share out, got {tuple(x.shape)}")
        chunks = x.reshape(*self.cut(x), x.shape[-1])  # (H, t, n): dim 0 of the batch is cut, in order
        merged_scale = self.scale / self.total_heads
        y = HeadedLinear.apply(
            chunks, weight, bias, *factors, owed, scale, self.scale, float(self.heads), merged_scale, *self.kept()
        )
        if biases is not None:
            y = y + biases[:, None].to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)  # (H, t, m) -> (N, …, m)

    def evaluation_weight(self) -> Tensor:
        """The weight (m, n) that evaluation uses."""
        return self.effective_weight()


def bias_of(layer: nn.Linear | nn.Conv2d, config: LTEConfig, share: tuple[int, int] | None, frozen: Set[Tensor]) -> Any:
    """The layer's own bias, with heads where the configuration gives biases some and the model trains this one."""
    if layer.bias is None or "biases" not in config.vectors or layer.bias in frozen:
        return layer.bias
    return LTEVector(layer.bias, config, share)


def _side_by_side(factor: Tensor | None, dim: int) -> Tensor | None:
    """(H, r, n) -> (1, H·r, n) for dim 1, (H, m, r) -> (1, m, H·r) for dim 2."""
    return None if factor is None else torch.cat(factor.unbind(0), dim - 1)[None]


class HeadedLinear(torch.autograd.Function):
    """``y = x Wᵀ + b + s (x Ãᵀ) B̃ᵀ`` for x (H, t, n), with Ã = [A; A'], B̃ = [B, −B'] stacked over the heads. With what
    is owed, e (H, m, n), W + s e takes the place of W: a weight of each head's own, added up in W's precision and made
    again in the backward pass. Where all of x is one chunk (sequential mode), with the mean of e.

    Saved for the backward pass: x, the factors, and u = x Aᵀ (H, t, r); nothing of the offset's half. Of a 4-bit base
    (``weight`` None, ``kept`` as :func:`lte.bases.materialize` takes it) the codes: W is made again.
    With g = ∂L/∂y and v = s g B̃: dx = g W + v Ã; dA = c·v_Aᵀ x and dB = c·s gᵀ u, where v_A is the half of v that
    belongs to A, and c (``head_gradient``) undoes the mean over the chunks: see :class:`LTELinear`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        owed: Tensor | None,
        scale: float,
        owed_scale: float,
        head_gradient: float,
        merged_scale: float = 0.0,
        *kept: Tensor,
    ) -> Tensor:
        both_A, both_B = _with_offset(A, B, A0, B0)  # (H, 2r, n), (H, m, 2r); r where there is no offset
        u = x @ both_A.mT  # (H, t, 2r)
        W = _weight(x, weight, kept, (B.shape[1], A.shape[2]), merged_scale, owed, owed_scale)
        y = F.linear(x, W, bias) if owed is None else x @ W.mT
        y.baddbmm_(u, both_B.mT, alpha=scale)  # (H, t, m)
        if owed is not None and bias is not None:
            y += bias
        ctx.save_for_backward(x, weight, A, B, A0, B0, owed, u[..., : A.shape[1]].contiguous(), *kept)
        ctx.scale, ctx.owed_scale, ctx.head_gradient, ctx.merged_scale = scale, owed_scale, head_gradient, merged_scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, A0, B0, owed, u, *kept = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dx = dweight = dbias = dA = dB = None
        r, c = A.shape[1], ctx.head_gradient
        if needs_x or needs_A:
            both_A, both_B = _with_offset(A, B, A0, B0) if needs_x else (A, B)
            v = (g @ both_B).mul_(ctx.scale)  # (H, t, 2r), or (H, t, r) where only dA is wanted
            if needs_A:
                dA = (v[..., :r].mT @ x).mul_(c)  # (H, r, n)
            if needs_x:
                W = _weight(x, weight, kept, (B.shape[1], A.shape[2]), ctx.merged_scale, owed, ctx.owed_scale)
                dx = (g @ W).baddbmm_(v, both_A)  # (H, t, n)
        if needs_B:
            dB = (g.mT @ u).mul_(c * ctx.scale)  # (H, m, r)
        if needs_weight:
            dweight = g.flatten(0, 1).T @ x.flatten(0, 1)  # (m, n)
        if needs_bias:
            dbias = g.sum((0, 1))  # (m,)
        return dx, dweight, dbias, dA, dB, *([None] * (len(ctx.needs_input_grad) - 5))


def _with_offset(A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> tuple[Tensor, Tensor]:
    if A0 is None or B0 is None:
        return A, B
    return torch.cat([A, A0], dim=1), torch.cat([B, -B0], dim=2)


def _weight(
    x: Tensor, weight: Tensor | None, kept: tuple[Tensor, ...] | list[Tensor], shape: tuple[int, int], scale: float,
    owed: Tensor | None, owed_scale: float,
) -> Tensor:  # fmt: skip
    """W (m, n), or W + s e (H, m, n) where heads owe something, in x's precision."""
    if weight is not None:
        W = weight
    else:
        W = join_float32(*kept) if len(kept) == 2 else materialize(tuple(kept), shape, scale)
    if owed is not None:
        W = torch.add(W, owed if len(owed) == len(x) else owed.mean(0, keepdim=True), alpha=owed_scale)
    return W.to(x.dtype)
