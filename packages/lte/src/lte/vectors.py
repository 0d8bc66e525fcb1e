"""Heads for vectors (a norm's weight, biases), by the paper's rule: a vector w (C,) is frozen, and head h adds
s·b_h·a_h with a vector b_h (C,) that begins at 0 and one number a_h that begins at 1. As a matrix of one column it
merges like any W.
"""

from collections.abc import Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chunks import ScaleGradient
from .config import LTEConfig
from .headed import Headed


class LTEVector(Headed):
    """A frozen vector w (C,) and its heads: ``lora_A`` (h, 1, 1), ``lora_B`` (h, C, 1)."""

    def __init__(self, vector: Tensor, config: LTEConfig, share: tuple[int, int] | None = None) -> None:
        nn.Module.__init__(self)
        self.add_heads(vector, config, share, "float32")

    def in_own_shape(self, matrix: Tensor) -> Tensor:
        return matrix.flatten()

    def forward(self) -> Tensor:  # -> (H, C), one vector a head; (1, C) in evaluation and in sequential mode
        if not self.training:
            return self.effective_weight()[None]
        A, B = (ScaleGradient.apply(p, float(self.heads)) for p in (self.lora_A, self.lora_B))
        deltas = B * A  # (H, C, 1); A is one number a head, and autocast would round a product of matrices
        A0, B0 = self.offsets()
        if A0 is not None and B0 is not None:
            deltas = deltas - B0 * A0
        if self.sparse is not None:
            deltas = deltas + self.feedback
        if self.config.mode == "sequential":
            deltas = deltas.mean(0, keepdim=True)
        return self.weight + self.scale * deltas[..., 0]


class LTENorm(nn.Module):
    """``nn.LayerNorm`` or ``nn.RMSNorm`` over the last dimension, whose weight and bias have heads.

    Args:
        frozen: which of the two the model does not train: that one stays as it is.
    """

    def __init__(
        self,
        norm: nn.LayerNorm | nn.RMSNorm,
        config: LTEConfig,
        share: tuple[int, int] | None = None,
        frozen: Set[Tensor] = frozenset(),
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.centred = norm.normalized_shape, norm.eps, isinstance(norm, nn.LayerNorm)
        for name in ("weight", "bias"):
            vector = getattr(norm, name, None)
            setattr(self, name, vector if vector is None or vector in frozen else LTEVector(vector, config, share))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:  # (N, …, C) -> (N, …, C)
        if self.centred:
            y = F.layer_norm(x, self.normalized_shape, eps=self.eps or 0.0)
        else:
            y = F.rms_norm(x, self.normalized_shape, eps=self.eps)
        headed = self.weight if isinstance(self.weight, LTEVector) else self.bias
        assert isinstance(headed, LTEVector)
        parts = y.reshape(*(headed.cut(x) if self.training else (1, -1)), x.shape[-1])  # (H, t, C)
        parts = parts * _of_heads(self.weight).to(y.dtype)
        if self.bias is not None:
            parts = parts + _of_heads(self.bias).to(y.dtype)
        return parts.view_as(x)


def _of_heads(vector: nn.Module | Tensor) -> Tensor:
    """(H, 1, C), or (C,) where it is one for all heads."""
    return vector if isinstance(vector, Tensor) else vector()[:, None]


def has_vectors(module: nn.Module) -> bool:
    """Whether :class:`LTENorm` can stand for this norm layer."""
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1
    return known and isinstance(getattr(module, "weight", None), torch.Tensor)
