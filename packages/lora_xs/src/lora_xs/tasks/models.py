"""Models and tokenizers from local folders or by their hub names, and adapters with what they were trained on."""

from pathlib import Path
from typing import Any

import torch
import transformers
from memtrain_common.errors import UserError
from memtrain_common.files import read_json, write_json
from memtrain_common.models.encoders import from_pretrained, load_causal_lm, load_classifier
from memtrain_common.training.fit_config import DTYPES
from torch import nn

from ..adapter_file import describe_adapter, load_adapter
from ..adapter_header import ADAPTER
from ..config import USUAL_HEADS
from ..layer import layers
from ..peft_import import import_peft, read_factors

TASK_FILE = "task.json"


def write_task(folder: Path, **content: Any) -> None:
    """Beside an adapter: its task and its base model, so that later commands need no flags for them."""
    write_json(folder / TASK_FILE, content)


def read_task(adapter: Path) -> dict[str, Any]:
    """What :func:`write_task` wrote; empty for an adapter that was made elsewhere."""
    file = adapter / TASK_FILE
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
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
        base = _classifier(name, task["num_labels"], dtype) if known else _by_architecture(name, dtype)
    else:
        base = load_causal_lm(name, DTYPES[dtype]) if task else _by_architecture(name, dtype)
    return load_adapter(base, folder).eval(), name


def _classifier(name: str, num_labels: int, dtype: str) -> nn.Module:
    return load_classifier(name, num_labels)[0].to(DTYPES[dtype])


def is_foreign(folder: str | Path) -> bool:
    """Whether `folder` holds what PEFT or the official code writes, and no adapter of ours."""
    return not (Path(folder) / ADAPTER).exists() and (Path(folder) / "adapter_config.json").exists()


def start_from(model: nn.Module, folder: str | Path, head: tuple[str, ...], rank: int = 0) -> nn.Module:
    """The R of an adapter, or of a checkpoint of the official code, on a plain model, which keeps its own head.

    Args:
        head: the modules of the model's own head.
        rank: that the flags ask for; 0 asks for none.
    """
    if is_foreign(folder):
        import_peft(model, folder, bases="auto", head=head)
    else:
        load_adapter(model, folder, head=False)
    found = layers(model)[0][1].bases_config.rank
    if rank not in (0, found):
        raise UserError(f"--rank {rank} is not the rank of {folder}, which is {found}: leave the flag out")
    return model


def labels_of(folder: str | Path) -> int:
    """Classes of the task head in a folder of PEFT's; 0 where it has none."""
    _, rest = read_factors(Path(folder))
    heads = [value for key, value in sorted(rest.items()) if key.startswith(USUAL_HEADS) and value.ndim == 2]
    return heads[-1].shape[0] if heads else 0


def load_for_import(name: str, labels: int, dtype: str) -> nn.Module:
    """The base model that a folder of PEFT's is for."""
    if labels:
        return load_classifier(name, labels)[0].to(DTYPES[dtype])
    return _by_architecture(name, dtype)


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
    try:
        with torch.device("meta"):
            return cls(config) if cls is not transformers.AutoModel else cls.from_config(config)
    except Exception as error:  # a model's class may raise anything at a configuration that it cannot be built by
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{name} is no {config.model_type} that transformers builds: {reason}") from error
