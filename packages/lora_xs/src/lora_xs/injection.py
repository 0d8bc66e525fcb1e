"""Adapters into a model, and out of it again."""

from __future__ import annotations

import difflib
from collections import Counter
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import head as heads_
from .bases import Progress, Request, default_cache, make_bases
from .config import USUAL_HEADS, LoRAXSConfig, matches, matches_targets
from .errors import LoRAXSError
from .head import XSHead, heads
from .kinds import CONV2D, EMBEDDING, is_quantized, kind_of, refusal
from .layer import ATTRIBUTE, XSConv2d, XSEmbedding, XSLayer, layer_of, layers
from .svd import generator

Model = TypeVar("Model", bound=nn.Module)


def inject(
    model: Model,
    config: LoRAXSConfig,
    *,
    name: str = "default",
    cache: str | Path | bool = True,
    progress: Progress | None = None,
) -> Model:
    """Adapt `model` in place: everything is frozen but R of each target and the task head.

    Args:
        model: any module. Under torchrun, inject before DDP, fully_shard or torch.compile, in every process.
        config: what to adapt and how.
        name: of this adapter.
        cache: True keeps bases in `LORA_XS_CACHE` or the user's cache folder; a path keeps them there;
        False nowhere.
        progress: called with (done, total, module name) after each decomposition.

    Returns:
        The same model.
    """
    targets = find_targets(model, config)
    requests = [Request(key, module, config.rank_of(key)) for key, module in targets.items()]
    folder = default_cache() if cache is True else Path(cache) if cache else None
    pairs = make_bases(requests, config, folder, progress)
    attach(model, config, name, [(r.name, r.module, A, B) for r, (A, B) in zip(requests, pairs, strict=True)])
    return model


def attach(
    model: nn.Module,
    config: LoRAXSConfig,
    name: str,
    bases: list[tuple[str, nn.Module, Tensor, Tensor]],
    *,
    given: bool = False,
) -> None:
    """Freeze the model and attach (module name, module, A, B) and the heads; `given` bases come from a
    file."""
    check_name(name)
    model.requires_grad_(False)
    for key, module, A, B in bases:
        kind = kind_of(module)
        make = XSEmbedding if kind is EMBEDDING else XSConv2d if kind is CONV2D else XSLayer
        assert isinstance(module.weight, Tensor)
        regenerable = not given and not is_quantized(module.weight)
        layer = make(key, A, B, config, regenerable=regenerable)
        layer.add(name, config, initial_r(layer, config))
        layer.activate(name)
        layer.train(module.training)
        module.add_module(ATTRIBUTE, layer)
        module.register_forward_hook(layer.hook, with_kwargs=True)
    for key, module in find_heads(model, config).items():
        head = XSHead(key, name, module)
        head.activate(module, name)
        module.add_module(heads_.ATTRIBUTE, head)
        module.register_forward_hook(head.hook, with_kwargs=True)


def remove(model: Model) -> Model:
    """Take all adapters off again: the model is what it was before `inject`, but for the trained task
    head."""
    for module, layer in layers(model):
        if layer.merged is not None:
            raise LoRAXSError("the adapter is merged; call unmerge before remove")
        _detach(module, ATTRIBUTE, layer)
    for module, head in heads(model):
        _detach(module, heads_.ATTRIBUTE, head)
    return model


def _detach(module: nn.Module, attribute: str, owner: XSLayer | XSHead) -> None:
    for handle, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__self__", None) is owner:
            del module._forward_hooks[handle]
            module._forward_hooks_with_kwargs.pop(handle, None)
    delattr(module, attribute)


def initial_r(layer: XSLayer, config: LoRAXSConfig) -> Tensor:
    """R ~ N(0, r_std²) (r×r), from a stream of the module's own."""
    if layer.A.is_meta:
        return torch.empty(layer.rank, layer.rank, device="meta")
    return torch.randn(layer.rank, layer.rank, generator=generator(config.seed, "R", layer.name)) * config.r_std


def check_name(name: str) -> None:
    """Adapter names become parts of parameter names."""
    if not name or "." in name:
        raise LoRAXSError(f"an adapter's name must not be empty or contain a dot, but is {name!r}")


def find_targets(model: nn.Module, config: LoRAXSConfig) -> dict[str, nn.Module]:
    """The modules to adapt, by name, in the model's order; every name in the configuration must match
    something."""
    if any(layer_of(module) is not None for module in model.modules()):
        raise LoRAXSError("the model already has LoRA-XS adapters; use add, or remove them first")
    head_names = tuple(find_heads(model, config))
    named = {name: module for name, module in model.named_modules() if name}
    inside_head = {n for n in named if any(n == h or n.startswith(h + ".") for h in head_names)}
    candidates = {n: m for n, m in named.items() if n not in inside_head}
    if config.targets == "all-linear":
        find_output = getattr(model, "get_output_embeddings", None)
        output = find_output() if callable(find_output) else None
        found = {
            name: module
            for name, module in candidates.items()
            if (kind := kind_of(module)) is not None
            and kind.name in ("Linear", "Conv1D")
            and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
            and module is not output
        }
        if not found:
            raise LoRAXSError('targets="all-linear" found no Linear or Conv1D module in this model')
    else:
        found = {n: m for n, m in candidates.items() if matches_targets(n, config.targets)}
        wanted = (config.targets,) if isinstance(config.targets, str) else config.targets
        for target in wanted:
            rule: tuple[str, ...] | str = target if isinstance(config.targets, str) else (target,)
            if not any(matches_targets(name, rule) for name in candidates):
                raise LoRAXSError(f"target {target!r} matches no module; {_what_there_is(candidates, target)}")
    for what, names in (
        ("exclude", config.exclude),
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        for suffix in names:
            if not any(matches(name, (suffix,)) for name in found):
                raise LoRAXSError(f"{what} names {suffix!r}, which matches none of the targeted modules")
    found = {name: module for name, module in found.items() if not matches(name, config.exclude)}
    if not found:
        raise LoRAXSError("exclude leaves no module to adapt")
    for name, module in found.items():
        if reason := refusal(module):
            raise LoRAXSError(f"{name} {reason}. Leave it out by `exclude` or name other targets")
    return found


def find_heads(model: nn.Module, config: LoRAXSConfig) -> dict[str, nn.Module]:
    """The outermost modules that `head` names."""
    suffixes = USUAL_HEADS if config.head is None else config.head
    named = dict(model.named_modules())
    # A usual head is a submodule of the model itself: a "score" deep inside an attention is none.
    found = [n for n in named if (n in suffixes if config.head is None else n and matches(n, suffixes))]
    for suffix in config.head or ():
        if not any(matches(name, (suffix,)) for name in found):
            raise LoRAXSError(f"head names {suffix!r}, which matches no module; {_what_there_is(named, suffix)}")
    outermost = [n for n in found if not any(n.startswith(other + ".") for other in found)]
    for name in outermost:
        if not any(True for _ in named[name].parameters()):
            raise LoRAXSError(f"the head {name} has no parameters to train; name another one in `head`")
    return {name: named[name] for name in outermost}


def _what_there_is(modules: dict[str, nn.Module], wanted: str) -> str:
    leaves = Counter(n.rsplit(".", 1)[-1] for n, m in modules.items() if n and refusal(m) is None)
    listed = ", ".join(f"{leaf} ({count})" for leaf, count in sorted(leaves.items()))
    close = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], leaves, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"the modules that can be adapted are {listed or 'none'}.{hint}"
