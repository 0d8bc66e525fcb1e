"""The update written into the weights: W ← W + (α/r)·B R A, and back."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TypeVar

import torch
from torch import Tensor, nn

from .adapters import chosen
from .errors import LoRAXSError
from .head import heads
from .injection import remove
from .kinds import dense
from .layer import XSLayer, layers

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def merge(model: Model, name: str | None = None, *, keep: bool = True) -> Model:
    """Write an adapter into the weights, so that the model runs as fast as its base.

    The sum is taken in float32 (float64 for float64 weights) and rounded once. A quantised weight becomes
    an ordinary one. A weight that several modules share is left to the others: the adapted module gets its
    own. The adapter's own task head answers from then on.

    Args:
        name: of the adapter; None is the active one.
        keep: keep the old weights, so that `unmerge` can put them back; False removes the adapters instead.
    """
    name = chosen(model, name, "merge")
    pairs = layers(model)
    shared = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    # Two passes, so that a failure leaves the model whole and success never holds two copies of it.
    for module, layer in pairs:
        if not bool(torch.isfinite(_merged_weight(module, layer, name)).all()):
            raise LoRAXSError(f"merging {name!r} into {layer.name} gives weights that are not finite")
    for module, layer in pairs:
        parameter = nn.Parameter(_merged_weight(module, layer, name), requires_grad=False)
        old = module.get_parameter(layer.parameter)
        if shared[id(old)] > 1:
            warnings.warn(
                f"{layer.name} shared its weight with another module and now has its own; "
                "a configuration that ties them (tie_word_embeddings) must say so no longer.",
                stacklevel=2,
            )
        if keep:
            layer.original = [old]
            layer.merged = name
        setattr(module, layer.parameter, parameter)
    for module, head in heads(model):
        if keep:
            head.before_merge = [head.active]
            head.activate(module, name)
        else:
            head.settle(module, name)
    return model if keep else remove(model)


def _merged_weight(module: nn.Module, layer: XSLayer, name: str) -> Tensor:
    """W + (α/r)·B R A in the layout and type of the module's weight."""
    weight = module.get_parameter(layer.parameter)
    W = layer.kind.to_matrix(dense(weight))
    total = W + layer.delta(name)
    return layer.kind.from_matrix(total, weight.shape).to(W.dtype).contiguous()


def unmerge(model: Model) -> Model:
    """Put the weights from before `merge` back: the same tensors, so the same bytes and the same ties."""
    pairs = layers(model)
    if all(layer.merged is None for _, layer in pairs):
        raise LoRAXSError("no adapter is merged")
    for module, layer in pairs:
        (original,) = layer.original
        setattr(module, layer.parameter, original)
        layer.original, layer.merged = [], None
    for module, head in heads(model):
        (active,) = head.before_merge
        head.activate(module, active)
        head.before_merge = []
    return model
