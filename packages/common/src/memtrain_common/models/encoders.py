"""Encoders with a task head, and their tokenizers: from folders of transformers, or by their names on the hub."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import UserError
from ..files import read_json

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
MOST_LAYERS = 1024
HEADS = ("classifier", "score")  # what transformers calls them


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


def from_pretrained(loader: Any, name: str, what: str, **kwargs: Any) -> Any:
    """``loader.from_pretrained(name)``, its failures as one sentence. Code of the model's own never runs.

    Args:
        loader: a class of transformers.
        name: a folder, or a name on the hub.
        what: what an error calls it: "model", "tokenizer".
        kwargs: for the loader.
    """
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"there is no folder {name}: --model needs a model's folder, or its name on the hub")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} has no config.json: --model needs a folder as transformers' save_pretrained writes it")
    _check_config(Path(name))
    try:
        with _quiet():
            return loader.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # transformers, safetensors, tokenizers and the hub fail by classes of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if "trust_remote_code" in str(error):  # no advice to run it anyway
            reason = "it needs code that comes with it, which is never run: give a model that transformers has itself"
        raise UserError(f"cannot load the {what} of {name} ({reason})") from error


def _check_config(folder: Path) -> None:
    """Refuse a folder whose config.json asks for more layers than any model has: they would be built before its
    weights are looked at."""
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        content = read_json(path)
        claimed = [(k, v) for k, v in content.items() if k in LAYERS and v is not None]
        too_many = next((f"{k} {v}" for k, v in claimed if not 0 <= int(v) <= MOST_LAYERS), None)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a model's configuration ({error})") from None
    if too_many is not None:
        raise UserError(f"{path} claims {too_many}: no model has more than {MOST_LAYERS} layers")


def model_parts(name: str) -> dict[str, str]:
    """The hash of a model's ``config.json``, of which its activations and norms are built, for a run's fingerprint.

    Layout and what does not change the function (the version that wrote it, the place it came from) are left out.

    Args:
        name: a folder, or a name on the hub, whose files are in the cache once the model was loaded.
    """
    path = Path(name) / "config.json"
    try:
        if not path.is_file():
            path = Path(str(transformers.utils.cached_file(name, "config.json")))
        content = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): it must be the model's configuration in JSON") from None
    kept = {k: v for k, v in content.items() if k not in ("_name_or_path", "transformers_version")}
    return {"the base model's config.json": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()}


def load_tokenizer(name: str) -> Any:
    """With a padding token: its own, or the end of text."""
    try:
        tokenizer = from_pretrained(transformers.AutoTokenizer, name, "tokenizer")
    except UserError:
        _refuse_pictures(name)
        raise
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name} has neither a padding nor an end token: it needs one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(name: str, num_labels: int, *, pad_id: int | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """A sequence classifier, and the modules that must be trained in full: its task head, and whatever else the folder
    lacks and starts at random (the pooler of an encoder that was saved without one). The model is in training mode,
    which transformers' loading leaves: its dropout is on.

    Args:
        num_labels: 1 is a regression.
        pad_id: of the tokenizer, where the model's configuration names none.
    """
    problem = "regression" if num_labels == 1 else "single_label_classification"
    model, loading = from_pretrained(
        transformers.AutoModelForSequenceClassification, name, "model", num_labels=num_labels, problem_type=problem,
        ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32,
    )  # fmt: skip
    if model.config.pad_token_id is None:  # a decoder's classifier looks for the last token that is none
        model.config.pad_token_id = pad_id
    heads = [n for n in HEADS if isinstance(getattr(model, n, None), nn.Module)]
    inside = tuple(f"{n}." for n in heads)
    wrong = [str(key[0]) for key in loading["mismatched_keys"] if not str(key[0]).startswith(inside)]
    if wrong:
        raise UserError(f"{name} has {wrong[0]} of another shape than its config.json says: the folder is inconsistent")
    fresh = {key.rpartition(".")[0] for key in loading["missing_keys"] if not key.startswith(inside)}
    return model.train(), (*heads, *sorted(fresh))


def load_causal_lm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in training mode, which transformers' loading leaves."""
    return from_pretrained(transformers.AutoModelForCausalLM, name, "model", dtype=dtype).train()


def _refuse_pictures(name: str) -> None:
    """Say so where a model has no tokenizer because it looks at pictures."""
    try:
        config = from_pretrained(transformers.AutoConfig, name, "configuration")
    except UserError:  # the tokenizer's own failure says what is wrong
        return
    reads = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and not reads:
        raise UserError(
            f"{name} holds a {config.model_type!r} model, which looks at pictures: choose a --model that reads text, "
            "or --data of pictures"
        )


POSITIONS = ("position_embeddings", "positions_embed", "wpe", "embed_positions", "pos_encoding")
"""What transformers calls the table of a model's positions: a module with a weight, or a tensor."""


def check_length(model: nn.Module, name: str, longest: int, max_length: int) -> str:
    """Whether a model has a position for every token; -> a sentence where it has no table of them (they are rotary,
    say) and was made for shorter rows, else "".

    Args:
        name: the model's, for messages.
        longest: tokens of the longest row.
        max_length: what rows were cut to.

    Raises:
        UserError: if rows are longer than the table.
    """
    made_for, most = positions_made_for(model.config), positions_of(model)
    if most and longest > most:
        raise UserError(
            f"--max-length {max_length} lets a row of {longest} tokens through, more than the {most} positions of "
            f"{name}: give at most {most}"
        )
    if not most and 0 < made_for < longest:
        return f"rows of up to {longest:,} tokens are longer than the {made_for:,} positions that {name} was made for"
    return ""


def positions_made_for(config: Any) -> int:
    """What a configuration of transformers says; 0 where it says nothing."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0


def positions_of(model: nn.Module) -> int:
    """The most tokens of a row for which a model has positions; 0 where it has no table of them (they are rotary)."""
    made_for = positions_made_for(model.config)
    tables = [n for module in model.modules() for n in _table_sizes(module) if n >= made_for - 8]  # not of latents
    return min([*tables, made_for] if made_for else tables) if tables else 0


def _table_sizes(module: nn.Module) -> Iterator[int]:
    """Positions in the tables that a module has."""
    for name in POSITIONS:
        table = getattr(module, name, None)
        if isinstance(table, torch.Tensor) and table.dim() == 2:  # sinusoids
            yield len(table)
        weight = getattr(table, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            padding = getattr(table, "padding_idx", None)
            # RoBERTa counts from behind its padding's position, OPT and BART from an offset of their own.
            yield len(weight) - (padding + 1 if padding is not None else int(getattr(table, "offset", 0)))
