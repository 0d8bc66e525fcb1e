"""Shapes of well-known models by name, without a network, or of a folder with a ``config.json``. No torch here.

The numbers are those of the models' published ``config.json``; the tests hold the parameters that they add up to
against the published totals.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from memtrain_common.errors import UserError
from memtrain_common.files import read_json

Task = Literal["pictures", "text", "language"]
TASKS: dict[str, Task] = {
    "vit": "pictures", "cnn": "pictures", "bert": "text", "roberta": "text", "xlm-roberta": "text", "gpt2": "language",
    "llama": "language", "mistral": "language", "qwen2": "language",
}  # fmt: skip
"""transformers' ``model_type`` -> what such a model is fine-tuned on: pictures or text with labels, or tokens."""

# width, blocks, heads, pixels of an image's side, pixels of a patch's side; the MLP is 4 widths
VITS = {
    "google/vit-base-patch16-224": (768, 12, 12, 224, 16),
    "google/vit-base-patch16-224-in21k": (768, 12, 12, 224, 16),
    "google/vit-base-patch16-384": (768, 12, 12, 384, 16),
    "google/vit-base-patch32-224-in21k": (768, 12, 12, 224, 32),
    "google/vit-base-patch32-384": (768, 12, 12, 384, 32),
    "google/vit-large-patch16-224": (1024, 24, 16, 224, 16),
    "google/vit-large-patch16-224-in21k": (1024, 24, 16, 224, 16),
    "google/vit-large-patch16-384": (1024, 24, 16, 384, 16),
    "google/vit-large-patch32-224-in21k": (1024, 24, 16, 224, 32),
    "google/vit-large-patch32-384": (1024, 24, 16, 384, 32),
    "google/vit-huge-patch14-224-in21k": (1280, 32, 16, 224, 14),
    "facebook/deit-tiny-patch16-224": (192, 12, 3, 224, 16),
    "facebook/deit-small-patch16-224": (384, 12, 6, 224, 16),
    "facebook/deit-base-patch16-224": (768, 12, 12, 224, 16),
    "facebook/deit-base-patch16-384": (768, 12, 12, 384, 16),
    # as finetune names them
    "vit-mini": (96, 4, 4, 28, 7),
    "vit-ti-16": (192, 12, 3, 224, 16),
    "vit-s-16": (384, 12, 6, 224, 16),
    "vit-b-16": (768, 12, 12, 224, 16),
    "vit-l-16": (1024, 24, 16, 224, 16),
}
CNNS = {"resnet18": 224, "resnet50": 224, "mobilenet_v2": 224, "proxyless_mobile": 224, "resnet20": 32}
"""As ``finetune`` names them -> pixels of an image's side."""
# model_type, vocabulary, width, blocks, heads, positions, token types; the MLP is 4 widths
ENCODERS = {
    "google-bert/bert-base-uncased": ("bert", 30522, 768, 12, 12, 512, 2),
    "google-bert/bert-base-cased": ("bert", 28996, 768, 12, 12, 512, 2),
    "google-bert/bert-large-uncased": ("bert", 30522, 1024, 24, 16, 512, 2),
    "google-bert/bert-large-cased": ("bert", 28996, 1024, 24, 16, 512, 2),
    "google-bert/bert-base-multilingual-uncased": ("bert", 105879, 768, 12, 12, 512, 2),
    "google-bert/bert-base-multilingual-cased": ("bert", 119547, 768, 12, 12, 512, 2),
    "google/bert_uncased_L-2_H-128_A-2": ("bert", 30522, 128, 2, 2, 512, 2),
    "google/bert_uncased_L-4_H-256_A-4": ("bert", 30522, 256, 4, 4, 512, 2),
    "google/bert_uncased_L-4_H-512_A-8": ("bert", 30522, 512, 4, 8, 512, 2),
    "google/bert_uncased_L-8_H-512_A-8": ("bert", 30522, 512, 8, 8, 512, 2),
    "FacebookAI/roberta-base": ("roberta", 50265, 768, 12, 12, 514, 1),
    "FacebookAI/roberta-large": ("roberta", 50265, 1024, 24, 16, 514, 1),
    "distilbert/distilroberta-base": ("roberta", 50265, 768, 6, 12, 514, 1),
    "FacebookAI/xlm-roberta-base": ("xlm-roberta", 250002, 768, 12, 12, 514, 1),
    "FacebookAI/xlm-roberta-large": ("xlm-roberta", 250002, 1024, 24, 16, 514, 1),
}
# width, blocks, heads
GPT2S = {
    "openai-community/gpt2": (768, 12, 12),
    "openai-community/gpt2-medium": (1024, 24, 16),
    "openai-community/gpt2-large": (1280, 36, 20),
    "openai-community/gpt2-xl": (1600, 48, 25),
    "distilbert/distilgpt2": (768, 6, 12),
}
# model_type, vocabulary, width, MLP, blocks, heads, heads of keys and values, positions, is the output the embedding's?
DECODERS = {
    "huggyllama/llama-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, 2048, False),
    "meta-llama/Llama-2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, 4096, False),
    "meta-llama/Llama-2-13b": ("llama", 32000, 5120, 13824, 40, 40, 40, 4096, False),
    "meta-llama/Llama-2-70b": ("llama", 32000, 8192, 28672, 80, 64, 8, 4096, False),
    "meta-llama/Meta-Llama-3-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 8192, False),
    "meta-llama/Meta-Llama-3-70B": ("llama", 128256, 8192, 28672, 80, 64, 8, 8192, False),
    "meta-llama/Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 131072, False),
    "meta-llama/Llama-3.1-70B": ("llama", 128256, 8192, 28672, 80, 64, 8, 131072, False),
    "meta-llama/Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, 131072, True),
    "meta-llama/Llama-3.2-3B": ("llama", 128256, 3072, 8192, 28, 24, 8, 131072, True),
    "TinyLlama/TinyLlama-1.1B": ("llama", 32000, 2048, 5632, 22, 32, 4, 2048, False),
    "HuggingFaceTB/SmolLM-135M": ("llama", 49152, 576, 1536, 30, 9, 3, 2048, True),
    "HuggingFaceTB/SmolLM-360M": ("llama", 49152, 960, 2560, 32, 15, 5, 2048, True),
    "mistralai/Mistral-7B-v0.1": ("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, False),
    "mistralai/Mistral-7B-v0.2": ("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, False),
    "mistralai/Mistral-7B-v0.3": ("mistral", 32768, 4096, 14336, 32, 32, 8, 32768, False),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 32768, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 32768, False),
}


@dataclass(frozen=True)
class Shape:
    """A model's architecture, from which it can be built with random weights, or fake ones."""

    name: str
    family: str
    """transformers' ``model_type``; "cnn" is one of ``memtrain_common.models.classifiers``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of transformers' configuration."""

    @property
    def task(self) -> Task:
        return TASKS[self.family]

    @property
    def depth(self) -> int:
        """Blocks; 0 of a CNN, whose blocks differ."""
        return 0 if self.family == "cnn" else int(self.config[self._depth_field])

    @property
    def uniform(self) -> bool:
        """Whether all blocks between the first and the last are alike, so that what holds of a few tells of many."""
        return self.family != "cnn" and len(set(self.config.get("layer_types") or [0])) == 1

    @property
    def positions(self) -> int:
        """The most tokens that the model can tell apart; 0 where positions are rotary, or there are no tokens."""
        if self.family == "gpt2":
            return int(self.config.get("n_positions", 1024))
        padding = 2 if "roberta" in self.family else 0  # their first position is the padding's, and counted from
        return int(self.config["max_position_embeddings"]) - padding if self.task == "text" else 0

    @property
    def image_size(self) -> int:
        return int(self.config.get("image_size", 224)) if self.task == "pictures" else 0

    @property
    def _depth_field(self) -> str:
        return "n_layer" if self.family == "gpt2" else "num_hidden_layers"

    def with_depth(self, blocks: int) -> "Shape":
        """The same with another number of blocks."""
        config = {**self.config, self._depth_field: blocks}
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][:1] * blocks
        return replace(self, config=config)

    def changed(self, **fields: Any) -> "Shape":
        """The same with other fields of the configuration."""
        return replace(self, config={**self.config, **fields})


def find_shape(name: str) -> Shape:
    """The shape of a well-known model, or of a folder with a ``config.json``.

    Args:
        name: as on the hub, with or without its owner; "-Instruct", "-Chat" and "-hf" do not matter.

    Raises:
        UserError: if it is neither (with the nearest names), or a model that has no shape here.
    """
    if Path(name).is_dir():
        return _from_folder(Path(name))
    shapes = _all()
    found = shapes.get(_key(name))
    if found is not None:
        return replace(found, name=name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name}: --model needs a model's name, or a folder with a config.json")
    near = difflib.get_close_matches(_key(name), shapes, n=3, cutoff=0.6)
    hint = f" (did you mean {' or '.join(shapes[k].name for k in near)}?)" if near else ""
    raise UserError(
        f"no shape of {name!r} is known{hint}; --list-models names those that are, and a folder with the model's "
        "config.json will do for any other"
    )


def known_names() -> list[str]:
    """Names of all shapes, as on the hub."""
    return [s.name for s in _all().values()]


def _key(name: str) -> str:
    """What tells a shape: the name after its owner, without what says how it was tuned."""
    word = name.rstrip("/").rpartition("/")[2].lower().replace("meta-llama", "llama")
    if word.startswith("tinyllama-1.1b"):
        return "tinyllama-1.1b"
    return re.sub(r"-(instruct|chat|hf)(?=-|$)", "", word)


def _all() -> dict[str, Shape]:
    found = [Shape(n, "cnn", {"image_size": size}) for n, size in CNNS.items()]
    for n, (width, blocks, heads, image, patch) in VITS.items():
        found.append(
            Shape(n, "vit", {
                "hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads,
                "intermediate_size": 4 * width, "image_size": image, "patch_size": patch, "num_labels": 1000,
            })
        )  # fmt: skip
    for n, (family, vocab, width, blocks, heads, positions, types) in ENCODERS.items():
        found.append(
            Shape(n, family, {
                "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads,
                "intermediate_size": 4 * width, "max_position_embeddings": positions, "type_vocab_size": types,
            })
        )  # fmt: skip
    for n, (width, blocks, heads) in GPT2S.items():
        found.append(Shape(n, "gpt2", {"n_embd": width, "n_layer": blocks, "n_head": heads, "vocab_size": 50257}))
    for n, (family, vocab, width, mlp, blocks, heads, kv_heads, positions, tied) in DECODERS.items():
        found.append(
            Shape(n, family, {
                "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": blocks,
                "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": positions,
                "tie_word_embeddings": tied,
            })
        )  # fmt: skip
    return {_key(s.name): s for s in found}


MOST_BLOCKS = 1024


def _from_folder(folder: Path) -> Shape:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json: --model needs a folder as transformers' save_pretrained writes it"
        )
    try:
        config = read_json(path)
        family = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a configuration of transformers: it must be JSON with a model_type") from None
    if family not in TASKS or family == "cnn":
        raise UserError(
            f"{path} is of a {family}, which plan does not know; it knows {', '.join(t for t in TASKS if t != 'cnn')}"
        )
    config = {k: v for k, v in config.items() if k not in ("model_type", "dtype", "torch_dtype", "quantization_config")}
    shape = Shape(str(folder), family, config)
    if shape._depth_field not in config:
        raise UserError(f"{path} has no {shape._depth_field}: the number of blocks is needed")
    depth = config[shape._depth_field]
    if not isinstance(depth, int) or isinstance(depth, bool) or not 0 < depth <= MOST_BLOCKS:
        raise UserError(f"{path} has {shape._depth_field} {depth!r}: a model has 1 to {MOST_BLOCKS} blocks")
    return shape
