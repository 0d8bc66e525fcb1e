"""Transformers' ``Conv1D`` (GPT-2 of the hub) with heads: a linear layer that keeps its weight as (n, m)."""

from collections.abc import Set
from typing import Any

from torch import Tensor, nn

from .config import LTEConfig
from .layer import LTELinear


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: y = x W + b with W (n, m)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


class LTEConv1D(LTELinear):
    """A frozen ``Conv1D`` and its heads; made by :func:`lte.inject`. Inside, W is (m, n) as in a linear layer."""

    def __init__(
        self, layer: Any, config: LTEConfig, share: tuple[int, int] | None = None, frozen: Set[Tensor] = frozenset()
    ) -> None:
        n, m = layer.weight.shape
        linear = nn.Linear(n, m, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
        linear.bias = layer.bias
        linear.train(layer.training)
        super().__init__(linear, config, share, frozen)
        self.nf, self.nx = m, n

    def in_own_shape(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def evaluation_weight(self) -> Tensor:
        return self.effective_weight().T
