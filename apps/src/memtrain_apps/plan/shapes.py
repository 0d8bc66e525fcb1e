"""Shapes of well-known models by name, without a network, or of a folder with a ``config.json``. No torch here.

The numbers are those of the models' published ``config.json``; the tests hold the parameters that they add up to
against the published totals.
"""

import difflib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from memtrain_common.errors import UserError
from memtrain_common.files import read_json

Task = Literal["pictures", "text", "language", "pairs"]
TASKS: dict[str, Task] = {
    "vit": "pictures", "cnn": "pictures", "bert": "text", "roberta": "text", "xlm-roberta": "text", "gpt2": "language",
    "llama": "language", "mistral": "language", "qwen2": "language",
}  # fmt: skip
"""transformers' ``model_type`` -> what such a model is fine-tuned on: pictures or text with labels, tokens, or pairs of
texts (encoder-decoders). What it is of any other, the folder's ``architectures`` say."""
ARCHITECTURES: dict[str, Task] = {
    "ForImageClassification": "pictures", "ForSequenceClassification": "text", "ForMaskedLM": "text",
    "ForPreTraining": "text", "ForCausalLM": "language", "LMHeadModel": "language",
    "ForConditionalGeneration": "pairs",
}  # fmt: skip
"""The end of a class's name -> its task."""
UNIFORM = {"gpt_neox", "opt", "phi", "qwen3", "mixtral", "deit", "electra"}
"""Besides TASKS, families whose blocks are alike; of others a model is counted at its whole depth."""
PADDED = re.compile("roberta|camembert|data2vec|ibert|layoutlmv3|lilt|longformer|markuplm|mpnet|xmod|esm|luke")
"""Families whose positions begin behind the padding's, which ``max_position_embeddings`` counts too."""
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")

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
    other_task: Task = "pictures"
    """Of a family that is not in TASKS."""

    @property
    def task(self) -> Task:
        return TASKS.get(self.family, self.other_task)

    @property
    def depth(self) -> int:
        """Blocks; 0 where it is not known, or where they differ."""
        return int(self.config.get(self._depth_field, 0)) if self.family not in ("cnn", "timm") else 0

    @property
    def uniform(self) -> bool:
        """Whether all blocks between the first and the last are alike, so that what holds of a few tells of many."""
        known = self.family in UNIFORM or (self.family in TASKS and self.family != "cnn")
        return known and self.depth > 0 and len(set(self.config.get("layer_types") or [0])) == 1

    @property
    def positions(self) -> int:
        """The most tokens that the model can tell apart; 0 where positions are rotary, or there are no tokens."""
        if self.family == "gpt2":
            return int(self.config.get("n_positions", 1024))
        padding = int(self.config.get("pad_token_id", 1) or 0) + 1 if PADDED.search(self.family) else 0
        known = int(self.config.get("max_position_embeddings") or 0)
        return max(0, known - padding) if self.task == "text" or self.family == "opt" else 0

    @property
    def image_size(self) -> int:
        return int(self.config.get("image_size", 224)) if self.task == "pictures" else 0

    @property
    def _depth_field(self) -> str:
        if self.family == "gpt2":
            return "n_layer"
        return next((n for n in DEPTHS if n in self.config), DEPTHS[0])

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
        name: as on the hub, with or without its owner; "-Instruct", "-Chat" and "-hf" do not matter. Or a model of
            timm, where that is installed.

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
    from_timm = _from_timm(name)
    if from_timm is not None:
        return from_timm
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
    if not isinstance(family, str):
        raise UserError(f"{path} is not a configuration of transformers: its model_type must be a name")
    task = TASKS.get(family) or _task_of(config, path)
    config = {k: v for k, v in config.items() if k not in ("model_type", "dtype", "torch_dtype", "quantization_config")}
    shape = Shape(str(folder), family, config, task)
    if family in TASKS and shape._depth_field not in config:
        raise UserError(f"{path} has no {shape._depth_field}: the number of blocks is needed")
    depth = config.get(shape._depth_field, 1)  # of some families there is none
    if not isinstance(depth, int) or isinstance(depth, bool) or not 0 < depth <= MOST_BLOCKS:
        raise UserError(f"{path} has {shape._depth_field} {depth!r}: a model has 1 to {MOST_BLOCKS} blocks")
    return shape


def _task_of(config: Mapping[str, Any], path: Path) -> Task:
    """By the name of the class that the folder was saved from."""
    names = [str(n) for n in config.get("architectures") or []]
    for end, task in ARCHITECTURES.items():
        if any(n.endswith(end) for n in names):
            return task
    said = f"architectures {', '.join(names)}" if names else "no architectures"
    raise UserError(
        f"{path} has {said}, which do not say what the model is trained on: plan knows classes that end in "
        f"{', '.join(ARCHITECTURES)}"
    )


def _from_timm(name: str) -> Shape | None:
    """A model of timm, with the input that its weights were made for."""
    if "/" in name.removeprefix("timm/") or not importlib.util.find_spec("timm"):
        return None
    import timm

    word = name.removeprefix("timm/")
    if not timm.is_model(word):
        return None
    return Shape(word, "timm", {"image_size": timm_size(word), "num_labels": 1000})


def timm_size(name: str) -> int:
    """Pixels of a picture's side that timm's weights were made for."""
    import timm

    known = timm.get_pretrained_cfg(name)
    return int(known.input_size[1]) if known is not None else 224
