"""The optimizer that ``--optim`` names, over a model's trainable parameters."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from memtrain_common.errors import UserError
from torch import nn

from ..groups import param_groups
from ..projection import layout_of, sides
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
    refresh = None if config.paper or config.refresh == "auto" else Refresh(method=config.refresh)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        optimizer = _galore(groups, config, refresh)
    for warning in heard:
        say(str(warning.message))
    if config.paper:
        _say_where_nothing_is_projected(groups, config, say)
    return optimizer


def _say_where_nothing_is_projected(
    groups: list[dict[str, Any]], config: TrainConfig, say: Callable[[str], None]
) -> None:
    """Under --paper a rank above every side is the published code's own setting, and no reduction of anything."""
    smaller = [min(sides(p.shape, g.get("split", 1))[1:]) for g in groups if "rank" in g for p in g["params"]]
    if smaller and max(smaller) <= config.galore_rank:
        say(
            f"GaLore projects nothing: rank {config.galore_rank} is not below the smaller side of any of the "
            f"{len(smaller)} weights that it is given ({max(smaller)} at most), so that, as in the published code, "
            "their gradients are turned whole and Adam's state is as large as without it"
        )


def _galore(groups: list[dict[str, Any]], config: TrainConfig, refresh: Refresh | None) -> torch.optim.Optimizer:
    if config.optim == "galore-adafactor":
        from ..adafactor import GaLoreAdafactor

        return GaLoreAdafactor(
            groups, lr=config.lr, scale_parameter=False, relative_step=False, refresh=refresh, paper=config.paper
        )
    if config.optim == "galore-adamw8bit":
        from ..adamw8bit import GaLoreAdamW8bit

        return GaLoreAdamW8bit(groups, lr=config.lr, refresh=refresh)
    if config.optim == "galore-scaled":
        from ..scaled import GaLoreScaled

        return GaLoreScaled(groups, lr=config.lr, refresh=refresh)
    from ..adamw import GaLoreAdamW

    return GaLoreAdamW(groups, lr=config.lr, refresh=refresh, paper=config.paper)


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups with weight decay on matrices alone, projected ones apart."""
    if config.optim == "adamw":
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    else:
        try:
            groups = param_groups(
                model, config.galore_rank, config.gap, config.galore_scale, config.proj_type, paper=config.paper
            )
        except ValueError as error:
            way = "; --paper runs it as the published code does" if "would project nothing" in str(error) else ""
            raise UserError(f"--optim {config.optim} with --train {config.train}: {error}{way}") from None
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
