"""The optimizer that ``--optim`` names, over a model's trainable parameters."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from memtrain_common.errors import UserError
from torch import nn

from ..groups import param_groups
from ..projection import layout_of
from ..settings import Refresh
from .flags import TrainConfig


def make_optimizer(
    model: nn.Module, config: TrainConfig, say: Callable[[str], None] = lambda _: None
) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        say: told what GaLore leaves unprojected.

    Raises:
        UserError: where GaLore would project nothing.
    """
    groups = _groups(model, config)
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optim == "galore-torch":
        from ..upstream import PublishedGaLore

        return PublishedGaLore(groups, lr=config.lr)
    refresh = Refresh(method=config.refresh)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        optimizer = _galore(groups, config, refresh)
    for warning in heard:
        say(str(warning.message))
    return optimizer


def _galore(groups: list[dict[str, Any]], config: TrainConfig, refresh: Refresh) -> torch.optim.Optimizer:
    if config.optim == "galore-adafactor":
        from ..adafactor import GaLoreAdafactor

        return GaLoreAdafactor(groups, lr=config.lr, scale_parameter=False, relative_step=False, refresh=refresh)
    if config.optim == "galore-adamw8bit":
        from ..adamw8bit import GaLoreAdamW8bit

        return GaLoreAdamW8bit(groups, lr=config.lr, refresh=refresh)
    from ..adamw import GaLoreAdamW

    return GaLoreAdamW(groups, lr=config.lr, refresh=refresh)


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups with weight decay on matrices alone, projected ones apart."""
    if config.optim == "adamw":
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    else:
        try:
            groups = param_groups(model, config.galore_rank, config.gap, config.galore_scale, config.proj_type)
        except ValueError as error:
            raise UserError(f"--optim {config.optim} with --train {config.train}: {error}") from None
    if config.optim == "galore-torch":  # it cannot update a weight whose rank is too large
        projected = [g for g in groups if "rank" in g]
        small = [p for g in projected for p in g["params"] if layout_of(p.shape, {"split": 1, **g}) is None]
        dropped = set(small)
        for g in projected:
            g["params"] = [p for p in g["params"] if p not in dropped]
        groups.append({"params": small})
    out = []
    for group in groups:
        decayed = [p for p in group["params"] if p.ndim >= 2]
        vectors = [p for p in group["params"] if p.ndim < 2]
        out += [{**group, "params": decayed, "weight_decay": config.weight_decay}] if decayed else []
        out += [{**group, "params": vectors, "weight_decay": 0.0}] if vectors else []
    return out
