"""Adapters into a model, and out of it again."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import head as heads_
from .bases import Progress, Request, default_cache, make_bases
from .config import LoRAXSConfig
from .errors import LoRAXSError
from .gradient import Losses, gradient_bases
from .head import XSHead, heads
from .kinds import CONV2D, EMBEDDING, is_quantized
from .layer import ATTRIBUTE, XSConv2d, XSEmbedding, XSLayer, XSWeight, XSWeights, is_adapted, layers
from .svd import generator
from .targets import Target, find_heads, find_targets
from .untrained import say_what_has_no_adapter, say_which_bases_are_zero, watch

Model = TypeVar("Model", bound=nn.Module)


def inject(
    model: Model,
    config: LoRAXSConfig,
    *,
    name: str = "default",
    losses: Losses | None = None,
    cache: str | Path | bool = True,
    progress: Progress | None = None,
) -> Model:
    """Adapt `model` in place: everything is frozen but R of each target and the task head.

    Args:
        model: any module. Under torchrun, inject before DDP, fully_shard or torch.compile, in every process.
        config: what to adapt and how.
        name: of this adapter.
        losses: with init="gradient", a function that gives the scalar losses of a few batches, one after another:
            `lambda: (loss(model, batch) for batch in first_batches)`. It is called twice.
        cache: True keeps bases in `LORA_XS_CACHE` or the user's cache folder; a path keeps them there;
        False nowhere.
        progress: called with (done, total, module name) after each decomposition.

    Returns:
        The same model.
    """
    if is_adapted(model):
        raise LoRAXSError("the model already has LoRA-XS adapters; use add, or remove them first")
    targets = find_targets(model, config)
    requests = [Request(target, config.rank_of(key)) for key, target in targets.items()]
    if (config.init == "gradient") != (losses is not None):
        raise LoRAXSError('init="gradient" takes its bases from `losses`, and nothing else does: give both or neither')
    starts: list[Tensor] | None = None
    if losses is not None:
        found = gradient_bases(model, requests, config, losses)
        pairs, starts = [(A, B) for A, B, _ in found], [R for *_, R in found]
    else:
        folder = default_cache() if cache is True else Path(cache) if cache else None
        pairs = make_bases(requests, config, folder, progress)
    bases = [(r.target, A, B) for r, (A, B) in zip(requests, pairs, strict=True)]
    attach(model, config, name, bases, given=losses is not None, starts=starts)
    watch(model)
    if config.init == "svd":
        say_which_bases_are_zero(model)
    say_what_has_no_adapter(model, config)
    return model


def attach(
    model: nn.Module,
    config: LoRAXSConfig,
    name: str,
    bases: list[tuple[Target, Tensor, Tensor]],
    *,
    given: bool = False,
    starts: list[Tensor] | None = None,
) -> None:
    """Freeze the model and attach (target, A, B) and the heads; `given` bases do not follow from the weights.

    Args:
        starts: what each R (r×r) starts at, but for its small random numbers; None is zero.
    """
    check_name(name)
    trained = frozenset(key for key, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    for i, (target, A, B) in enumerate(bases):
        module, kind = target.module, target.kind
        regenerable = not given and not is_quantized(target.weight)
        options = {"regenerable": regenerable, "kind": kind, "parameter": target.parameter}
        if target.reader is not None:
            layer: XSLayer = XSWeight(target.name, A, B, config, **options)  # type: ignore[arg-type]
            weights = module._modules.get(ATTRIBUTE)
            if weights is None:
                module.add_module(ATTRIBUTE, weights := XSWeights())
            weights.add_module(target.parameter, layer)
        else:
            make = XSEmbedding if kind is EMBEDDING else XSConv2d if kind is CONV2D else XSLayer
            layer = make(target.name, A, B, config, **options)  # type: ignore[arg-type]
            module.add_module(ATTRIBUTE, layer)
        R = initial_r(layer, config)
        layer.add(name, config, R if starts is None else R + starts[i].to(R))
        layer.activate(name)
        layer.train(module.training)
        if isinstance(layer, XSWeight):
            assert target.reader is not None
            layer.attach(module, target.reader)
        else:
            module.register_forward_hook(layer.hook, with_kwargs=True)
    layers(model)[0][1].trained_before = trained
    for key, module in find_heads(model, config).items():
        head = XSHead(key, name, module)
        head.activate(module, name)
        module.add_module(heads_.ATTRIBUTE, head)
        module.register_forward_pre_hook(head.check)
        module.register_forward_hook(head.hook, with_kwargs=True)


def remove(model: Model) -> Model:
    """Take all adapters off again: the model is what it was before `inject`, but for the trained task
    head. What was trained then is trained again."""
    pairs, owned = layers(model), heads(model)
    prefix, trained = _prefix_of(model, *pairs[0]), pairs[0][1].trained_before
    if any(layer.merged is not None for _, layer in pairs):
        raise LoRAXSError("the adapter is merged; call unmerge before remove")
    _unhook(model, {layer for _, layer in pairs} | {head for _, head in owned})
    for module, _ in pairs:
        module._modules.pop(ATTRIBUTE, None)
    for module, _ in owned:
        delattr(module, heads_.ATTRIBUTE)
    for key, parameter in model.named_parameters():
        if key.startswith(prefix):
            parameter.requires_grad_(key.removeprefix(prefix) in trained)
    return model


def _prefix_of(model: nn.Module, module: nn.Module, layer: XSLayer) -> str:
    """What names in ``model`` begin with, beside those in the model that was adapted, which it may hold."""
    name = next(name for name, m in model.named_modules() if m is module)
    whole = name if name.endswith(layer.name) else f"{name}.{layer.parameter}"
    return whole.removesuffix(layer.name)


def _unhook(model: nn.Module, owners: set[nn.Module]) -> None:
    for module in model.modules():
        for hooks, flags in (
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        ):
            for handle in [h for h, hook in hooks.items() if getattr(hook, "__self__", None) in owners]:
                del hooks[handle]
                for flag in flags:
                    flag.pop(handle, None)


def initial_r(layer: XSLayer, config: LoRAXSConfig) -> Tensor:
    """R ~ N(0, r_std²) (r×r, or n×r×r), from a stream of the module's own."""
    if layer.A.is_meta:
        return torch.empty(layer.r_shape, device="meta")
    draw = generator(config.seed, "R", layer.name)
    return torch.randn(layer.r_shape, generator=draw, dtype=torch.float32) * config.r_std


def check_name(name: str) -> None:
    """Adapter names become parts of parameter names."""
    if not name or "." in name:
        raise LoRAXSError(f"an adapter's name must not be empty or contain a dot, but is {name!r}")
    if hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
        raise LoRAXSError(f"{name!r} is the name of an attribute that torch's modules have: call the adapter otherwise")
