"""Models by their shapes alone, with a batch for them: known names, folders of transformers, Google's npz."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .classifiers import MODELS, build_classifier, classification_loss, usual_size

# Language models: configuration class, what differs from its defaults, task class
_LANGUAGE: dict[str, tuple[str, dict[str, int], str]] = {
    "bert-base": ("BertConfig", {}, "BertForSequenceClassification"),
    "bert-large": (
        "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        "BertForSequenceClassification",
    ),
    "roberta-base": (
        "RobertaConfig",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        "RobertaForSequenceClassification",
    ),
    "gpt2": ("GPT2Config", {}, "GPT2LMHeadModel"),
    "gpt2-medium": ("GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, "GPT2LMHeadModel"),
    "gpt2-large": ("GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, "GPT2LMHeadModel"),
    "gpt2-xl": ("GPT2Config", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, "GPT2LMHeadModel"),
}
KNOWN = (*MODELS, *_LANGUAGE)


@dataclass(frozen=True)
class Shaped:
    """A model that can be made any number of times, and the loss of a batch of its own making."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    sample: str
    """What a batch holds, in words."""
    size: dict[str, int]
    """The same by its field of :class:`Wanted`: "image_size" of pictures, "sequence_length" of tokens."""


@dataclass(frozen=True)
class Wanted:
    """Which model, and a batch of what."""

    model: str
    """One of :data:`KNOWN`, a folder of transformers (its config.json decides, no weights are read), or Google's
    npz."""
    batch_size: int = 8
    image_size: int = 0
    """Pixels of a picture's side; 0 takes the model's usual."""
    sequence_length: int = 128
    classes: int = 100
    finish: Callable[[nn.Module], nn.Module] = lambda model: model
    """What is done to each model that is made: ``requires_grad``, the kind of attention."""


def shaped(config: Wanted) -> Shaped:
    """The model, and the loss of a batch for it; random numbers come from torch's generator.

    Raises:
        UserError: if there is no such model.
    """
    name, path = config.model, Path(config.model)
    if name in MODELS:
        return _pictures(config, lambda size: build_classifier(name, config.classes, image_size=size).model,
                         usual_size(name) or 32)  # fmt: skip
    if name in _LANGUAGE:
        import transformers

        kind, changed, task = _LANGUAGE[name]
        settings = getattr(transformers, kind)(**changed)
        if "Classification" in task:
            settings.num_labels = config.classes
        return _tokens(config, settings, lambda s: getattr(transformers, task)(s))
    if path.suffix == ".npz" and path.is_file():

        def load(size: int) -> nn.Module:
            return build_classifier("vit-b-16", config.classes, weights=name, image_size=size).model

        return _pictures(config, load, 224)
    if path.is_dir():
        return _folder(config, path)
    raise UserError(
        f"{name!r} is no known model and no folder: give one of {', '.join(KNOWN)}, or a folder of transformers"
    )


def _folder(config: Wanted, path: Path) -> Shaped:
    import transformers

    from .encoders import from_pretrained

    settings = from_pretrained(transformers.AutoConfig, str(path), "configuration")
    images = type(settings) in transformers.AutoModelForImageClassification._model_mapping
    if images:
        settings.num_labels = config.classes
        usual = getattr(settings, "image_size", 224)
        usual = usual if isinstance(usual, int) else usual[0]

        def build(size: int) -> nn.Module:
            if hasattr(settings, "image_size"):
                settings.image_size = size
            return transformers.AutoModelForImageClassification.from_config(settings)

        return _pictures(config, build, usual)
    named = (getattr(settings, "architectures", None) or [""])[0]
    causal = named.endswith(("LMHeadModel", "ForCausalLM"))
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    if not causal:
        settings.num_labels = config.classes
    if settings.pad_token_id is None:
        settings.pad_token_id = 0
    return _tokens(config, settings, auto.from_config)


def _pictures(config: Wanted, build: Callable[[int], nn.Module], usual: int) -> Shaped:
    size = config.image_size or usual

    def loss(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        pixels = torch.randn(config.batch_size, 3, size, size, device=device)
        return classification_loss(model, (pixels, torch.zeros(config.batch_size, dtype=torch.long, device=device)))

    words = f"{config.batch_size} pictures of {size}×{size} pixels"
    return Shaped(lambda: config.finish(build(size)), loss, words, {"image_size": size})


def _tokens(config: Wanted, settings: Any, build: Callable[[Any], nn.Module]) -> Shaped:
    from .encoders import positions_made_for, positions_of

    length = config.sequence_length

    def check(most: int) -> None:
        if 0 < most < length:
            raise UserError(f"--sequence-length {length} is beyond the {most} positions of {config.model}")

    check(positions_made_for(settings))

    def made() -> nn.Module:
        model = build(settings)
        check(positions_of(model))  # RoBERTa's first two are its padding's
        return config.finish(model)

    def loss(model: nn.Module) -> Tensor:
        ids = torch.randint(3, settings.vocab_size, (config.batch_size, length))
        labels = ids if "Classification" not in type(model).__name__ else torch.zeros(config.batch_size).long()
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    words = f"{config.batch_size} sequences of {length} tokens"
    return Shaped(made, loss, words, {"sequence_length": length})
