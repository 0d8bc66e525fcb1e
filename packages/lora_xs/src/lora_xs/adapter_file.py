"""The adapter file: R alone, and what is needed to refuse weights it was not made for.

    adapter.safetensors    R        every R in one tensor: (modules×r×r), or flat where shapes differ; with
                                    named=True instead a tensor for each, by its name in the state dict
                           probe    two numbers a module that betray other bases (float32)
                           digests  two bytes of each base weight's SHA-256, to name the one that differs
                           A.i, B.i with bases=True, for module i
      header               the configuration, the modules (zlib, base64), the SHA-256 of all base weights
      together
    head.safetensors       the task head, if there is one

At r = 4 a safetensors entry for each module would take more bytes than its numbers, hence one tensor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import files
from .adapter_checks import (
    PROBE_TOLERANCE,
    base_digests,
    check_base_weights,
    described,
    follows,
    matching_heads,
    matching_modules,
    probe,
    stored_heads,
)
from .adapter_header import (
    ADAPTER,
    ADAPTER_FORMAT,
    HEAD_FILE,
    HEAD_FORMAT,
    AdapterInfo,
    pack,
    parse_header,
)
from .adapters import check_new, check_not_merged, chosen
from .bases import Progress, Request, default_cache, make_bases
from .errors import LoRAXSError
from .head import ATTRIBUTE as HEAD
from .head import heads
from .injection import attach
from .kinds import MATRIX, STACK, STACK_T
from .layer import ATTRIBUTE, XSLayer, XSWeight, is_adapted, layers
from .targets import Target
from .untrained import watch

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    bases: bool | None = None,
    dtype: torch.dtype | None = None,
    named: bool = False,
) -> Path:
    """Write adapter `name` (None: the active one) into the folder `path`; each file replaces an older one
    whole, and none does before all are complete.

    Args:
        bases: store A and B too. None stores them where they cannot be made again from the base weights:
            trained, imported, or of a quantised weight.
        dtype: of R in the file; None keeps float32, and with it the same logits bit for bit.
        named: each R by its name in the model's state dict, as others read files of weights. They take 120 bytes each.
    """
    name = chosen(model, name, "save_adapter")
    pairs = layers(model)
    lost = [layer.name for module, layer in pairs if not follows(module, layer)]
    if bases is False and lost:
        raise LoRAXSError(f"the bases of {lost[0]} do not follow from the base weights; save with bases=True")
    config = pairs[0][1].configs[name]
    modules = [described(module, layer) for module, layer in pairs]
    Rs = [layer.R[name].detach() for _, layer in pairs]
    R = torch.stack(Rs) if len({r.shape for r in Rs}) == 1 else torch.cat([r.flatten() for r in Rs])
    sha256, short = base_digests(model, reuse=True)
    dtype = R.dtype if dtype is None else dtype
    if named:
        tensors = {state_key(layer, name): r.to(dtype) for (_, layer), r in zip(pairs, Rs, strict=True)}
    else:
        tensors = {"R": R.to(dtype)}
    tensors |= {
        "probe": torch.stack([probe(layer.A.detach(), layer.B.detach()) for _, layer in pairs]),
        "digests": short,
    }
    if bases or (bases is None and lost):
        for i, (_, layer) in enumerate(pairs):
            tensors[f"A.{i}"], tensors[f"B.{i}"] = layer.A, layer.B
    head_modules = heads(model)
    header = {
        "config": config.to_json(),
        "modules": pack([m.to_list() for m in modules]),
        "base_sha256": sha256,
        "stored_bases": json.dumps("A.0" in tensors),
        "heads": json.dumps([head.name for _, head in head_modules]),
    }
    folder = Path(path)
    adapter = files.sealed(tensors, header, ADAPTER_FORMAT)
    written = {}
    if head_modules:
        state = {
            f"{head.name}.{key}": value
            for module, head in head_modules
            for key, value in head.of(module, name).state_dict().items()
            if not key.startswith(HEAD + ".")
        }
        belongs = {"base_sha256": sha256, "adapter_sha256": adapter[1]["sha256"]}
        written[folder / HEAD_FILE] = files.sealed(state, belongs, HEAD_FORMAT)
    files.write_together({**written, folder / ADAPTER: adapter})
    return folder


def describe_adapter(path: str | Path) -> AdapterInfo:
    """What is in the adapter folder `path`, from its header alone."""
    file = Path(path) / ADAPTER
    return parse_header(file, files.read_header(file, ADAPTER_FORMAT))


def verify_adapter(path: str | Path) -> AdapterInfo:
    """What is in the adapter folder `path`, after reading all of it: a damaged file, and a task head that is missing or
    of another adapter, are refused."""
    file = Path(path) / ADAPTER
    _, header = files.read(file, ADAPTER_FORMAT)
    info = parse_header(file, header)
    if info.heads:
        stored_heads(info, Path(path), header["sha256"])
    return info


def load_adapter(
    model: Model,
    path: str | Path,
    *,
    name: str = "default",
    head: bool = True,
    check_base: bool = True,
    cache: str | Path | bool = True,
    progress: Progress | None = None,
) -> Model:
    """Load the adapter in the folder `path` onto a plain base model, or beside the adapters that a model has.

    On a plain model the adapter becomes the active one; on an adapted one call `set_active`. Nothing is
    changed unless everything fits.

    Args:
        name: to give it here.
        head: load the task head too; False leaves the model's own (for a start on another task).
        check_base: refuse base weights that differ. False is allowed only where the file stores its bases:
            an adapter trained over 4-bit weights can then run over the 16-bit ones.
        cache, progress: as for `inject`.
    """
    file = Path(path) / ADAPTER
    tensors, header = files.read(file, ADAPTER_FORMAT)
    info = parse_header(file, header)
    if not check_base and not info.stored_bases:
        raise LoRAXSError(f"{file} stores no bases, so its base weights must be checked: they are what it is made of")
    found = matching_modules(model, info, file)
    head_state = matching_heads(model, info, Path(path), header["sha256"]) if head and info.heads else {}
    if check_base:
        check_base_weights(model, info, tensors["digests"], file)
    Rs = [r.view(m.r_shape) for r, m in zip(_each_r(tensors, info, found), info.modules, strict=True)]
    on_plain = not is_adapted(model)
    if on_plain:
        requests = [Request(target, m.rank) for m, target in zip(info.modules, found, strict=True)]
        if info.stored_bases:
            pairs = [
                (tensors[f"A.{i}"].to(t.weight.device), tensors[f"B.{i}"].to(t.weight.device))
                for i, t in enumerate(found)
            ]
        else:
            folder = default_cache() if cache is True else Path(cache) if cache else None
            pairs = make_bases(requests, info.config, folder, progress)
    else:
        check_new(model, name)
        check_not_merged(model, "load_adapter")
        if info.config.train_bases:
            raise LoRAXSError(f"{file} trained its own bases; it cannot share those of the model's other adapters")
        pairs = [(layer.A.detach(), layer.B.detach()) for _, layer in layers(model)]
    for i, (A, B) in enumerate(pairs):
        if not bool(((probe(A, B) - tensors["probe"][i]).abs() <= PROBE_TOLERANCE).all()):
            raise LoRAXSError(
                f"the bases of {info.modules[i].name} are not those that {file} was trained on; "
                + ("load it onto a model without adapters." if not on_plain else "save it with bases=True instead")
            )
    if on_plain:
        bases = [(target, A, B) for target, (A, B) in zip(found, pairs, strict=True)]
        attach(model, info.config, name, bases, given=info.stored_bases)
    by_name = {layer.name: layer for _, layer in layers(model)}
    for m, R in zip(info.modules, Rs, strict=True):
        layer = by_name[m.name]
        layer.add(name, info.config, R)
        layer.activate(layer.active)
    for module, heads_ in heads(model):
        if not on_plain:
            heads_.add(module, name)
            heads_.activate(module, heads_.active)
        wanted = {k: v for k, v in head_state.items() if k.startswith(heads_.name + ".")}
        own = heads_.of(module, name).state_dict(keep_vars=True)
        with torch.no_grad():
            for key, value in wanted.items():
                own[key.removeprefix(heads_.name + ".")].copy_(value)
    watch(model)
    return model


def state_key(layer: XSLayer | Target, name: str) -> str:
    """The name of R of adapter `name` in the model's state dict."""
    through = layer.reader is not None if isinstance(layer, Target) else isinstance(layer, XSWeight)
    own = layer.name if layer.kind not in (MATRIX, STACK, STACK_T) else layer.name.removesuffix(f"{layer.parameter}")
    prefix = f"{own.removesuffix('.')}.{ATTRIBUTE}".removeprefix(".")
    return f"{prefix}.{layer.parameter}.R.{name}" if through else f"{prefix}.R.{name}"


def _each_r(tensors: dict[str, Tensor], info: AdapterInfo, found: list[Target]) -> tuple[Tensor, ...]:
    """The R of each module, from one tensor or by their names."""
    if "R" in tensors:
        return tensors["R"].flatten().split([m.trained for m in info.modules])
    by_place = {key.rpartition(".")[0]: tensor for key, tensor in tensors.items()}  # whatever the adapter was called
    return tuple(by_place[state_key(target, "").rpartition(".")[0]] for target in found)
