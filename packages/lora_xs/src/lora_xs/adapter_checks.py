"""What an adapter file checks of the model that it is loaded onto."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from . import files
from .adapter_header import ADAPTER, HEAD_FILE, HEAD_FORMAT, AdapterInfo
from .digest import weight_digests
from .errors import LoRAXSError
from .head import head_of
from .injection import find_heads
from .kinds import kind_of, matrix_shape, refusal
from .layer import ATTRIBUTE, layer_of
from .svd import generator

PROBE_TOLERANCE = 2e-3
"""Relative change of the bases that is refused. Rounding to bf16 stays below; a flipped or turned vector
does not."""


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
    plain = all(layer_of(module) is None for module in model.modules())
    without = tuple(find_heads(model, info.config)) if plain else ()
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


def matching_modules(model: nn.Module, info: AdapterInfo, file: Path) -> list[nn.Module]:
    named = dict(model.named_modules())
    adapted = [layer.name for module in model.modules() if (layer := layer_of(module)) is not None]
    if adapted and adapted != [m.name for m in info.modules]:
        raise LoRAXSError(f"{file} adapts other modules than the adapters that the model has")
    found = []
    for m in info.modules:
        module = named.get(m.name)
        if module is None:
            raise LoRAXSError(f"{file} is an adapter for another model: this one has no module {m.name}")
        if reason := refusal(module):
            raise LoRAXSError(f"{file} is an adapter for another model: {m.name} {reason}")
        kind = kind_of(module)
        assert kind is not None
        if (kind.name, *matrix_shape(module)) != (m.kind, m.out, m.width):
            out, width = matrix_shape(module)
            raise LoRAXSError(
                f"{file} is an adapter for another model: {m.name} is a {kind.name} of {out}×{width} here, "
                f"but was a {m.kind} of {m.out}×{m.width}"
            )
        layer = layer_of(module)
        if layer is not None and layer.rank != m.rank:
            raise LoRAXSError(f"{file} has rank {m.rank} at {m.name}, but the model's bases there have {layer.rank}")
        found.append(module)
    return found


def matching_heads(model: nn.Module, info: AdapterInfo, folder: Path) -> dict[str, Tensor]:
    state, header = files.read(folder / HEAD_FILE, HEAD_FORMAT)
    if header.get("base_sha256") != info.base_sha256:
        raise LoRAXSError(f"{folder / HEAD_FILE} belongs to another adapter than {folder / ADAPTER}")
    known = model.state_dict()
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
        M = M.detach().to("cpu", torch.float64)
        draw = generator(0, "probe", str(tuple(M.shape)))
        left, right = (torch.randn(size, generator=draw, dtype=torch.float64) for size in M.shape)
        norm = torch.linalg.matrix_norm(M).clamp_min(torch.finfo(torch.float64).tiny)
        numbers.append(left @ M @ right / norm)
    return torch.stack(numbers).float()
