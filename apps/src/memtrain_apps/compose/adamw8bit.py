"""torchao's 8-bit AdamW under this repository's loop: rates as numbers, and no compiler needed on the CPU."""

from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit as _AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

BLOCK = 256
LEAST = 4096


def quantises(parameter: Tensor) -> bool:
    """Whether torchao keeps this parameter's moments in 8 bits: 4,096 numbers or more, in whole blocks of 256."""
    return parameter.numel() >= LEAST and parameter.numel() % BLOCK == 0


class AdamW8bit(_AdamW8bit):
    """AdamW whose moments are 8-bit codes with one scale for every 256 (Dettmers et al., 2022, arXiv:2110.02861).

    torchao wants learning rates to be tensors, so that its compiled step need not be compiled again for each; schedules
    and logs want numbers. Between steps they are numbers. On the CPU the step runs uncompiled unless
    ``compiled_on_cpu``: compiling needs a C++ compiler, which a machine may lack.

    A second moment never rounds to zero. torchao's codes hold V down to 3·10⁻⁷ of its block's largest: where a gradient
    is below 1/1800 of the block's largest, V becomes 0 while M does not, and steps grow to (1 - β₁)/√(1 - β₂) = 3 times
    the rate and more; a small ViT did not learn at all. Li et al., 2023 (arXiv:2309.01507, Section 3.2) call it the
    zero-point problem and leave zero out of V's codes, as is done here: codes of 0 become the least above.
    """

    compiled_on_cpu = False
    """For long runs on a CPU: a quarter of the time, and other roundings."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["lr"] = float(group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        eager = not self.compiled_on_cpu and all(
            p.device.type == "cpu" for group in self.param_groups for p in group["params"]
        )
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float32)
        try:
            with torch.compiler.set_stance("force_eager" if eager else "default"):
                loss = super().step(closure)
            for state in self.state.values():
                _without_zero(state["exp_avg_sq"])
            return loss
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


def _without_zero(V: Tensor) -> None:
    """Raise codes of 0 to the least above; ascending codes are numbered from 0. Blocks whose scale is 0 stay 0."""
    V = getattr(V, "_local_tensor", V)  # FSDP2's part of this rank
    if isinstance(V, OptimState8bit):
        V.codes.clamp_(min=1)
