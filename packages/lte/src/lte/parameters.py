"""The trained parameters for an optimizer: heads and the rest apart, since they learn at different rates."""

from typing import Any

import torch
from torch import Tensor, nn

from .injection import lte_layers


def param_groups(
    model: nn.Module, *, lr: float, rest_lr: float, weight_decay: float, head_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups: the heads, the other matrices (decayed), the other vectors (not decayed).

    Args:
        lr: of the heads. The paper's is 0.05 to 0.1 of full training's, at α in the thousands.
        rest_lr: of embeddings, norms and skipped layers.
        weight_decay: of the rest's parameters with 2 or more dimensions, as in nanoGPT.
        head_weight_decay: of A and B. Off by default: it would pull their products, most of which is merged into
            W already, towards an offset that is not zero.
    """
    heads = head_parameters(model)
    own = set(heads)
    rest = [p for p in model.parameters() if p.requires_grad and p not in own]
    groups = [
        {"params": heads, "lr": lr, "weight_decay": head_weight_decay, "name": "heads"},
        {"params": [p for p in rest if p.dim() >= 2], "lr": rest_lr, "weight_decay": weight_decay, "name": "matrices"},
        {"params": [p for p in rest if p.dim() < 2], "lr": rest_lr, "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every layer with heads."""
    return [p for layer in lte_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


@torch.no_grad()
def clip_grad_norm_per_head(model: nn.Module, max_norm: float) -> Tensor:
    """Clip each head by its own norm over all layers, and the rest by its own: no head's outlier slows another.

    Returns:
        the norm of all gradients together, before clipping, as ``torch.nn.utils.clip_grad_norm_`` does.
    """
    heads = [p.grad for p in head_parameters(model) if p.grad is not None]  # each (H, ·, ·)
    own = {id(g) for g in heads}
    rest = [p.grad for p in model.parameters() if p.grad is not None and id(p.grad) not in own]
    head_squares = torch.stack([g.square().sum((1, 2)) for g in heads]).sum(0)  # (H,)
    rest_square = torch.stack([g.square().sum() for g in rest]).sum() if rest else head_squares.new_zeros(())
    factors = (max_norm / (head_squares.sqrt() + 1e-6)).clamp(max=1.0)  # (H,)
    for g in heads:
        g.mul_(factors[:, None, None])
    rest_factor = (max_norm / (rest_square.sqrt() + 1e-6)).clamp(max=1.0)
    for g in rest:
        g.mul_(rest_factor)
    return (head_squares.sum() + rest_square).sqrt()
