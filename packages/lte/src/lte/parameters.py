"""The trained parameters for an optimizer: heads and the rest apart, since they learn at different rates."""

from typing import Any

import torch
from torch import Tensor, nn

from .injection import headed, replicas
from .ranks import Ranks


def param_groups(
    model: nn.Module, *, lr: float, rest_lr: float, weight_decay: float, head_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups: the heads, the other matrices (decayed), the other vectors (not decayed).

    Args:
        lr: of the heads. The paper's is 0.05 to 0.1 of full training's, at α in the thousands.
        rest_lr: of embeddings, norms and skipped layers, and of the heads' copies of them.
        weight_decay: of the rest's parameters with 2 or more dimensions, as in nanoGPT.
        head_weight_decay: of A and B. Off by default: it would pull their products, most of which is merged into
            W already, towards an offset that is not zero.
    """
    heads, copies = head_parameters(model), copied_parameters(model)
    own, stacks = set(heads), set(copies)
    rest = [p for p in model.parameters() if p.requires_grad and p not in own]
    matrices = [p for p in rest if p.dim() - (p in stacks) >= 2]
    vectors = [p for p in rest if p.dim() - (p in stacks) < 2]
    groups = [
        {"params": heads, "lr": lr, "weight_decay": head_weight_decay, "name": "heads"},
        {"params": matrices, "lr": rest_lr, "weight_decay": weight_decay, "name": "matrices"},
        {"params": vectors, "lr": rest_lr, "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of everything with heads."""
    return [p for layer in headed(model).values() for p in (layer.lora_A, layer.lora_B)]


def copied_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of which every head has a copy, tied ones once."""
    return list(dict.fromkeys(p for copy in replicas(model).values() for p in map(copy.get_parameter, copy.names())))


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that are one for all heads: :meth:`lte.Ranks.average_gradients` is for these."""
    own = {*head_parameters(model), *copied_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad and p not in own]


@torch.no_grad()
def clip_grad_norm_per_head(model: nn.Module, max_norm: float, ranks: Ranks | None = None) -> Tensor:
    """Clip each head by its own norm over all layers and copies, and the rest by its own: no head's outlier slows
    another.

    Returns:
        the norm of all gradients together, before clipping, as ``torch.nn.utils.clip_grad_norm_`` does. With several
        processes, this process's part: the root of the sum of the parts' squares is the norm.
    """
    own = [*head_parameters(model), *copied_parameters(model)]
    heads = [p.grad for p in own if p.grad is not None]  # each (H, …)
    if not heads:
        return torch.nn.utils.clip_grad_norm_(shared_parameters(model), max_norm)
    rest = [p.grad for p in shared_parameters(model) if p.grad is not None]
    # (H, layers), summed along its rows: the order of additions over layers is then the same for any number of heads
    head_squares = torch.stack([g.flatten(1).square().sum(1) for g in heads], dim=1).sum(1)  # (H,)
    rest_square = torch.stack([g.square().sum() for g in rest]).sum() if rest else head_squares.new_zeros(())
    factors = (max_norm / (head_squares.sqrt() + 1e-6)).clamp(max=1.0)  # (H,)
    for g in heads:
        g.mul_(factors.view(-1, *[1] * (g.dim() - 1)))
    rest_factor = (max_norm / (rest_square.sqrt() + 1e-6)).clamp(max=1.0)
    for g in rest:
        g.mul_(rest_factor)
    counted = ranks is None or ranks.rank == 0
    return (head_squares.sum() + (rest_square if counted else 0)).sqrt()
