"""Gradients scaled channel by channel, from Adam's moments of the projected gradient (APOLLO).

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (2024, arXiv:2412.05270). The weight moves by its whole
gradient G (m×n); what the moments of R = PᵀG (r×n) say is how far each of its channels goes:

    N = M̂ / (√V̂ + ε)             of R, as in galore_vit.adamw
    s_j = ‖N_j‖ / ‖R_j‖           channel j: a column of PᵀG, a row of GQᵀ; or one number for the whole matrix
    W ← (1 − ηλ)W − η·α·G diag(s)

α is the group's `scale`, as it stands. Norms: with Adam's whole moments channel j would move by about √m. An
orthonormal P that is random to G keeps ‖R_j‖ ≈ √(r/m)‖G_j‖ while ‖N_j‖ ≈ √r, so that s_j‖G_j‖ ≈ √m too: **α = 1 is
about AdamW's step**, whatever the rank, from 8 or so on; with fewer dimensions some channels' projections come near 0,
and their steps are longer. With bases from the gradient R holds most of G, and the step is nearer to √r.

The growth limit is Fira's (arXiv:2410.01623): the norm of a weight's update grows by 1 % a step at most. It is taken as
if every channel had moved (:mod:`galore_vit.growth`), so that a batch of few tokens, which moves few rows of an
embedding, does not hold the next ones back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from galore_vit import sharding
from galore_vit.adamw import RESIDUAL_GROWTH, GaLoreAdamW, check_kernels
from galore_vit.galore import GaLore
from galore_vit.growth import limited_growth
from galore_vit.item import Item
from galore_vit.projection import Layout
from galore_vit.settings import Refresh, is_number, rate_of
from galore_vit.tensors import TensorLayout

Scaling = Literal["channel", "tensor"]


class GaLoreScaled(GaLoreAdamW):
    """AdamW's channel-wise step lengths, from moments of the projected gradient, on the whole gradient.

    State of an m×n weight with m ≤ n: 2nr + 1 numbers with random bases, which are drawn again at every step from a
    number that is kept; mr + 2nr + 1 with bases from the gradient. Rank 1 is APOLLO-Mini's form: 2n + 1.

    Args:
        params: parameters, or groups, as for GaLoreAdamW; `scale` in a group is α.
        lr: learning rate η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, decoupled.
        scaling: "channel" gives each channel its own factor, "tensor" one to the matrix; None: by channel, and at
            rank 1, where a channel's projection is a single number that may be near 0, by tensor, as published.
        growth_limit: how much the norm of a weight's update may grow in a step; None: as much as it does.
        refresh: how bases are replaced; `Refresh(method="random")` where None.
        correct_bias, maximize, foreach, fused: as for GaLoreAdamW.

    Raises:
        ValueError: where a setting is outside its range, or a group is projected on both sides (`full`), which leaves
            no channel whole, and scaled by channel.
    """

    draws = True
    whole_gradients = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scaling: Scaling | None = None,
        growth_limit: float | None = RESIDUAL_GROWTH,
        refresh: Refresh | None = None,
        correct_bias: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        check_kernels(foreach, fused, correct_bias)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "residual": False, "scaling": scaling,
            "growth_limit": growth_limit, "foreach": foreach, "fused": fused, "correct_bias": correct_bias,
        }  # fmt: skip
        refresh = refresh or Refresh(method="random")
        GaLore.__init__(self, params, defaults, refresh=refresh, paper=False, maximize=maximize)

    later = frozenset()

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        if group["residual"]:
            raise ValueError("GaLoreScaled moves weights by their whole gradients, which leave no residual: drop it")
        if group["scaling"] not in (None, "channel", "tensor"):
            raise ValueError(f"scaling must be 'channel', 'tensor' or None, not {group['scaling']!r}")
        limit = group["growth_limit"]
        if limit is not None and not (is_number(limit) and 1.0 < limit < math.inf):
            raise ValueError(f"growth_limit must be a number above 1 or None, not {limit!r}")
        if "rank" not in group:
            return
        if group["dim"] > 2:
            raise ValueError("GaLoreScaled scales matrices: leave dim out, and a tensor is projected as out × rest")
        if group["proj_type"] == "full" and scaling_of(group) == "channel":
            raise ValueError(
                "proj_type 'full' projects both sides and leaves no channel whole: take 'std', or scaling 'tensor'"
            )

    def _fresh_state(
        self, p: Tensor, group: dict[str, Any], layout: Layout | TensorLayout | None, device: torch.device
    ) -> dict[str, Tensor]:
        state = super()._fresh_state(p, group, layout, device)
        if layout is not None and group["growth_limit"] is not None:
            state["update_norm"] = torch.zeros((), dtype=torch.float32, device=device)
        return state

    def _move(self, item: Item, N: Tensor) -> None:
        """W ← (1 − ηλ)W − η·α·G diag(s)."""
        if item.layout is None:
            super()._move(item, N)
            return
        group, p, layout, G = item.group, item.param, item.layout, item.full
        assert isinstance(layout, Layout)
        assert G is not None
        dim = (-2, -1) if scaling_of(group) == "tensor" else (-2,) if layout.left else (-1,)
        of_N, of_R = _norms(N, dim), _norms(item.grad, dim)
        s = torch.where(of_R > 0, of_N / of_R, 0.0)  # (…, 1, n), (…, m, 1) or (…, 1, 1)
        if group["growth_limit"] is not None:
            norm = sharding.gathered(torch.linalg.vector_norm(s * _norms(G, dim)))
            moved = of_R if len(dim) == 1 else _norms(item.grad, (-2,) if layout.left else (-1,))
            shrunk = limited_growth(norm, item.state["update_norm"], moved, group["growth_limit"])
            factor = sharding.placed(s, shrunk, rows=False)
            assert factor is not None
            s = s * factor
        W, lr = layout.matrices(p), rate_of(group)
        if group["weight_decay"] != 0:
            W.mul_(1 - lr * group["weight_decay"])
        if W.dtype in (torch.float32, torch.float64):
            W.addcmul_(G, s.to(W.dtype), value=-lr * group["scale"])
        else:  # float16 has no room for s
            W.add_((G.float() * s).to(W.dtype), alpha=-lr * group["scale"])
        if not p.is_contiguous():  # then W may be a copy
            p.copy_(W.view(p.shape))


def scaling_of(group: dict[str, Any]) -> Scaling:
    """Whether a group's channels have factors of their own."""
    return group["scaling"] or ("tensor" if group["rank"] == 1 else "channel")


def _norms(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Norms over `dim`, which stay as ones, in at least float32; whole on every process where a sum is pending."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return sharding.reduced(torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide))
