"""PEFT's folders read: plain LoRA, and the checkpoints that the official LoRA-XS code writes.

The official code patches PEFT 0.10 and writes a third matrix for each module, `lora_latent_mapping`, which is R; PEFT
itself drops it without a word.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .bases import Progress, Request, default_cache, make_bases
from .config import LoRAXSConfig, matches
from .errors import LoRAXSError
from .injection import attach
from .kinds import matrix_shape
from .layer import is_adapted, layers
from .peft_config import KNOWN
from .peft_differences import Differences
from .peft_export import PREFIX
from .targets import resolve
from .untrained import watch

Model = TypeVar("Model", bound=nn.Module)

RESIDUAL = 1e-3
"""Relative part of an imported update outside the SVD bases that is refused."""

EXACT = 1e-5
"""Relative part outside the bases up to which bases="auto" takes them instead of the file's."""

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)"
    r"(?:\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.default)?(?:\.weight)?"
    r"|[._](?:default_)?lora_latent_mapping\.weight)$"
)


@torch.no_grad()
def import_peft(
    model: Model,
    path: str | Path,
    *,
    name: str = "default",
    bases: Literal["svd", "official", "file", "auto"] = "svd",
    head: bool | tuple[str, ...] = True,
    cache: str | Path | bool = True,
    progress: Progress | None = None,
) -> Model:
    """Load a PEFT LoRA folder, or a checkpoint of the official LoRA-XS code, onto a plain base model.

    Args:
        name: of the adapter here.
        bases: "svd" expresses the update in the SVD bases of the model's weights and refuses one that does not lie in
            them (to 1e-3), so that R alone need be saved; "official" does so in those of the official code. "file" is
            exact for every LoRA: it takes A and B from the file (for a plain LoRA, B from lora_B = B·R with B
            orthonormal) and stores them whenever the adapter is saved. "auto" is the first of "svd" and "official" (for
            a checkpoint of the official code) in which the whole update lies to 1e-5, else "file".
        head: load the task head too; False leaves the model's own (for a start on another task), and names leave it and
            say which modules it is.
        cache, progress: as for `inject`.

    Raises:
        LoRAXSError: where the folder is damaged, is for another model, or was another function in PEFT, where it was
            trained, than it would be here.
    """
    if bases not in ("svd", "official", "file", "auto"):
        raise LoRAXSError(f'bases must be "svd", "official", "file" or "auto", not {bases!r}')
    if is_adapted(model):
        raise LoRAXSError("import_peft needs a plain base model; import there, save_adapter, and load_adapter here")
    folder = Path(path)
    settings = _read_settings(folder)
    factors, rest = read_factors(folder)
    named = dict(model.named_modules())
    for key in factors:
        if key not in named:
            raise LoRAXSError(f"{folder} is an adapter for another model: this one has no module {key}")
    # In the model's order, which is that of the adapters.
    factors = {key: factors[key] for key in named if key in factors}
    config = _config(settings, factors, rest, named, folder)
    try:
        targets = resolve(model, factors, config)
    except LoRAXSError as error:
        raise LoRAXSError(f"{folder} is an adapter for another model: {error}") from error
    differences = Differences(model)
    for key in (*targets, *((config.head or ()) if head is True else ())):
        if reason := differences.of(key, named[key]):
            raise LoRAXSError(f"{folder} cannot be imported: {reason}, so that it would be another model here")
    for key, f in factors.items():
        out, width = matrix_shape(targets[key].weight, targets[key].kind)
        if (f.B.shape[0], f.A.shape[1]) != (out, width):
            raise LoRAXSError(
                f"{folder} is an adapter for another model: {key} is {out}×{width} here, its update is "
                f"{f.B.shape[0]}×{f.A.shape[1]}"
            )
    requests = [Request(target, factors[key].A.shape[0]) for key, target in targets.items()]
    store = default_cache() if cache is True else Path(cache) if cache else None
    found = _in_bases(bases, requests, config, factors, folder, lambda c: make_bases(requests, c, store, progress))
    if found is None:
        own = [f.orthonormal() for f in factors.values()]
        devices = [target.weight.device for target in targets.values()]
        pairs = [(f.A.to(d), f.B.to(d)) for f, d in zip(own, devices, strict=True)]
        Rs = [f.matrix for f in own]
    else:
        config, pairs, Rs = found
    if head is not True:
        rest, config = {}, dataclasses.replace(config, head=None if head is False else head)
    state = model.state_dict()
    for key, value in rest.items():
        if key not in state or state[key].shape != value.shape:
            raise LoRAXSError(f"{folder} has {key} of shape {tuple(value.shape)}, which does not fit this model")
    attach(
        model,
        config,
        name,
        [(target, *pair) for target, pair in zip(targets.values(), pairs, strict=True)],
        given=found is None,
    )
    for (_, layer), R in zip(layers(model), Rs, strict=True):
        layer.R[name].copy_(R)
    for key, value in rest.items():
        state[key].copy_(value)
    watch(model)
    return model


@dataclass(frozen=True)
class _Factors:
    """One module's update: B R A, or B A where R is None."""

    A: Tensor
    B: Tensor
    R: Tensor | None

    @property
    def matrix(self) -> Tensor:
        """R, where there is one."""
        assert self.R is not None
        return self.R

    def orthonormal(self) -> _Factors:
        """The same product with an R."""
        if self.R is not None:
            return self
        Q, T = torch.linalg.qr(self.B.float())
        return _Factors(self.A, Q.to(self.B.dtype) if self.B.dtype == torch.float64 else Q, T)


def _in_bases(
    bases: str,
    requests: list[Request],
    config: LoRAXSConfig,
    factors: dict[str, _Factors],
    folder: Path,
    make: Callable[[LoRAXSConfig], list[tuple[Tensor, Tensor]]],
) -> tuple[LoRAXSConfig, list[tuple[Tensor, Tensor]], list[Tensor]] | None:
    """The configuration, bases and R of the way that `bases` names; None where the file's own bases are needed."""
    official = any(f.R is not None for f in factors.values())
    ways = {"svd": ["randomized"], "official": ["official"], "file": []}.get(bases)
    if ways is None:  # "auto"
        ways = ["randomized", *(["official"] if official and find_spec("sklearn") else [])]
    for way in ways:
        chosen = dataclasses.replace(config, svd=way)  # type: ignore[arg-type]
        pairs = make(chosen)
        projected = {key: _project(f, A, B) for (key, f), (A, B) in zip(factors.items(), pairs, strict=True)}
        worst = max(projected, key=lambda key: projected[key][1])
        left = projected[worst][1]
        if left <= (EXACT if bases == "auto" else RESIDUAL):
            return chosen, pairs, [R for R, _ in projected.values()]
        if bases != "auto":
            raise LoRAXSError(
                f"the update of {worst} in {folder} lies outside the SVD bases of this model's weight "
                f'(by {left:.1%}); import it with bases="file"'
            )
    return None


def _project(f: _Factors, A: Tensor, B: Tensor) -> tuple[Tensor, float]:
    """R with B R A closest to the update (r×r), and the relative part of the update that is left."""
    A, B = A.to("cpu", torch.float64), B.to("cpu", torch.float64)
    A_file, B_file = f.A.double(), f.B.double() if f.R is None else f.B.double() @ f.R.double()
    R = torch.linalg.pinv(B) @ B_file @ (A_file @ torch.linalg.pinv(A))
    left, right = torch.cat([B @ R, -B_file], dim=1), torch.cat([A, A_file])  # their product is the difference
    total, difference = _product_norm(B_file, A_file), _product_norm(left, right)
    return R, difference / total if total else 0.0


def _product_norm(X: Tensor, Y: Tensor) -> float:
    """‖X Y‖ without the product: X = Q₁T₁ and Yᵀ = Q₂T₂ give ‖T₁T₂ᵀ‖, with the digits that squares would lose."""
    return float((torch.linalg.qr(X).R @ torch.linalg.qr(Y.t()).R.t()).norm())


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
    except FileNotFoundError as error:
        raise LoRAXSError(f"there is no file {folder / 'adapter_config.json'}") from error
    except (ValueError, RecursionError) as error:
        raise LoRAXSError(f"{folder / 'adapter_config.json'} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise LoRAXSError(f"{folder / 'adapter_config.json'} is no object with named settings")
    if settings.get("peft_type") != "LORA":
        raise LoRAXSError(f"{folder} holds a {settings.get('peft_type')} adapter; only LORA can be imported")
    if settings.get("bias", "none") != "none":
        raise LoRAXSError(f"{folder} trains biases (bias={settings['bias']!r}); it cannot be imported")
    initial = settings.get("init_lora_weights", True)
    if not isinstance(initial, bool) and initial not in _STARTS:
        raise LoRAXSError(
            f"{folder} was begun with init_lora_weights={initial!r}, which changes the base weights too: save it with "
            "PEFT's path_initial_model_for_weight_conversion, which writes a plain LoRA, or merge it into its base"
        )
    for option, value in settings.items():
        if value and option not in _PLAIN and value != _default_of(option):
            raise LoRAXSError(f"{folder} uses {option}, which is more than B·A; it cannot be imported")
    return settings


_PLAIN = KNOWN | {
    *("bias", "init_lora_weights", "megatron_core", "qalora_group_size", "eva_config", "loftq_config"),
    "ensure_weight_tying",
}
"""Settings that leave the update B·A, or mean nothing without another one that does not."""
_STARTS = ("gaussian", "orthogonal", "eva")
"""How A and B may begin, besides True and False, without a change of the base weights."""


def _default_of(option: str) -> Any:
    """Of a setting that only newer versions of PEFT write."""
    if find_spec("peft") is None:
        return None
    from peft import LoraConfig

    return getattr(LoraConfig(), option, None)


def read_factors(folder: Path) -> tuple[dict[str, _Factors], dict[str, Tensor]]:
    """Factors by module, and the other tensors (the task head) by their names in the model."""
    file = folder / "adapter_model.safetensors"
    if file.exists():
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise LoRAXSError(f"{file} is no complete safetensors file ({error}); was it truncated?") from error
    elif (file := folder / "adapter_model.bin").exists():
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise LoRAXSError(f"{file} cannot be read safely: it is damaged or holds more than tensors") from error
    else:
        raise LoRAXSError(f"{folder} has neither adapter_model.safetensors nor adapter_model.bin")
    parts: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in tensors.items():
        if match := _KEY.match(key):
            # An Embedding's factors are stored as they are, a Conv2d's with its kernel's dimensions.
            parts.setdefault(match["module"], {})[match["factor"] or "R"] = value.flatten(1)
        elif "lora_" in key:
            raise LoRAXSError(f"{file} has the entry {key}, which is neither lora_A, lora_B nor a latent mapping")
        elif ".original_module." not in key:
            rest[
                key.removeprefix(PREFIX).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            ] = value
    factors = {}
    for module, part in parts.items():
        for factor in "AB":
            if factor not in part:
                raise LoRAXSError(f"{file} has no lora_{factor} for {module}; the file is incomplete")
        factors[module] = _Factors(part["A"], part["B"], part.get("R"))
    if not factors:
        raise LoRAXSError(f"{file} holds no LoRA matrices")
    return factors, rest


def _config(
    settings: dict[str, Any],
    factors: dict[str, _Factors],
    rest: dict[str, Tensor],
    named: dict[str, nn.Module],
    folder: Path,
) -> LoRAXSConfig:
    rank = settings["r"]
    alpha_at = _pattern(settings.get("alpha_pattern") or {}, settings["lora_alpha"])
    ranks = {key: f.A.shape[0] for key, f in factors.items()}
    # rsLoRA scales by α/√r; as α/r that is an α of √r times as much.
    alphas = {
        key: float(alpha_at(key)) * (math.sqrt(ranks[key]) if settings.get("use_rslora") else 1) for key in factors
    }
    alpha = next(iter(alphas.values()))
    saved = settings.get("modules_to_save") or []
    head = dict.fromkeys(_head_of(key, saved, named, factors) for key in rest)
    if "" in head:
        raise LoRAXSError(f"{folder} saves {next(iter(rest))} (modules_to_save={saved}), which this model lacks")
    return LoRAXSConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(factors),
        rank_pattern={key: r for key, r in ranks.items() if r != rank},
        alpha_pattern={key: a for key, a in alphas.items() if a != alpha},
        head=tuple(head),
    )


def _head_of(key: str, saved: list[str], named: dict[str, nn.Module], factors: dict[str, _Factors]) -> str:
    """The module that is trained in full because `key` is saved: one that `modules_to_save` names, else the outermost
    without adapters (PEFT adds a classifier without naming it); "" where there is none."""
    around = [n for n in named if n and key.startswith(n + ".")]  # outermost first
    plain = [n for n in around if not any(f"{target}.".startswith(n + ".") for target in factors)]
    return next(iter([n for n in plain if matches(n, saved)] or plain), "")


def _pattern(pattern: dict[str, Any], default: Any) -> Callable[[str], Any]:
    def at(key: str) -> Any:
        return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", key)), default)

    return at
