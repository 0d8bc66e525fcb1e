"""GaLore with 8-bit Adam: the moments of the compact gradient are kept in a byte a number.

M is stored signed. Of V its root is stored, which has the range of M: stored as it is, V would round to zero
where M does not (below 10⁻⁷ of a block's largest), and M / (√V + ε) would explode. Tensors below 4096
numbers stay in fp32, where 8 bits would save nothing worth having. Bases keep the weight's dtype. Under FSDP2
each process packs its own rows, so that the blocks are those of the whole tensor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_vit import sharding
from galore_vit.adamw import GaLoreAdamW
from galore_vit.block8bit import BLOCK, decode, encode, scale_count
from galore_vit.item import Item
from galore_vit.settings import Refresh

MIN_8BIT_SIZE = 4096
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""What is packed, and whether it has a sign; of exp_avg_sq the root."""


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
        correct_bias: bool = True,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay,
            refresh=refresh, residual=residual, correct_bias=correct_bias, maximize=maximize,
            foreach=False, fused=False,
        )  # fmt: skip

    inner = "8-bit AdamW"
    _frames = 5

    def _fresh_moments(
        self, p: Tensor, group: dict[str, Any], shape: tuple[int, ...], rows: bool, device: torch.device
    ) -> dict[str, Tensor]:
        size = math.prod(shape)
        packed = size >= MIN_8BIT_SIZE
        if packed and not sharding.in_whole_blocks(p, shape, BLOCK, rows=rows):
            packed = False
            warnings.warn(
                f"moments of shape {'×'.join(map(str, shape))} stay in fp32: the shards of the processes are "
                f"not equally many blocks of {BLOCK} numbers",
                UserWarning,
                stacklevel=2,
            )

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return sharding.zeros(p, shape, rows=rows, dtype=dtype, device=device)

        moments: dict[str, Tensor] = {}
        for key in ("exp_avg", "exp_avg_sq"):
            if packed:
                moments[f"{key}_codes"] = zeros(shape, torch.uint8)
                # A scale of 0 makes every code mean 0.
                moments[f"{key}_scales"] = zeros((scale_count(size),), torch.float32)
            else:
                moments[key] = zeros(shape, torch.float32)
        if group["residual"]:
            sharding.refuse(p, "a weight with the residual", "set residual=False")
            moments["residual_norm"] = torch.zeros((), dtype=torch.float32, device=device)
        return moments

    def _moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[p]
        if "exp_avg" in state:
            return state["exp_avg"], state["exp_avg_sq"]
        M, root = (self._unpacked(state, key, signed) for key, signed in SIGNED.items())
        return M, root.square_()

    def _keep_moments(self, p: Tensor, M: Tensor, V: Tensor) -> None:
        state = self.state[p]
        if "exp_avg" in state:
            return
        for (key, signed), x in zip(SIGNED.items(), (M, V.sqrt()), strict=True):
            codes, scales = sharding.local(state[f"{key}_codes"]), sharding.local(state[f"{key}_scales"])
            encode(sharding.local(x), codes, scales, signed=signed)

    def _unpacked(self, state: dict[str, Tensor], key: str, signed: bool) -> Tensor:
        codes, scales = state[f"{key}_codes"], state[f"{key}_scales"]
        return sharding.spread_like(codes, decode(sharding.local(codes), sharding.local(scales), signed=signed))

    def _update(self, group: dict[str, Any], items: list[Item]) -> None:
        for item in items:
            item.grad = item.grad.float()  # the moments are unpacked to fp32
        super()._update(group, items)
