"""An adapter as PEFT's plain LoRA: B R A is a LoRA of rank r with lora_A = A and lora_B = B·R, so every tool that reads
PEFT's LoRA runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from . import files
from .adapters import chosen
from .errors import LoRAXSError
from .head import ATTRIBUTE as HEAD
from .head import heads
from .kinds import CONV1D, CONV2D, EMBEDDING
from .layer import XSWeight, layers
from .peft_differences import Differences

PREFIX = "base_model.model."
"""Of every key in PEFT's files."""


@torch.no_grad()
def export_peft(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write adapter `name` (None: the active one) as a LoRA for `PeftModel.from_pretrained`; the file has
    LoRA's size.

    Args:
        base_model: name or folder of the base model, for tools that load it from the adapter's configuration.
        dtype: of the file. B·R is multiplied in float32 and rounded once.

    Raises:
        LoRAXSError: naming a module whose LoRA would be another model in PEFT.
    """
    name = chosen(model, name, "export_peft")
    tensors: dict[str, Tensor] = {}
    pairs, head_modules, differences = layers(model), heads(model), Differences(model)
    for part, module in [*((x.name, m) for m, x in pairs), *((x.name, m) for m, x in head_modules)]:
        if reason := differences.of(part, module):
            raise LoRAXSError(f"{reason}: merge the adapter instead")
    for module, layer in pairs:
        if isinstance(layer, XSWeight):
            raise LoRAXSError(
                f"{layer.name} is adapted through its weight, where PEFT's LoRA adds to a module's answer: merge the "
                "adapter instead"
            )
        A, R = layer.A.detach().float(), layer.R[name].detach().float()
        BR = layer.B.detach().float() @ R
        prefix = f"{PREFIX}{layer.name}.lora_"
        kind = layer.kind
        if kind is EMBEDDING:
            factors = {"embedding_A": A, "embedding_B": BR}
        elif kind is CONV2D:
            assert isinstance(module.weight, Tensor)
            factors = {"A.weight": A.view(-1, *module.weight.shape[1:]), "B.weight": BR[:, :, None, None]}
        else:
            factors = {"A.weight": A, "B.weight": BR}
        tensors |= {prefix + key: value.to("cpu", dtype).contiguous() for key, value in factors.items()}
    for module, head in head_modules:
        for key, value in head.of(module, name).state_dict().items():
            if not key.startswith(HEAD + "."):
                tensors[f"{PREFIX}{head.name}.{key}"] = value.cpu().contiguous().clone()
    config = pairs[0][1].configs[name]
    plain = {layer.name for _, layer in pairs if layer.kind is not CONV1D}
    written = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha if config.alpha is not None else config.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": len(plain) == 0,
        "init_lora_weights": True,
        "use_rslora": False,
        "target_modules": [layer.name for _, layer in pairs],
        "modules_to_save": [head.name for _, head in head_modules] or None,
        # PEFT reads the keys as regular expressions that end a module's name.
        "rank_pattern": {re.escape(layer.name): layer.rank for _, layer in pairs if layer.rank != config.rank},
        "alpha_pattern": {
            re.escape(layer.name): config.alpha_of(layer.name)
            for _, layer in pairs
            if config.alpha_of(layer.name) != (config.alpha if config.alpha is not None else config.rank)
        },
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
    return folder
