"""Models and tokenizers from local folders or by their hub names, and adapters with what they were trained on."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from memtrain_common.errors import UserError
from torch import nn

from ..adapter_file import describe_adapter, load_adapter
from ..config import USUAL_HEADS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TASK_FILE = "task.json"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A fresh task head is what was asked for; transformers need not warn of it."""
    logger = logging.getLogger("transformers")
    before, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Without what other packages say of their own deprecations and of kernels that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _load(loader: Any, name: str, what: str, **kwargs: Any) -> Any:
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"there is no folder {name}: --model needs a model's folder, or its name on the hub")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} has no config.json: --model needs a folder as transformers' save_pretrained writes it")
    try:
        with _quiet():
            return loader.from_pretrained(name, **kwargs)
    except Exception as error:  # transformers, safetensors, tokenizers and the hub fail by classes of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"cannot load the {what} of {name} ({reason})") from error


def load_tokenizer(name: str) -> Any:
    """With a padding token: its own, or the end of text."""
    tokenizer = _load(transformers.AutoTokenizer, name, "tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name} has neither a padding nor an end token: it needs one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(name: str, num_labels: int, *, pad_id: int | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """A sequence classifier, and the modules that must be trained in full: its task head, and whatever else the folder
    lacks and starts at random (the pooler of an encoder that was saved without one).

    Args:
        num_labels: 1 is a regression.
        pad_id: of the tokenizer, where the model's configuration names none.
    """
    problem = "regression" if num_labels == 1 else "single_label_classification"
    model, loading = _load(
        transformers.AutoModelForSequenceClassification, name, "model", num_labels=num_labels, problem_type=problem,
        ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32,
    )  # fmt: skip
    if model.config.pad_token_id is None:  # a decoder's classifier looks for the last token that is none
        model.config.pad_token_id = pad_id
    heads = [n for n in USUAL_HEADS if isinstance(getattr(model, n, None), nn.Module)]
    inside = tuple(f"{n}." for n in heads)
    wrong = [str(key[0]) for key in loading["mismatched_keys"] if not str(key[0]).startswith(inside)]
    if wrong:
        raise UserError(f"{name} has {wrong[0]} of another shape than its config.json says: the folder is inconsistent")
    fresh = {key.rpartition(".")[0] for key in loading["missing_keys"] if not key.startswith(inside)}
    return model, (*heads, *sorted(fresh))


def load_causal_lm(name: str, dtype: str = "float32") -> nn.Module:
    return _load(transformers.AutoModelForCausalLM, name, "model", dtype=DTYPES[dtype])


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
        base = load_causal_lm(name, dtype) if task else _by_architecture(name, dtype)
    return load_adapter(base, folder).eval(), name


def _by_architecture(name: str, dtype: str) -> nn.Module:
    """The class that the folder's config.json names."""
    config = _load(transformers.AutoConfig, name, "configuration")
    architecture = (config.architectures or ["AutoModel"])[0]
    loader = getattr(transformers, architecture, None)
    if loader is None:
        raise UserError(f"{name} names the class {architecture}, which transformers {transformers.__version__} lacks")
    return _load(loader, name, "model", dtype=DTYPES[dtype])


def load_skeleton(name: str) -> nn.Module:
    """The model's modules on the meta device: shapes without numbers."""
    config = _load(transformers.AutoConfig, name, "configuration")
    architecture = (config.architectures or ["AutoModel"])[0]
    cls: Any = getattr(transformers, architecture, transformers.AutoModel)
    with torch.device("meta"):
        return cls(config) if cls is not transformers.AutoModel else cls.from_config(config)
