"""GaLore with Adafactor as the inner optimizer (GaLore, Section 4.3; Shazeer and Stern, 2018).

With R² = R∘R + ε₁ and β̂₂(t) = 1 − t^(decay_rate), Algorithm 4 of Adafactor (arXiv:1804.04235) runs on the
compact gradient:

    r ← β̂₂ r + (1−β̂₂) mean_cols R²,   c ← β̂₂ c + (1−β̂₂) mean_rows R²,   V̂ = r cᵀ / mean(r)
    U = R / √V̂,   U ← U / max(1, RMS(U)/d),   W ← (1 − ηλ)W − P (η·α·U) Q

where η is the given rate, or by `relative_step` min(10⁻², 1/√t), times max(ε₂, RMS(W)) by `scale_parameter`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_vit import sharding
from galore_vit.galore import GaLore
from galore_vit.item import Item
from galore_vit.projection import Bases, apply_rotation, project_back, rotation
from galore_vit.settings import Refresh, is_number, is_rate, rate_of


class GaLoreAdafactor(GaLore):
    """Adafactor whose factored second moment describes each weight's compact gradient.

    Args:
        params: as for GaLoreAdamW.
        lr: learning rate η; None with `relative_step`.
        eps: (ε₁, added to the squared gradient; ε₂, the least RMS that scales a step).
        clip_threshold: d, the RMS above which an update is scaled down.
        decay_rate: exponent of β̂₂.
        beta1: decay of a first moment of the update; None keeps none.
        weight_decay: λ, decoupled.
        scale_parameter: scale η by the weight's RMS.
        relative_step: take η from the step count.
        warmup_init: with `relative_step`, begin at 10⁻⁶·t.
        refresh, paper, maximize: as for GaLoreAdamW; the arithmetic of this rule is the published one
            either way, and `paper` only fixes how bases are refreshed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        refresh: Refresh | None = None,
        paper: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1,
            "weight_decay": weight_decay, "scale_parameter": scale_parameter, "relative_step": relative_step,
            "warmup_init": warmup_init,
        }  # fmt: skip
        super().__init__(params, defaults, refresh=refresh, paper=paper, maximize=maximize)

    inner = "Adafactor"

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        lr, beta1 = group["lr"], group["beta1"]
        if group["relative_step"] and lr is not None:
            raise ValueError("relative_step sets the learning rate: leave lr out, or set relative_step=False")
        if not group["relative_step"] and not is_rate(lr):
            raise ValueError(
                f"lr must be a finite number of at least 0, or a tensor of one, when relative_step is False, not {lr!r}"
            )
        if group["warmup_init"] and not group["relative_step"]:
            raise ValueError("warmup_init needs relative_step=True")
        if beta1 is not None and not (is_number(beta1) and 0.0 <= beta1 < 1.0):
            raise ValueError(f"beta1 must lie in [0, 1) or be None, not {beta1!r}")
        clip, decay, shrink = (group[key] for key in ("clip_threshold", "decay_rate", "weight_decay"))
        numbers = all(map(is_number, (clip, decay, shrink)))
        if not (numbers and clip > 0.0 and decay < 0.0 and 0.0 <= shrink < math.inf):
            raise ValueError(
                "clip_threshold must be a number above 0, decay_rate one below 0, and weight_decay finite and at least "
                f"0, not {clip!r}, {decay!r} and {shrink!r}"
            )
        eps = group["eps"]
        two = isinstance(eps, tuple | list) and len(eps) == 2 and all(map(is_number, eps))
        if not (two and eps[0] > 0.0 and eps[1] >= 0.0):
            raise ValueError(f"eps must be two numbers, the first above 0 and the second at least 0, not {eps!r}")

    def _fresh_moments(
        self, p: Tensor, group: dict[str, Any], shape: tuple[int, ...], rows: bool, device: torch.device
    ) -> dict[str, Tensor]:
        shapes = {"exp_avg": shape} if group["beta1"] is not None else {}
        if len(shape) >= 2:
            shapes |= {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        else:
            shapes["exp_avg_sq"] = shape
        return {  # the means of columns have no rows, and every process has them whole
            k: sharding.zeros(p, s, rows=rows and k != "exp_avg_sq_col", dtype=torch.float32, device=device)
            for k, s in shapes.items()
        }

    def _rotate_moments(self, item: Item, old: Bases, new: Bases) -> None:
        """Turns the factors by the squared rotation, each on its own side; their sum stays near."""
        state, C = self.state[item.param], rotation(old, new)
        if len(C) > 2:
            for key, lost in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
                kept = [c for i, c in enumerate(C) if i != len(C) + lost]
                kept += [None] * (3 - len(kept))  # a tuple of three is a tensor's
                shape = state[key].shape
                turned = apply_rotation(state[key].reshape(*shape, *[1] * (3 - len(shape))), tuple(kept), squared=True)
                state[key].copy_(turned.reshape(shape))
        else:
            left, right = C
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            if left is not None:
                row.copy_((left.float().square() @ row.unsqueeze(-1)).squeeze(-1))
            if right is not None:
                col.copy_((col.unsqueeze(-2) @ right.float().square()).squeeze(-2))
        if "exp_avg" in state:
            turn = tuple(None if c is None else c.float() for c in C)
            state["exp_avg"].copy_(apply_rotation(state["exp_avg"], turn))

    def _update(self, group: dict[str, Any], items: list[Item]) -> None:
        for item in items:
            p, state, R, t = item.param, item.state, item.grad.float(), item.step
            W = p if p.dtype in (torch.float32, torch.float64) else p.float()
            lr = _rate(group, t, _rms(W))
            beta2 = 1.0 - math.pow(t, group["decay_rate"])
            U = sharding.placed_as(_normalised(R, state, beta2, group["eps"][0]), R)
            U.div_((_rms(U) / group["clip_threshold"]).clamp_(min=1.0)).mul_(lr)
            if group["beta1"] is not None:
                U = state["exp_avg"].mul_(group["beta1"]).add_(U, alpha=1 - group["beta1"])
            if item.layout is not None:
                bases = tuple(None if b is None else b.float() for b in self.bases(p))
                U = (project_back(U, bases) * group["scale"]).reshape(p.shape)
            U = sharding.placed_as(U, W)
            if group["weight_decay"] != 0:
                W.add_(W * (-group["weight_decay"] * lr))
            W.add_(-U)
            if W is not p:
                p.copy_(W)


def _normalised(R: Tensor, state: dict[str, Tensor], beta2: float, eps: float) -> Tensor:
    """U = R / √V̂ after moving the second moment (factored from 2-D on) by R²; R (…, a, b) or (a,)."""
    squared = R.square() + eps
    if R.ndim < 2:
        return state["exp_avg_sq"].mul_(beta2).add_(squared, alpha=1.0 - beta2).rsqrt().mul_(R)
    row = state["exp_avg_sq_row"].mul_(beta2).add_(_mean(squared, -1), alpha=1.0 - beta2)  # (…, a)
    col = state["exp_avg_sq_col"].mul_(beta2).add_(_mean(squared, -2), alpha=1.0 - beta2)  # (…, b)
    over_row = (row / _mean(row, -1).unsqueeze(-1)).rsqrt_().unsqueeze(-1)
    return torch.mul(over_row, col.unsqueeze(-2).rsqrt()).mul_(R)


def _rate(group: dict[str, Any], t: int, rms: Tensor) -> Tensor | float:
    """η of this step."""
    lr = rate_of(group)
    if group["relative_step"]:
        lr = min(1e-6 * t if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(t))
    return lr * rms.clamp(min=group["eps"][1]) if group["scale_parameter"] else lr


def _rms(x: Tensor) -> Tensor:
    return sharding.gathered(x.norm(2)) / x.numel() ** 0.5


def _mean(x: Tensor, dim: int) -> Tensor:
    """The mean along a dimension; that of a sharded one needs every process's sum."""
    return sharding.reduced(x.sum(dim)) / x.shape[dim]
