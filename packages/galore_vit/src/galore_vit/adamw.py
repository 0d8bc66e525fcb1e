"""GaLore with Adam as the inner optimizer.

    M ← β₁M + (1−β₁)R,   V ← β₂V + (1−β₂)R²,   N = M̂ / (√V̂ + ε)          (GaLore, Algorithm 2)
    W ← (1 − ηλ)W − η·α·P N Q

M̂ and V̂ are bias-corrected; λ is decoupled weight decay, of the whole weight and without α. The published
code instead divides by √V + ε *before* the bias correction and decays after the update: `paper=True` does
that, step for step.

Rotation of the moments at a refresh (Robert et al., "LDAdam", 2024, arXiv:2410.16103): with C = Q_old Q_newᵀ,

    M̂ ← M̂C,    V̂ ← |(V̂ − M̂²)(C∘C) + (M̂C)²|

Residual (Chen et al., "Fira", 2024, arXiv:2410.01623): G − PRQ, which GaLore drops, is added with each row
(or column) scaled by ‖N‖ / ‖R‖ there, and its norm may grow by 1 % a step at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_vit import sharding
from galore_vit.counters import count
from galore_vit.galore import GaLore
from galore_vit.growth import limited_growth
from galore_vit.item import Item
from galore_vit.projection import (
    Bases,
    Layout,
    add_projected_back,
    apply_rotation,
    project_back,
    rotation,
)
from galore_vit.settings import Refresh, is_number, is_rate, rate_of

MOMENTS = ("exp_avg", "exp_avg_sq")
RESIDUAL_GROWTH = 1.01
"""Fira's norm-growth limit γ."""
FUSED_NUMBERS = 2**18
"""Numbers of compact gradients handed to one call of the fused kernel, about."""


class GaLoreAdamW(GaLore):
    """AdamW whose moments live in each weight's gradient subspace.

    Args:
        params: parameters, or groups; a group with `rank` (and `update_proj_gap`, `scale`, `proj_type`,
            `split`) is projected. `galore_vit.param_groups(model, rank)` makes them.
        lr: learning rate η, or a tensor of no dimensions that holds it; projected weights move by η·scale.
        betas: β₁ and β₂.
        eps: ε; 1e-8, or the published code's 1e-6 with `paper=True`.
        weight_decay: λ, decoupled.
        refresh: how bases are replaced (`Refresh()` where None).
        residual: add Fira's scaled residual.
        paper: reproduce the arithmetic of the published code.
        correct_bias: False leaves M and V without bias correction (as BERT's original optimizer did).
        maximize: ascend.
        foreach: run the moments of a group as multi-tensor operations, which costs the temporaries of
            all at once; None: on accelerators, unless fused.
        fused: run them as torch's fused Adam kernel; None: on the CPU, unless foreach.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        refresh: Refresh | None = None,
        residual: bool = False,
        paper: bool = False,
        correct_bias: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        check_kernels(foreach, fused, correct_bias)
        if paper and fused:
            raise ValueError("the fused kernel has not the published arithmetic: leave out fused or paper")
        if paper and residual:
            raise ValueError("the residual is not part of the published GaLore: leave out residual or paper")
        if eps is None:
            eps = 1e-6 if paper else 1e-8
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "residual": residual,
            "foreach": foreach, "fused": fused, "correct_bias": correct_bias,
        }  # fmt: skip
        super().__init__(params, defaults, refresh=refresh, paper=paper, maximize=maximize)

    inner = "AdamW"
    later = frozenset({"correct_bias"})

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_adam(group)

    def _fresh_moments(
        self, p: Tensor, group: dict[str, Any], shape: tuple[int, ...], rows: bool, device: torch.device
    ) -> dict[str, Tensor]:
        dtype = moment_dtype(p)
        moments = {k: sharding.zeros(p, shape, rows=rows, dtype=dtype, device=device) for k in MOMENTS}
        if group["residual"]:
            sharding.refuse(p, "a weight with the residual", "set residual=False")
            moments["residual_norm"] = torch.zeros((), dtype=torch.float32, device=device)
        return moments

    def _moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """(M, V), to be changed in place and then handed to `_keep_moments`."""
        return self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]

    def _keep_moments(self, p: Tensor, M: Tensor, V: Tensor) -> None:
        """Writes M and V back; here they are the state itself."""

    def _rotate_moments(self, item: Item, old: Bases, new: Bases) -> None:
        M, V = self._moments(item.param)
        beta1, beta2 = item.group["betas"]
        step = count(item.state["step"])
        c1, c2 = 1 - beta1**step, 1 - beta2**step
        C = tuple(None if c is None else c.to(M.dtype) for c in rotation(old, new))
        m_hat, v_hat = M / c1, V / c2
        turned = apply_rotation(m_hat, C)
        variance = apply_rotation(v_hat - m_hat.square(), C, squared=True)
        M.copy_(turned * c1)
        V.copy_((variance + turned.square()).abs_() * c2)
        self._keep_moments(item.param, M, V)

    def _update(self, group: dict[str, Any], items: list[Item]) -> None:
        for item in items:
            if item.param.dtype == torch.float16:
                item.grad = item.grad.float()
        scratch: Tensor | None = None
        for batch, fused in self._batches(group, items):
            moments = [self._moments(i.param) for i in batch]
            R, M, V = [i.grad for i in batch], [m for m, _ in moments], [v for _, v in moments]
            counters = [i.state["step"] for i in batch]  # raised already
            if fused and batch[0].layout is None and batch[0].param.dtype == R[0].dtype:
                params = [i.param for i in batch]
                _fused_adam(params, R, M, V, counters, group, rate_of(group), group["weight_decay"])
                continue
            if fused:
                # One piece of memory for every batch's N: fresh pages would cost more than the arithmetic.
                sizes = [r.numel() for r in R]
                if scratch is None or scratch.numel() < sum(sizes) or scratch.dtype != R[0].dtype:
                    scratch = R[0].new_empty(sum(sizes))
                used = scratch[: sum(sizes)].zero_()
                N = [n.view(r.shape) for n, r in zip(used.split(sizes), R, strict=True)]
                _fused_adam(N, R, M, V, counters, group, -1.0, 0.0)  # a step of size −1 from zero
            else:
                N = _adam(R, M, V, [i.step for i in batch], group)
            for item, n, (m, v) in zip(batch, N, moments, strict=True):
                self._keep_moments(item.param, m, v)
                self._move_as_published(item, n) if group["paper"] else self._move(item, n)

    def _batches(self, group: dict[str, Any], items: list[Item]) -> list[tuple[list[Item], bool]]:
        """(items for one multi-tensor call, whether by the fused kernel): alike ones, few if projected."""
        foreach, fused = group["foreach"], group["fused"]
        batches: dict[Any, tuple[list[Item], bool]] = {}
        numbers = 0
        for i, item in enumerate(items):
            p, plain = item.param, item.layout is None
            device = p.device
            as_kernel = not (foreach or group["paper"]) and group["correct_bias"]
            one_kernel = fused if fused is not None else device.type == "cpu" and as_kernel
            # The kernel takes numbers in the order of memory, where tensors of other strides would be mixed up.
            dense = item.grad.is_contiguous() and (not plain or p.is_contiguous())
            one_kernel = one_kernel and dense and not item.record.sharded
            together = foreach if foreach is not None else device.type == "cuda"
            # DTensors go one by one through plain operations, which reduce and redistribute where they must.
            if item.record.sharded or not (one_kernel or together):
                key: Any = i
            elif (plain and p.dtype == item.grad.dtype) or not one_kernel:
                key = (device, p.dtype, plain, one_kernel)
            else:  # N lives beside the moments: few weights at a time bound its memory
                numbers += item.grad.numel()
                key = (device, p.dtype, numbers // FUSED_NUMBERS)
            batches.setdefault(key, ([], one_kernel))[0].append(item)
        return list(batches.values())

    def _move(self, item: Item, N: Tensor) -> None:
        """W ← (1 − ηλ)W − η·α·(P N Q + residual)."""
        group, p, layout = item.group, item.param, item.layout
        N = N.to(p.dtype)
        lr = rate_of(group)
        decay = 1 - lr * group["weight_decay"]
        if layout is None:
            if decay != 1:
                p.mul_(decay)
            p.add_(N, alpha=-lr)
            return
        bases, alpha = self.bases(p), -lr * group["scale"]
        W = layout.matrices(p)
        add_projected_back(W, N, bases, beta=decay, alpha=alpha)
        if item.full is not None:
            assert isinstance(layout, Layout)
            W.add_(self._residual(item, item.full, N, layout, bases), alpha=alpha)
        if not p.is_contiguous():  # then W may be a copy
            p.copy_(W.view(p.shape))

    def _move_as_published(self, item: Item, N: Tensor) -> None:
        """The published code's last lines: bias correction in the step size, decay after the update."""
        group, p, layout = item.group, item.param, item.layout
        (beta1, beta2), lr, step = group["betas"], rate_of(group), item.step
        N = N.to(p.dtype)
        if layout is not None:
            N = (project_back(N, self.bases(p)) * group["scale"]).reshape(p.shape)
        corrected = math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step) if group["correct_bias"] else 1.0
        p.add_(N, alpha=-lr * corrected)
        if group["weight_decay"] > 0.0:
            p.add_(p, alpha=-lr * group["weight_decay"])

    def _residual(self, item: Item, G: Tensor, N: Tensor, layout: Layout, bases: Bases) -> Tensor:
        """Fira's φ(G − PRQ), limited in growth; G (…, m, n)."""
        dim: tuple[int, ...] = (-2, -1) if layout.left and layout.right else ((-2,) if layout.left else (-1,))
        of_R = torch.linalg.vector_norm(item.grad, dim=dim, keepdim=True)
        factor = torch.linalg.vector_norm(N, dim=dim, keepdim=True) / (of_R + 1e-8)
        residual = (G - project_back(item.grad.to(G.dtype), bases)) * factor
        norm = sharding.gathered(torch.linalg.vector_norm(residual)).float()
        shrunk = limited_growth(norm, item.state["residual_norm"], of_R, RESIDUAL_GROWTH)
        return residual * shrunk.to(residual.dtype)


def moment_dtype(p: Tensor) -> torch.dtype:
    """The weight's dtype, but float32 for float16: the square of a gradient below 2.4e-4 is 0 there."""
    return torch.float32 if p.dtype == torch.float16 else p.dtype


def check_kernels(foreach: bool | None, fused: bool | None, correct_bias: bool) -> None:
    """Raises ValueError where no kernel does what is asked for."""
    if foreach and fused:
        raise ValueError("foreach and fused exclude each other: set one of them")
    if fused and not correct_bias:
        raise ValueError("the fused kernel corrects the bias: leave out fused, or set correct_bias=True")


def check_adam(group: dict[str, Any]) -> None:
    """Raises ValueError where Adam's numbers are outside their range."""
    for key in ("eps", "weight_decay"):
        if not is_number(group[key]) and not isinstance(group[key], Tensor):
            raise ValueError(f"{key} must be a number, not {group[key]!r}")
    try:
        beta1, beta2 = group["betas"]
        in_range = 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0
    except (TypeError, ValueError):
        raise ValueError(f"betas must be two numbers in [0, 1), not {group['betas']!r}") from None
    if not is_rate(group["lr"]):
        raise ValueError(f"lr must be a finite number of at least 0, or a tensor of one, not {group['lr']!r}")
    if not in_range:
        raise ValueError(f"betas must lie in [0, 1), not {group['betas']!r}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"eps must be at least 0, not {group['eps']!r}")
    if not 0.0 <= group["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, not {group['weight_decay']!r}")


def _fused_adam(
    W: list[Tensor], R: list[Tensor], M: list[Tensor], V: list[Tensor], steps: list[Tensor],
    group: dict[str, Any], lr: float, weight_decay: float,
) -> None:  # fmt: skip
    """W ← (1 − lr·λ)W − lr·N, with M and V moved by R in place, by torch's kernel."""
    beta1, beta2 = group["betas"]
    if R[0].device.type != "cpu":
        steps = list(torch.stack(steps).to(R[0].device).unbind())
    # what torch.optim.AdamW(fused=True) calls once it has raised its counters
    torch._fused_adamw_(
        W, R, M, V, [], steps, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
        lr=lr, weight_decay=weight_decay, eps=group["eps"],
    )  # fmt: skip


def _adam(R: list[Tensor], M: list[Tensor], V: list[Tensor], steps: list[int], group: dict[str, Any]) -> list[Tensor]:
    """Moves M and V by R in place and returns N; with `paper`, N lacks its bias correction as published.

    Without `correct_bias` it lacks it for good."""
    beta1, beta2 = group["betas"]
    correct = group["correct_bias"] and not group["paper"]
    if group["paper"]:
        torch._foreach_mul_(M, beta1)
        torch._foreach_add_(M, R, alpha=1.0 - beta1)
    else:
        torch._foreach_lerp_(M, R, 1 - beta1)
    torch._foreach_mul_(V, beta2)
    torch._foreach_addcmul_(V, R, R, value=1.0 - beta2)
    denominator = torch._foreach_sqrt(V)
    if correct:
        torch._foreach_div_(denominator, [math.sqrt(1 - beta2**t) for t in steps])
    torch._foreach_add_(denominator, group["eps"])
    N = torch._foreach_div(M, denominator)
    if correct:
        torch._foreach_div_(N, [1 - beta1**t for t in steps])
    return list(N)
