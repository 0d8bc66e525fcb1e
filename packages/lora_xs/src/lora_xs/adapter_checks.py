"""What an adapter file checks of the model that it is loaded onto."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from . import files
from .adapter_header import ADAPTER, HEAD_FILE, HEAD_FORMAT, AdaptedModule, AdapterInfo
from .digest import weight_digests
from .errors import LoRAXSError
from .head import ATTRIBUTE as HEAD
from .head import head_of
from .kinds import matrix_of, matrix_shape
from .layer import ATTRIBUTE, XSLayer, is_adapted, layers
from .svd import generator
from .targets import Target, find_heads, parameters_to_adapt, resolve

PROBE_TOLERANCE = 2e-3
"""Relative change of the bases that is refused. Rounding to bf16 stays below; a flipped or turned vector
does not."""

FOLLOWS_TOLERANCE = 2e-2
"""Relative difference of BᵀW from A above which a weight is not the one that the bases were made of."""


def base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that is neither an adapter's nor a task head's, in the model's order."""
    head_prefixes = tuple(f"{name}." for name, module in model.named_modules() if head_of(module) is not None)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if f".{ATTRIBUTE}." not in f".{name}" and not name.startswith(head_prefixes)
    }


def base_digests(model: nn.Module, *, reuse: bool, without: tuple[str, ...] = ()) -> tuple[str, Tensor]:
    """SHA-256 over all base weights, and two bytes of each one's own (weights×2, uint8)."""
    prefixes = tuple(name + "." for name in without)
    weights = [p for name, p in base_weights(model).items() if not name.startswith(prefixes)]
    if any(weight.is_meta for weight in weights):
        raise LoRAXSError("weights on the meta device have no bytes to check; load the base weights first")
    digests = weight_digests(weights, reuse=reuse)
    short = torch.tensor([list(digest[:2]) for digest in digests], dtype=torch.uint8)
    return hashlib.sha256(b"".join(digests)).hexdigest(), short


def check_base_weights(model: nn.Module, info: AdapterInfo, expected: Tensor, file: Path) -> None:
    without = () if is_adapted(model) else tuple(find_heads(model, info.config))
    sha256, short = base_digests(model, reuse=False, without=without)
    if sha256 == info.base_sha256:
        return
    if short.shape != expected.shape:
        raise LoRAXSError(
            f"{file} was made for other base weights: it knows {expected.shape[0]} of them, this model has "
            f"{short.shape[0]}"
        )
    prefixes = tuple(name + "." for name in without)
    names = [name for name in base_weights(model) if not name.startswith(prefixes)]
    differ = [name for name, same in zip(names, (short == expected).all(1).tolist(), strict=True) if not same]
    first = differ[0] if differ else "one"
    raise LoRAXSError(
        f"{file} was made for other base weights: {first} differs ({len(differ)} of {len(names)} do). "
        "Load the base model that the adapter was trained on, in the same precision"
    )


def described(module: nn.Module, layer: XSLayer) -> AdaptedModule:
    """What a file says of one adapter."""
    *stack, out, width = matrix_shape(module.get_parameter(layer.parameter), layer.kind)
    return AdaptedModule(layer.name, layer.kind.name, out, width, layer.rank, *stack)


@torch.no_grad()
def follows(module: nn.Module, layer: XSLayer) -> bool:
    """Whether A and B can be made again from the weight as it is now: it may have been changed since they were made."""
    if not layer.regenerable or layer.bases_config.init == "random" or layer.A.is_meta or layer.merged is not None:
        return layer.regenerable
    W = matrix_of(module.get_parameter(layer.parameter), layer.kind)
    A, B = layer.A.to(W.dtype), layer.B.to(W.dtype)
    # A = BᵀW but for the rounding of bases in 16 bits.
    return bool((B.mT @ W - A).norm() <= FOLLOWS_TOLERANCE * A.norm())


def matching_modules(model: nn.Module, info: AdapterInfo, file: Path) -> list[Target]:
    """The targets that `info` names, in its order, if they are what the file was made for."""
    adapted = [layer for _, layer in layers(model)] if is_adapted(model) else []
    if adapted and [layer.name for layer in adapted] != [m.name for m in info.modules]:
        raise LoRAXSError(f"{file} adapts other modules than the adapters that the model has")
    known = {*(name for name, _ in model.named_modules()), *parameters_to_adapt(model)}
    for m in info.modules:
        if m.name not in known:
            raise LoRAXSError(f"{file} is an adapter for another model: this one has no module {m.name}")
    try:
        found = list(resolve(model, [m.name for m in info.modules], info.config).values())
    except LoRAXSError as error:
        raise LoRAXSError(f"{file} is an adapter for another model: {error}") from error
    for m, target in zip(info.modules, found, strict=True):
        shape = matrix_shape(target.weight, target.kind)
        if (target.kind.name, *shape) != (m.kind, *m.shape):
            raise LoRAXSError(
                f"{file} is an adapter for another model: {m.name} is a {target.kind.name} of "
                f"{'×'.join(map(str, shape))} here, but was a {m.kind} of {'×'.join(map(str, m.shape))}"
            )
    for m, layer in zip(info.modules, adapted, strict=False):
        if layer.rank != m.rank:
            raise LoRAXSError(f"{file} has rank {m.rank} at {m.name}, but the model's bases there have {layer.rank}")
    return found


def stored_heads(info: AdapterInfo, folder: Path, adapter_sha256: str) -> dict[str, Tensor]:
    """The task heads of the adapter file with that SHA-256, verified."""
    state, header = files.read(folder / HEAD_FILE, HEAD_FORMAT)
    adapter = header.get("adapter_sha256", adapter_sha256)  # files did not say it before 2026-11-30
    if header.get("base_sha256") != info.base_sha256 or adapter != adapter_sha256:
        raise LoRAXSError(f"{folder / HEAD_FILE} belongs to another adapter than {folder / ADAPTER}")
    return state


def matching_heads(model: nn.Module, info: AdapterInfo, folder: Path, adapter_sha256: str) -> dict[str, Tensor]:
    """The task heads of the adapter file with that SHA-256, if they fit the model."""
    state = stored_heads(info, folder, adapter_sha256)
    known = model.state_dict()
    own = tuple(f"{name}." for name in find_heads(model, info.config) if name in info.heads)
    for key in known:
        if key.startswith(own) and key not in state and f".{HEAD}." not in key:
            raise LoRAXSError(
                f"the task head in {folder} lacks {key}, which this model's head has; head=False leaves it out"
            )
    for key, value in state.items():
        if key not in known:
            raise LoRAXSError(f"the task head in {folder} has {key}, which this model lacks; head=False leaves it out")
        if known[key].shape != value.shape:
            raise LoRAXSError(
                f"the task head in {folder} has {key} of shape {tuple(value.shape)}, this model has "
                f"{tuple(known[key].shape)}; head=False leaves it out"
            )
    return state


def probe(A: Tensor, B: Tensor) -> Tensor:
    """hᵀAg/‖A‖ and gᵀBh/‖B‖ for fixed random vectors (2): about 1, and moved by ε by a change of the bases
    by ε."""
    numbers = []
    for M in (A, B):
        M = M.detach().to("cpu", torch.float64).flatten(0, -2)  # a stack's matrices below one another
        draw = generator(0, "probe", str(tuple(M.shape)))
        left, right = (torch.randn(size, generator=draw, dtype=torch.float64) for size in M.shape)
        norm = torch.linalg.matrix_norm(M).clamp_min(torch.finfo(torch.float64).tiny)
        numbers.append(left @ M @ right / norm)
    return torch.stack(numbers).float()
