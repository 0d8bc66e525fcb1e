"""Models and tokenizers from local folders or by their hub names, and adapters with what they were trained on."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from memtrain_common.errors import UserError
from memtrain_common.models.encoders import from_pretrained, load_causal_lm, load_classifier
from memtrain_common.training.fit_config import DTYPES
from torch import nn

from ..adapter_file import describe_adapter, load_adapter

TASK_FILE = "task.json"


def write_task(folder: Path, **content: Any) -> None:
    """Beside an adapter: its task and its base model, so that later commands need no flags for them."""
    (folder / TASK_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_task(adapter: Path) -> dict[str, Any]:
    """What :func:`write_task` wrote; empty for an adapter that was made elsewhere."""
    file = adapter / TASK_FILE
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): delete it, and give --model") from None
    return content if isinstance(content, dict) else {}


def load_adapted(adapter: str, model: str = "", dtype: str = "float32") -> tuple[nn.Module, str]:
    """The base model with the adapter active, and the base model's name.

    Args:
        model: the base model; empty takes the one that the adapter was trained on by these commands.
    """
    folder = Path(adapter)
    info = describe_adapter(folder)
    task = read_task(folder)
    name = model or task.get("model", "")
    if not name:
        raise UserError(f"--model is missing: {adapter} does not say which base model it is for")
    if info.heads:
        known = "num_labels" in task
        base = load_classifier(name, task["num_labels"])[0] if known else _by_architecture(name, dtype)
    else:
        base = load_causal_lm(name, DTYPES[dtype]) if task else _by_architecture(name, dtype)
    return load_adapter(base, folder).eval(), name


def _by_architecture(name: str, dtype: str) -> nn.Module:
    """The class that the folder's config.json names."""
    config = from_pretrained(transformers.AutoConfig, name, "configuration")
    architecture = (config.architectures or ["AutoModel"])[0]
    loader = getattr(transformers, architecture, None)
    if loader is None:
        raise UserError(f"{name} names the class {architecture}, which transformers {transformers.__version__} lacks")
    return from_pretrained(loader, name, "model", dtype=DTYPES[dtype])


def load_skeleton(name: str) -> nn.Module:
    """The model's modules on the meta device: shapes without numbers."""
    config = from_pretrained(transformers.AutoConfig, name, "configuration")
    architecture = (config.architectures or ["AutoModel"])[0]
    cls: Any = getattr(transformers, architecture, transformers.AutoModel)
    with torch.device("meta"):
        return cls(config) if cls is not transformers.AutoModel else cls.from_config(config)
