"""Fewer directions after some steps: the trained update's own leading subspaces become the bases.

    (α/r)·B R A = U S Vᵀ,    B' = U_r' (out×r'),   A' = V_r'ᵀ (r'×in),   (α/r)·R' = diag(S_r')

Of all updates of rank r' this is the nearest to the one that was trained (Eckart and Young, 1936). So a model can be
trained with many directions for a while, and go on with those few that have moved most: bases from the gradient know
where the first step goes, these where many steps went.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .adapters import adapters, chosen
from .config import LoRAXSConfig
from .errors import LoRAXSError
from .injection import initial_r
from .layer import XSLayer, layers
from .svd import full_precision

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def narrow(model: Model, rank: int) -> Model:
    """Keep of every trained update B R A the nearest one of rank `rank`; its R is diagonal, and trained on.

    The model has one adapter. R is another parameter afterwards, so the optimizer is made anew (`param_groups`), and so
    is what wraps the model (DDP, torch.compile). The adapter's file holds the bases, which do not follow from the
    weights any more. The scale α/r stays, and with it what a learning rate means. A module whose rank is no larger than
    `rank` keeps its bases and its R.

    Args:
        model: adapted, and trained for some steps.
        rank: r', below r.

    Returns:
        The same model.

    Raises:
        LoRAXSError: if the adapter is untrained, merged, not the only one or in shards, or no module has a larger rank.
    """
    name, pairs = chosen(model, None, "narrow"), layers(model)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise LoRAXSError(f"rank must be a whole number of at least 1, not {rank!r}")
    widest = max(layer.rank for _, layer in pairs)
    if rank >= widest:
        raise LoRAXSError(f"narrow to a rank below {widest}, the largest that the adapter has, not to {rank}")
    if others := [other for other in adapters(model) if other != name]:
        raise LoRAXSError(f"adapter {others[0]!r} shares the bases and would lose them: narrow a model that has one")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise LoRAXSError("DDP trains the parameters that it was given: narrow the model, then wrap it anew")
    if any(hasattr(layer.A, "full_tensor") for _, layer in pairs):
        raise LoRAXSError("the bases are in shards (FSDP): narrow before fully_shard")
    if all(torch.equal(layer.R[name].cpu(), initial_r(layer, layer.configs[name])) for _, layer in pairs):
        raise LoRAXSError("the adapter is untrained, so no direction has moved: train it for some steps, then narrow")
    if spoilt := [layer.name for _, layer in pairs if not bool(layer.R[name].isfinite().all())]:
        raise LoRAXSError(f"the R of {spoilt[0]} is not finite")
    config = _narrowed(pairs[0][1].configs[name], rank, {layer.name: layer.scale(name) for _, layer in pairs})
    for _, layer in pairs:
        if layer.rank > rank:
            _narrow(layer, name, rank)
        layer.bases_config = layer.configs[name] = config
    return model


def _narrowed(config: LoRAXSConfig, rank: int, scales: dict[str, float]) -> LoRAXSConfig:
    """The configuration with no larger rank than this, and the same α/r of every module."""
    pattern = {key: min(own, rank) for key, own in config.rank_pattern.items()}
    now = dataclasses.replace(config, rank=min(config.rank, rank), rank_pattern=pattern)
    if config.alpha is None and not config.alpha_pattern:
        return now
    if not pattern and not config.alpha_pattern:
        return dataclasses.replace(now, alpha=scales[next(iter(scales))] * now.rank)
    return dataclasses.replace(now, alpha_pattern={key: scale * now.rank_of(key) for key, scale in scales.items()})


def _narrow(layer: XSLayer, name: str, rank: int) -> None:
    """The same of one module."""
    R, scale = layer.R[name], layer.scale(name)
    with full_precision(R.device):
        left, right = torch.linalg.qr(layer.B.to(R.dtype)), torch.linalg.qr(layer.A.to(R.dtype).mT)
        U, S, Vh = torch.linalg.svd(left.R @ (R * scale) @ right.R.mT)
        B, A = left.Q @ U[..., :rank], Vh[..., :rank, :] @ right.Q.mT
    start = torch.diag_embed(S[..., :rank]) / scale
    if dist.is_available() and dist.is_initialized():  # processors may differ in the last digits
        A, B = A.contiguous(), B.contiguous()
        for part in (A, B, start):
            dist.broadcast(part, 0)
    layer.A, layer.B = _like(layer.A, A), _like(layer.B, B)
    layer.R[name] = _like(R, start)
    layer.regenerable = False


def _like(before: nn.Parameter, now: Tensor) -> nn.Parameter:
    return nn.Parameter(now.to(before.dtype).contiguous(), requires_grad=before.requires_grad)
