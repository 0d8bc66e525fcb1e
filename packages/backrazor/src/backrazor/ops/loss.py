"""The loss of language models: a linear layer and the cross-entropy of its output as one operation, logits not kept.

With hidden states x (N, K), weight W (V, K), bias b, targets t (N,), label smoothing ε and z = x Wᵀ + b:

    nll_n = lse_n − z_n[t_n],  lse_n = log Σ_v exp z_n[v];  loss = Σ_n w_n ((1 − ε) nll_n + ε mean_v (lse_n − z_n[v]))
    dz_n = w_n (softmax(z_n) − (1 − ε) onehot(t_n) − ε / V),  dx = dz W,  dW = dzᵀ x,  db = Σ_n dz_n

w_n is the reduction's weight, 0 for ignored targets. Kept are x, lse and t; z is made in chunks of rows, in the forward
pass and again in the backward pass. Nothing is approximated: the loss is computed by PyTorch's own kernels, row by row,
and reduced by its own reduction; the gradients differ by the order of a sum over chunks.

``torch.nn.functional.linear_cross_entropy`` in chunks (torch 2.15) makes dx and dW in the forward pass instead, and so
holds a second tensor of W's size. As in PyTorch, x is needed in full: it is not pruned.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..function import Function
from ..keeper import Keeper

CHUNK = 1 << 24
"""Logits that exist at the same time: 64 MiB in float32."""
IGNORED = -100


@dataclass(frozen=True)
class Head:
    """How logits are computed: the types of the product and of the logits that the loss sees, and its settings."""

    product: torch.dtype
    logits: torch.dtype
    reduction: str
    ignore_index: int
    label_smoothing: float


class LinearCrossEntropy(Function):
    """The loss of targets t (N,), or (N, T) for the loss of x (N, T, K) as PyTorch computes it on (N, V, T)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Tensor:
        ctx.head, ctx.x_like = head, (x.shape, x.dtype)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        with torch.autocast(x.device.type, enabled=False):
            rows, flat = x.reshape(-1, x.shape[-1]), target.reshape(-1)
            ignored = flat == head.ignore_index
            at = flat.masked_fill(ignored, 0).unsqueeze(1)
            log_p = rows.new_empty((len(rows), 1), dtype=head.logits)  # of the target
            half = head.logits.itemsize == 2
            lse = torch.empty_like(log_p, dtype=torch.promote_types(head.logits, torch.float32))
            total = torch.empty_like(log_p) if head.label_smoothing else None
            product = _Product(weight, bias, head, rows)
            for part in _parts(len(rows), len(weight)):
                z = product(part)
                logs = torch.log_softmax(z, -1)
                torch.gather(logs, 1, at[part], out=log_p[part])
                if half:
                    torch.logsumexp(z.float(), -1, keepdim=True, out=lse[part])
                else:
                    torch.sub(z.gather(1, at[part]), log_p[part], out=lse[part])
                if total is not None:
                    torch.sum(logs, -1, keepdim=True, out=total[part])
                del z, logs
            ctx.save_for_backward(x, weight, bias, flat, lse)
            seen = log_p if target.dim() == 1 else log_p.view(target.shape).unsqueeze(1)
            zero = torch.where(ignored, IGNORED, 0).view(target.shape)
            loss = F.nll_loss(seen, zero, ignore_index=IGNORED, reduction=head.reduction)
            if total is not None:
                smooth = (-total.view(target.shape)).masked_fill_(ignored.view(target.shape), 0.0)
                if head.reduction == "mean":
                    smooth = smooth.sum() / (~ignored).sum()
                elif head.reduction == "sum":
                    smooth = smooth.sum()
                ratio = head.label_smoothing / len(weight)
                loss = (1 - head.label_smoothing) * loss + smooth * ratio
        return loss

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, lse = ctx.saved_tensors
        head, (shape, dtype) = ctx.head, ctx.x_like
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = x.reshape(-1, shape[-1])
        ignored = target == head.ignore_index
        at = target.masked_fill(ignored, 0).unsqueeze(1)
        scale = g.reshape(-1) if head.reduction == "none" else g.expand(len(rows))
        if head.reduction == "mean":
            scale = scale / (~ignored).sum()
        scale = scale.masked_fill(ignored, 0.0).unsqueeze(1)  # (N, 1)
        wide = torch.promote_types(head.product, torch.float32)
        scale = scale.to(wide)
        dx = torch.empty_like(rows, dtype=head.product) if needs_x else None
        dweight = rows.new_zeros(weight.shape, dtype=wide) if needs_weight else None
        dbias = rows.new_zeros(len(weight), dtype=wide) if needs_bias else None
        product = _Product(weight, bias, head, rows)
        for part in _parts(len(rows), len(weight)):
            dz = product(part).to(lse.dtype).sub_(lse[part]).exp_()  # softmax(z), (n, V)
            dz.scatter_add_(1, at[part], dz.new_full((), head.label_smoothing - 1).expand(at[part].shape))
            if head.label_smoothing:
                dz.sub_(head.label_smoothing / len(weight))
            by_row = scale[part]
            if dbias is not None:
                dbias += (by_row.to(dz.dtype).T @ dz).view(-1)
            dz = dz.to(head.product)
            if dx is not None:
                torch.mm(dz, product.weight, out=dx[part]).mul_(by_row)
            if dweight is not None:
                scaled = (product.rows(part) * by_row).to(head.product)
                if wide == head.product:
                    dweight.addmm_(dz.T, scaled)
                else:
                    dweight += dz.T @ scaled
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            dx.view(shape).to(dtype) if dx is not None else None,
            dweight.to(weight_dtype) if dweight is not None else None,
            dbias.to(bias_dtype) if dbias is not None else None,
            None,
            None,
        )


class _Product:
    """Logits of a part of the rows, as the loss sees them, in a new tensor or in one that is used again."""

    def __init__(self, weight: Tensor, bias: Tensor | None, head: Head, rows: Tensor) -> None:
        self.weight = weight.detach().to(head.product)
        self.bias = bias.detach().to(head.product) if bias is not None else None
        self.head, self._rows = head, rows.detach()
        self._buffer: Tensor | None = None

    def rows(self, part: slice) -> Tensor:
        return self._rows[part].to(self.head.product)

    def __call__(self, part: slice) -> Tensor:
        x = self.rows(part)
        if self._buffer is None or len(self._buffer) < len(x):
            self._buffer = x.new_empty((len(x), len(self.weight)))
        out = self._buffer[: len(x)]
        if self.bias is None:
            torch.mm(x, self.weight.T, out=out)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=out)
        return out.to(self.head.logits)


def _parts(rows: int, classes: int) -> list[slice]:
    """Slices of rows of nearly the same length: a short last one would be computed by another kernel."""
    count = -(-rows * classes // CHUNK)
    ends = [i * rows // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends) if a < b]


def loss_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: torch.dtype,
    logits: torch.dtype,
    target: Tensor,
    *,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Any:
    """The loss of x (N, K) and t (N,), or x (N, T, K) and t (N, T); NotImplemented where PyTorch has to answer."""
    known = reduction in ("none", "mean", "sum") and 0.0 <= label_smoothing <= 1.0
    if not known or target.dtype != torch.long or target.shape != x.shape[:-1] or not target.numel():
        return NotImplemented
    if torch.is_autocast_enabled(x.device.type):  # it may ask for float32 here: an empty call tells
        logits = F.cross_entropy(x.new_empty((1, 2), dtype=logits), target.new_zeros(1)).dtype
    head = Head(product, logits, reduction, ignore_index, float(label_smoothing))
    return LinearCrossEntropy.apply(x, weight, bias, target, head)


def linear_cross_entropy(
    razor: Keeper,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Any:
    """``F.linear_cross_entropy`` (torch 2.15), without chunks of its own."""
    given = [t for t in (input, linear_weight, linear_bias) if t is not None]
    if options is not None or weight is not None or linear_weight.dim() != 2 or input.dim() != 2:
        return NotImplemented
    if not any(t.requires_grad for t in given) or not razor.fuses_loss or not input.is_floating_point():
        return NotImplemented
    product = product_type(input)
    ignore = IGNORED if ignore_index is None else ignore_index
    settings: dict[str, Any] = {"ignore_index": ignore, "label_smoothing": label_smoothing, "reduction": reduction}
    return loss_of(input, linear_weight, linear_bias, product, product, target, **settings)


def product_type(x: Tensor) -> torch.dtype:
    """The type of ``F.linear`` of ``x``: autocast's, or its own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
