"""GaLore with 8-bit Adam: the moments of the compact gradient are kept in a byte a number.

M is stored signed. Of V its root is stored, which has the range of M: stored as it is, V would round to zero
where M does not (below 10⁻⁷ of a block's largest), and M / (√V + ε) would explode. Tensors below 4096
numbers stay in fp32, where 8 bits would save nothing worth having. Bases keep the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_vit import sharding
from galore_vit.adamw import GaLoreAdamW
from galore_vit.block8bit import decode, encode, scale_count
from galore_vit.item import Item
from galore_vit.settings import Refresh

MIN_8BIT_SIZE = 4096


class GaLoreAdamW8bit(GaLoreAdamW):
    """GaLoreAdamW with block-wise 8-bit moments, in plain torch on any device.

    The arguments are GaLoreAdamW's; weights are handled one at a time, so that only one has its moments
    unpacked. The published 8-bit variant's arithmetic is bitsandbytes' and cannot be asked for by `paper`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        refresh: Refresh | None = None,
        residual: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay,
            refresh=refresh, residual=residual, maximize=maximize, foreach=False, fused=False,
        )  # fmt: skip

    def _fresh_moments(
        self, p: Tensor, group: dict[str, Any], shape: tuple[int, ...], rows: bool, device: torch.device
    ) -> dict[str, Tensor]:
        sharding.refuse(p, "an 8-bit state", "use GaLoreAdamW")
        size = torch.Size(shape).numel()
        moments: dict[str, Tensor] = {}
        for key in ("exp_avg", "exp_avg_sq"):
            if size < MIN_8BIT_SIZE:
                moments[key] = torch.zeros(shape, dtype=torch.float32, device=device)
            else:
                moments[f"{key}_codes"] = torch.zeros(shape, dtype=torch.uint8, device=device)
                # A scale of 0 makes every code mean 0.
                moments[f"{key}_scales"] = torch.zeros(scale_count(size), dtype=torch.float32, device=device)
        if group["residual"]:
            moments["residual_norm"] = torch.zeros((), dtype=torch.float32, device=device)
        return moments

    def _moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[p]
        if "exp_avg" in state:
            return state["exp_avg"], state["exp_avg_sq"]
        M = decode(state["exp_avg_codes"], state["exp_avg_scales"], signed=True)
        return M, decode(state["exp_avg_sq_codes"], state["exp_avg_sq_scales"], signed=False).square_()

    def _keep_moments(self, p: Tensor, M: Tensor, V: Tensor) -> None:
        state = self.state[p]
        if "exp_avg" not in state:
            encode(M, state["exp_avg_codes"], state["exp_avg_scales"], signed=True)
            encode(V.sqrt(), state["exp_avg_sq_codes"], state["exp_avg_sq_scales"], signed=False)

    def _update(self, group: dict[str, Any], items: list[Item]) -> None:
        for item in items:
            item.grad = item.grad.float()  # the moments are unpacked to fp32
        super()._update(group, items)

    def _move(self, item: Item, N: Tensor) -> None:
        super()._move(item, N.to(item.param.dtype))
