"""The optimizer over what is trained: matrices decayed, vectors not, what begins at random at a rate of its own."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from memtrain_common.errors import UserError
from torch import Tensor, nn

from .axes import Axes
from .families import heads_of


def build_optimizer(
    model: nn.Module,
    axes: Axes,
    *,
    lr: float,
    head_lr: float,
    weight_decay: float,
    say: Callable[[str], None],
    fresh: Sequence[str] = (),
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters: matrices decayed, vectors not, what begins at random (the task head,
    and ``fresh``) at its own rate."""
    if axes.optim.startswith("galore"):
        groups = _galore_groups(model, axes)
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if axes.train == "full" and head_lr == lr:
        fresh = ()  # nothing tells it apart
    groups = _split(groups, _head_parameters(model, fresh), lr=lr, head_lr=head_lr, weight_decay=weight_decay)
    if axes.optim == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    if axes.optim == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if axes.optim == "adamw8bit":
        from .adamw8bit import AdamW8bit, quantises

        if not any(quantises(p) for group in groups for p in group["params"]):
            raise UserError(
                f"optim adamw8bit would keep nothing in 8 bits: no matrix that train {axes.train} trains has 4,096 "
                "numbers in whole blocks of 256; choose optim adamw"
            )
        return AdamW8bit(groups, lr=lr)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        optimizer = _galore(groups, axes.optim, lr)
    for warning in heard:
        say(str(warning.message))
    return optimizer


def _galore(groups: list[dict[str, Any]], name: str, lr: float) -> torch.optim.Optimizer:
    import galore_vit

    if name == "galore-adafactor":
        return galore_vit.GaLoreAdafactor(groups, lr=lr, scale_parameter=False, relative_step=False)
    if name == "galore-scaled":
        return galore_vit.GaLoreScaled(groups, lr=lr)
    return (galore_vit.GaLoreAdamW if name == "galore-adamw" else galore_vit.GaLoreAdamW8bit)(groups, lr=lr)


def _galore_groups(model: nn.Module, axes: Axes) -> list[dict[str, Any]]:
    import galore_vit

    targets = {"full": None, "lora-xs": r"\.lora_xs\."}.get(axes.train, r"\.lora_[AB]\b")  # LTE's have the same names
    try:
        return galore_vit.param_groups(model, axes.galore_rank, axes.gap, axes.galore_scale, targets=targets)
    except ValueError as error:
        raise UserError(f"optim {axes.optim} with train {axes.train}: {error}") from None


def _head_parameters(model: nn.Module, fresh: Sequence[str]) -> set[Tensor]:
    """Those of what begins at random, under the names that PEFT's and LoRA-XS's wrappers give it too."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    return {p for name in heads_of(inner, fresh) for p in inner.get_submodule(name).parameters()}


def _split(
    groups: list[dict[str, Any]], head: set[Tensor], *, lr: float, head_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    out = []
    for group in groups:
        for of_head in (False, True):
            for decayed in (True, False):
                chosen = [p for p in group["params"] if (p in head) == of_head and (p.ndim >= 2) == decayed]
                if chosen:
                    rates = {"lr": head_lr if of_head else lr, "weight_decay": weight_decay if decayed else 0.0}
                    out.append({**group, "params": chosen, **rates})
    return out
