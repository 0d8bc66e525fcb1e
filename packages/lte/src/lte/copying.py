"""Which layers have a copy for every head, and which cannot."""

import inspect
from collections.abc import Set

from torch import Tensor, nn

from .config import LTEConfig
from .headed import Headed
from .masters import widened
from .replicas import Replicas
from .survey import all_names, kind, layer_for, matches
from .vectors import LTENorm


def copies(
    model: nn.Module, config: LTEConfig, share: tuple[int, int] | None, frozen: Set[Tensor]
) -> list[tuple[nn.Module, Replicas]]:
    """A copy for every head of the layers that ``config.replicas`` names, tied layers' parameters staying tied.

    Args:
        frozen: what the model does not train: it stays one for all heads, as it is.
    """
    modules = {name: m for name, m in model.named_modules() if not isinstance(m, Headed | LTENorm)}
    inside = {id(p) for m in model.modules() if isinstance(m, Headed | LTENorm) for p in m.parameters()}
    names = all_names(model)
    wanted = {
        p
        for m in modules.values()
        if kind(m) in config.replicas and not _excluded(m, names[m], config)
        for p in m.parameters(recurse=False)
        if id(p) not in inside and p not in frozen
    }
    stacks: dict[Tensor, nn.Parameter] = {}
    found = []
    for name, module in modules.items():
        own = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p not in frozen}
        if not any(p in wanted for p in own.values()):
            continue
        try:
            fresh = stacked(module, own, share[1] if share else config.heads)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from None
        tied = frozenset(leaf for leaf in fresh if own[leaf] in stacks)
        shared = {leaf: stacks.setdefault(own[leaf], parameter) for leaf, parameter in fresh.items()}
        found.append((module, Replicas(module, shared, config, share, tied)))
    return found


def _inputs(layer: nn.Module) -> list[str]:
    """What a layer is called with: what it cannot do without, and of a table that is not torch's own all that it takes,
    since models of positions give them."""
    optional = kind(layer) == "embeddings" and not isinstance(layer, nn.EmbeddingBag)
    found = inspect.signature(layer.forward).parameters.values()
    named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if optional or p.default is p.empty]


def _excluded(module: nn.Module, names: list[str], config: LTEConfig) -> bool:
    """Whether a layer's name keeps it from having copies. What could have heads is among the skipped layers by just
    that name, and has copies where those have."""
    return matches(names, config.exclude) and not (kind(module) == "skipped" and layer_for(module) is not None)


def stacked(layer: nn.Module, parameters: dict[str, nn.Parameter], held: int) -> dict[str, nn.Parameter]:
    """Some of the layer's own parameters, each in ``held`` copies.

    Raises:
        ValueError: if the layer has buffers or children, whose copies would have to be kept as well, takes more than
            its input, or is an embedding whose lookup is more than rows of a weight.
    """
    name = type(layer).__name__
    instead = "leave its kind out of replicas"
    if kind(layer) != "skipped" or layer_for(layer) is None:
        instead = f"add it to exclude, or {instead}"
    if next(layer.buffers(), None) is not None or next(layer.children(), None) is not None:
        raise ValueError(f"{name} has buffers or parts of its own and cannot have copies for heads: {instead}")
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"{name} with max_norm changes its weight in the forward pass and cannot have copies for heads: {instead}"
        )
    if getattr(layer, "sparse", False) and isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        raise ValueError(f"{name} with sparse=True cannot have copies for heads: build it with sparse=False, {instead}")
    if isinstance(layer, nn.EmbeddingBag) and layer.padding_idx is not None:
        raise ValueError(f"an EmbeddingBag with padding_idx cannot have copies for heads: {instead}")
    taken = _inputs(layer)
    if len(taken) > 1:
        raise ValueError(
            f"{name} takes {', '.join(taken)}, and cannot have copies for heads, which share out one input: {instead}"
        )
    return {leaf: nn.Parameter(widened(p.detach()).expand(held, *p.shape).clone()) for leaf, p in parameters.items()}
