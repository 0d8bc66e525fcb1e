"""Several adapters over the same bases: adding, choosing, one for each row of a batch, and none for a
while."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import LoRAXSError
from .head import XSHead, heads
from .injection import check_name, initial_r
from .layer import XSLayer, XSWeight, layers
from .untrained import watch


def add(model: nn.Module, name: str, *, alpha: float | None = None, seed: int = 0) -> None:
    """Add an untrained adapter over the bases that the model has; `set_active` then chooses it.

    Args:
        alpha: α of the new adapter; None keeps that of the adapter the bases were made for.
        seed: of its R.
    """
    check_new(model, name)
    for _, layer in layers(model):
        config = layer.bases_config
        # The seed of random bases is theirs; a new adapter's R has its own.
        start = initial_r(layer, dataclasses.replace(config, seed=seed))
        if alpha is not None:
            config = dataclasses.replace(config, alpha=alpha, alpha_pattern={})
        layer.add(name, config, start)
    for module, head in heads(model):
        head.add(module, name)
        head.activate(module, head.active)


def set_active(model: nn.Module, name: str | None) -> None:
    """Use adapter `name`, and train its R and its head alone. None uses the base model and trains nothing.

    Run the backward pass of an adapter before another one is chosen: PyTorch gives gradients to what is trained then.
    """
    if name is not None:
        check_known(model, name)
    check_not_merged(model, "set_active")
    for _, layer in layers(model):
        layer.activate(name)
    for module, head in heads(model):
        head.activate(module, name)
    watch(model)


def adapters(model: nn.Module) -> list[str]:
    """The names of the model's adapters, oldest first."""
    return list(layers(model)[0][1].configs)


def active(model: nn.Module) -> str | None:
    """The name of the adapter in use."""
    return layers(model)[0][1].active


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Within this context the base model answers (with the model's own task head)."""
    check_not_merged(model, "disable")
    with _restored(model) as parts:
        for part in parts:
            part.active, part.rows = None, None
        yield


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within this context row i of every batch goes through adapter names[i] and its head; None is the base
    model.

    Every adapted module must see the batch as its first dimension. Where modules are checkpointed the backward pass
    belongs inside: it runs them again.
    """
    for name in set(names) - {None}:
        assert name is not None
        check_known(model, name)
    check_not_merged(model, "rows")
    for _, layer in layers(model):
        if isinstance(layer, XSWeight):
            raise LoRAXSError(f"{layer.name} is adapted through its weight, which is one for all rows of a batch")
    with _restored(model) as parts:
        for part in parts:
            part.rows = tuple(names)
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[list[XSLayer | XSHead]]:
    parts: list[XSLayer | XSHead] = [*(x for _, x in layers(model)), *(x for _, x in heads(model))]
    before = [(part, part.active, part.rows) for part in parts]
    try:
        yield parts
    finally:
        for part, active_, rows_ in before:
            part.active, part.rows = active_, rows_


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    head_lr: float | None = None,
    bases_lr: float | None = None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of what adapter `name` (None: the active one) trains: R, the bases where they are trained, the
    task head. Each group says which it is under "name"; a group without parameters is left out.

    Args:
        lr: of R; None leaves it to the optimizer.
        head_lr: of the task head; None is `lr`.
        bases_lr: of A and B under `train_bases`; None is `lr`.
    """
    rates = {"R": lr, "bases": lr if bases_lr is None else bases_lr, "head": lr if head_lr is None else head_lr}
    groups = [{"params": params, "name": group} for group, params in trained(model, name).items() if params]
    return [group | ({} if (rate := rates[str(group["name"])]) is None else {"lr": rate}) for group in groups]


def trained(model: nn.Module, name: str | None = None) -> dict[str, list[nn.Parameter]]:
    """The parameters of `param_groups`, as {"R", "bases", "head"}: the name from before there were groups."""
    name = active(model) if name is None else name
    if name is None:
        raise LoRAXSError("no adapter is active, so nothing is trained; call set_active first")
    check_known(model, name)
    pairs = [layer for _, layer in layers(model)]
    return {
        "R": [layer.R[name] for layer in pairs],
        "bases": [p for layer in pairs if layer.bases_config.train_bases for p in (layer.A, layer.B)],
        "head": [p for module, head in heads(model) for _, p in head.parameters_of(module, name)],
    }


def chosen(model: nn.Module, name: str | None, what: str) -> str:
    """The name of the adapter that `what` is for (None: the active one), which must not be merged."""
    check_not_merged(model, what)
    name = active(model) if name is None else name
    if name is None:
        raise LoRAXSError(f"no adapter is active; say which one is for {what}")
    check_known(model, name)
    return name


def check_new(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken, and bases that an adapter trains for itself."""
    check_name(name)
    if name in adapters(model):
        raise LoRAXSError(f"there is already an adapter {name!r}")
    if layers(model)[0][1].bases_config.train_bases:
        raise LoRAXSError("train_bases=True trains A and B for one adapter; no second one can share them")


def check_known(model: nn.Module, name: str) -> None:
    """Refuse a name that no adapter has."""
    if name not in adapters(model):
        raise LoRAXSError(f"there is no adapter {name!r}; the model has {', '.join(adapters(model))}")


def check_not_merged(model: nn.Module, what: str) -> None:
    """Refuse an operation that a merged adapter would spoil."""
    merged = next((layer.merged for _, layer in layers(model) if layer.merged is not None), None)
    if merged is not None:
        raise LoRAXSError(f"adapter {merged!r} is merged into the weights; call unmerge before {what}")
