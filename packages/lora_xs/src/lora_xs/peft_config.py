"""PEFT's `LoraConfig` read as a LoRA-XS configuration."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from .errors import LoRAXSError

if TYPE_CHECKING:
    from peft import LoraConfig

# Read below, or without a meaning for what is adapted (LoRA-XS draws its own R, and knows Conv1D's layout by itself).
KNOWN = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "lora_dropout", "use_rslora"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters", "task_type"),
    *("fan_in_fan_out", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_type"),
    *("peft_version", "runtime_config", "low_cpu_mem_usage"),
}

# Task heads that PEFT saves for a task without being told.
_HEADS = {"QUESTION_ANS": ("qa_outputs",)}
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


def fields_of(config: LoraConfig) -> dict[str, Any]:
    """The fields of a :class:`lora_xs.LoRAXSConfig` that adapts what PEFT's would; see its ``from_peft``."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise LoRAXSError(f"from_peft takes PEFT's LoraConfig, not a {type(config).__name__}")
    _refuse_what_has_no_counterpart(config)
    targets = config.target_modules
    parameters = tuple(config.target_parameters or ())
    if targets is None and not parameters:
        raise LoRAXSError(
            "this LoraConfig names no target_modules, and PEFT would choose them by the model's architecture: "
            'name them, or give "all-linear"'
        )
    if isinstance(targets, str) and parameters:
        raise LoRAXSError("target_parameters can be read beside target_modules that are a list, not a string")
    # rsLoRA scales by α/√r; as α/r that is an α of √r times as much.
    ranks = _by_suffix(config.rank_pattern, "rank_pattern")
    alphas: dict[str, Any] = _by_suffix(config.alpha_pattern, "alpha_pattern")
    alpha: float = config.lora_alpha
    if config.use_rslora:
        if ranks or alphas:
            raise LoRAXSError("use_rslora can be read without rank_pattern and alpha_pattern, not with them")
        alpha *= math.sqrt(config.r)
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        raise LoRAXSError(f"exclude_modules must be a list of names here, not the regular expression {exclude!r}")
    indices = config.layers_to_transform
    return dict(
        rank=config.r,
        alpha=alpha,
        targets=targets if isinstance(targets, str) else (*sorted(targets or ()), *parameters),
        exclude=tuple(sorted(exclude or ())),
        head=_head(config),
        dropout=config.lora_dropout,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        layers_to_transform=(indices,) if isinstance(indices, int) else tuple(indices) if indices else None,
        layers_pattern=tuple([p] if isinstance(p := config.layers_pattern or (), str) else p),
    )


def _refuse_what_has_no_counterpart(config: LoraConfig) -> None:
    defaults = type(config)()
    initial = config.init_lora_weights
    # True, False and "gaussian" say how LoRA's own A and B begin, which LoRA-XS has from the SVD.
    if not isinstance(initial, bool) and initial != "gaussian":
        raise LoRAXSError(f"init_lora_weights={initial!r} changes the base weights or the bases; LoRA-XS has its own")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in KNOWN or field.name == "init_lora_weights" or value == getattr(defaults, field.name):
            continue
        raise LoRAXSError(f"this LoraConfig has {field.name}={value!r}, for which LoRA-XS has no counterpart")


def _head(config: LoraConfig) -> tuple[str, ...] | None:
    """None: `classifier` and `score` where the model has them, as PEFT does for classification."""
    saved = tuple(config.modules_to_save or ())
    task = str(getattr(config.task_type, "value", config.task_type))
    if task in _CLASSIFIERS and not set(saved) & {"classifier", "score"}:
        if saved:
            raise LoRAXSError(
                f"modules_to_save={list(saved)} and task_type={task}: PEFT adds the classifier; name it too"
            )
        return None
    return tuple(dict.fromkeys((*saved, *_HEADS.get(task, ()))))


def _by_suffix(pattern: dict[str, Any] | None, what: str) -> dict[str, Any]:
    """PEFT's keys are regular expressions for the end of a name; ours are the end itself."""
    found = {}
    for key, value in (pattern or {}).items():
        plain = re.sub(r"\\(.)", r"\1", key.removeprefix("^").removesuffix("$"))
        if re.search(r"[*+?\[\](){}|]", plain):
            raise LoRAXSError(f"{what} has the regular expression {key!r}; here its keys are ends of names")
        found[plain] = value
    return found
