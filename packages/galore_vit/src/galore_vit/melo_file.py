"""MeLo's own safetensors layout: `w_a_000`, `w_b_000`, … (query and value in turn) and `fc_{in}in_{out}out`.

Beside the published keys a file holds the head's bias (`…_bias`), which the published code loses, and
metadata (rank, alpha, blocks, and a SHA-256 of it all, which older files lack). A published reader finds its keys and
overlooks the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from galore_vit.melo import HEAD, MeLo, adapted, add_melo, add_task, block_of, head_wrapper, projections

HEAD_KEY = re.compile(r"fc_(\d+)in_(\d+)out$")


def write_melo(model: Any, path: str | Path, task: str = "default") -> None:
    """Writes a task's adapter and whole head.

    Raises:
        ValueError: if the adapter, one of PEFT's own, computes what a MeLo file cannot state.
    """
    from safetensors.torch import save_file

    pairs, head = adapted(model, task), head_wrapper(model).modules_to_save[task]
    _refuse_what_no_file_holds(model, task)
    rank, alpha = _rank_and_alpha(model, task)
    with_adapter = [name for name, m in projections(model) if task in getattr(m, "lora_A", {})]
    blocks = sorted({block_of(name) for name in with_adapter})  # PEFT shortens the names in its configuration
    key = f"fc_{head.in_features}in_{head.out_features}out"
    tensors = {f"w_a_{i:03d}": A for i, (A, _) in enumerate(pairs)} | {
        f"w_b_{i:03d}": B for i, (_, B) in enumerate(pairs)
    }
    tensors |= {key: head.weight} | ({} if head.bias is None else {f"{key}_bias": head.bias})
    settings = json.dumps({"rank": rank, "alpha": alpha, "layers": blocks})
    plain = {k: v.detach().resolve_neg().contiguous().cpu() for k, v in tensors.items()}
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{Path(path).absolute().parent} does not exist: make the folder first")
    save_file(plain, str(path), metadata={"melo": settings, "sha256": _checksum(plain, settings)})


def _rank_and_alpha(model: Any, task: str) -> tuple[int, float]:
    """r and the α by which α / r is the scale that the layers multiply by, whatever PEFT made it from."""
    layers: list[Any] = [m for _, m in projections(model) if task in getattr(m, "lora_A", {})]
    for what, values in (("rank", {m.r[task] for m in layers}), ("scale", {m.scaling[task] for m in layers})):
        if len(values) > 1:
            raise ValueError(
                f"the layers of task {task!r} differ in their {what} ({', '.join(map(str, sorted(values)))}), and a "
                "MeLo file states one for all"
            )
    rank, scale, alpha = layers[0].r[task], layers[0].scaling[task], model.peft_config[task].lora_alpha
    return rank, alpha if alpha / rank == scale else scale * rank


def _refuse_what_no_file_holds(model: Any, task: str) -> None:
    """Raises ValueError where a task has more than a pair (A, B) for each projection and a head."""
    if any(task in getattr(m, "lora_variant", {}) for m in model.modules()):
        raise ValueError(f"task {task!r} uses DoRA or another variant of LoRA, which a MeLo file does not hold")
    if model.peft_config[task].bias != "none":
        raise ValueError(f"task {task!r} trains biases of the model, which a MeLo file does not hold")
    held = {t for pair in adapted(model, task) for t in pair} | set(head_wrapper(model).parameters())
    own = re.compile(rf"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.{re.escape(task)}(\.|$)")
    for name, p in model.named_parameters():
        if own.search(name) and p not in held:
            raise ValueError(f"task {task!r} has {name}, and a MeLo file holds query, value and the head alone")


def read_melo(model: nn.Module | Any, path: str | Path, task: str = "default", *, alpha: float | None = None) -> Any:
    """Adds a file's adapter and head to a ViT (as a further task where it has some); returns the model.

    `alpha` must be given for a file of the published code, which does not hold it, and only then; such a file
    holds no head bias either, and the bias is then zero, with a warning.

    Raises:
        ValueError: if the file is damaged, no MeLo file, or not for this model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name the MeLo file in it")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # the handle is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    ours = {"melo", "sha256"} & set(metadata)  # two keys, so that one is left where the other's name is damaged
    if (
        ours
        and set(metadata) - {"format", "melo"}
        and metadata.get("sha256") != _checksum(tensors, metadata.get("melo", ""))
    ):
        raise ValueError(f"{path} is damaged: its contents do not have the SHA-256 that its header states")
    pairs = _pairs(tensors, path)
    config = _settings(metadata, alpha, pairs, model, path)
    keys = [k for k in tensors if HEAD_KEY.fullmatch(k)]
    if len(keys) != 1:
        raise ValueError(f"{path} holds {len(keys)} heads named fc_…in_…out, and a MeLo file holds one")
    weight, bias = tensors[keys[0]], tensors.get(f"{keys[0]}_bias")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_fit(base, config, pairs, weight, bias, ours=bool(ours), path=path)
    if not isinstance(model, PeftModel):
        model = add_melo(model, config, task)
        _fit_head(model, task, len(weight))
    elif task in model.peft_config:
        raise ValueError(f"the model has a task {task!r} already: give the file another name")
    else:
        add_task(model, config, task, len(weight))
    head = head_wrapper(model).modules_to_save[task]
    if bias is None and head.bias is not None:
        warnings.warn(
            f"{path} holds no head bias" + ("" if ours else " (the published code saves none)") + ": it is zero now",
            UserWarning,
            stacklevel=2,
        )
        bias = torch.zeros(len(weight))
    targets = [t for pair in adapted(model, task) for t in pair]
    heads = [(head.weight, weight)] + ([(head.bias, bias)] if bias is not None else [])
    with torch.no_grad():
        for target, source in [*zip(targets, (t for pair in pairs for t in pair), strict=True), *heads]:
            target.copy_(source)
    return model


def _check_fit(
    model: nn.Module, config: MeLo, pairs: list[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor | None, *,
    ours: bool, path: str | Path,
) -> None:  # fmt: skip
    """Raises ValueError where the file is not for this model, before anything of the model is changed."""
    layers: list[Any] = [
        m for name, m in projections(model) if config.layers is None or block_of(name) in config.layers
    ]
    if len(layers) != len(pairs):
        raise ValueError(f"{path} holds {len(pairs)} adapters, and the model has {len(layers)} projections for them")
    head = getattr(model, HEAD, None)
    head = getattr(head, "original_module", head)
    if not isinstance(head, nn.Linear):
        return  # said when the adapter is added
    if (bias is None) != (head.bias is None) and (ours or bias is not None):
        has, wants = ("no bias", "one") if bias is None else ("a bias", "none")
        raise ValueError(f"{path} holds a head with {has}, and the model's has {wants}")
    wanted: list[tuple[int, ...]]
    wanted = [s for m in layers for s in ((config.rank, m.in_features), (m.out_features, config.rank))]
    wanted += [(len(weight), head.in_features)] + ([(len(weight),)] if bias is not None else [])
    held = [t for pair in pairs for t in pair] + [weight] + ([bias] if bias is not None else [])
    for tensor, shape in zip(held, wanted, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{path} holds a tensor of {tuple(tensor.shape)} where the model has {shape}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path} holds numbers that are NaN or infinite: it is damaged, or its training diverged")


def _checksum(tensors: dict[str, Tensor], settings: str) -> str:
    sha = hashlib.sha256(settings.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _pairs(tensors: dict[str, Tensor], path: str | Path) -> list[tuple[Tensor, Tensor]]:
    count = sum(key.startswith("w_a_") for key in tensors)
    try:
        pairs = [(tensors[f"w_a_{i:03d}"], tensors[f"w_b_{i:03d}"]) for i in range(count)]
    except KeyError as error:
        raise ValueError(
            f"{path} has no tensor {error}: a MeLo file numbers w_a_ and w_b_ alike, without gaps"
        ) from error
    if not pairs:
        raise ValueError(f"{path} is no MeLo file: it holds no w_a_000")
    return pairs


def _settings(
    metadata: dict[str, str],
    alpha: float | None,
    pairs: list[tuple[Tensor, Tensor]],
    model: nn.Module,
    path: str | Path,
) -> MeLo:
    rank = len(pairs[0][0])
    if "melo" in metadata:
        if alpha is not None:
            raise ValueError(f"{path} holds its own alpha: leave alpha out")
        try:
            saved = json.loads(metadata["melo"])
            layers = tuple(map(int, saved["layers"])) or None  # none were written of models with ten blocks and more
            return MeLo(rank, float(saved["alpha"]), layers)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} does not say its alpha and layers as MeLo files here do ({error!r})") from None
    if alpha is None:
        raise ValueError(f"{path} does not hold its alpha (the published code keeps it in the file name): give alpha")
    blocks = {block_of(name) for name, _ in projections(model)}
    if len(pairs) != 2 * len(blocks):
        raise ValueError(
            f"{path} holds {len(pairs)} adapters, and the model's {len(blocks)} blocks need {2 * len(blocks)}"
        )
    return MeLo(rank, alpha)


def _fit_head(model: Any, task: str, classes: int) -> None:
    """Replaces the task's head where it has another number of outputs."""
    heads = head_wrapper(model).modules_to_save
    old = heads[task]
    if old.out_features != classes:
        heads[task] = nn.Linear(
            old.in_features, classes, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
        )
        config = getattr(model.get_base_model(), "config", None)
        if config is None or not hasattr(config, "num_labels"):
            return
        try:
            config.num_labels = classes  # by which transformers computes the loss
        except dataclasses.FrozenInstanceError:
            model.get_base_model().config = dataclasses.replace(config, num_labels=classes)
