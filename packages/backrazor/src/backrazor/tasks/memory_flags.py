"""``backrazor-memory``: flags and checks. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memtrain_common.commands.configure import at_least, fraction, refuse_unused
from memtrain_common.errors import UserError
from memtrain_common.files import check_targets

from .razor_flags import RazorFlags

PROG = "backrazor-memory"
KNOWN = (
    "vit-mini", "vit-ti-16", "vit-s-16", "vit-b-16", "vit-l-16", "resnet18", "resnet50", "mobilenet_v2",
    "proxyless_mobile", "resnet20", "bert-base", "bert-large", "roberta-base", "gpt2",
    "gpt2-medium", "gpt2-large", "gpt2-xl",
)  # fmt: skip
DESCRIPTION = f"""What every layer of MODEL saves for the backward pass: dense, and by Back Razor.

MODEL is one of {", ".join(KNOWN)}; a folder of transformers (its config.json decides, no weights are read); or Google's
ViT as .npz.

usage: {PROG} MODEL [flags]"""


@dataclass(frozen=True)
class MemoryConfig(RazorFlags):
    """Every flag of backrazor-memory."""

    model: str = ""
    """The model; the command's first word is the same."""
    batch_size: int = 8
    """Samples of a micro-batch."""
    image_size: int = 0
    """Pixels of a picture's side; 0 takes the model's usual."""
    sequence_length: int = 128
    """Tokens of a sequence, for language models."""
    classes: int = 100
    """Outputs of a classifier's head."""
    train: Literal["full", "bitfit", "head"] = "full"
    """What is trained: where a weight is frozen, its layer's input is not saved."""
    eager: bool = False
    """Attention written out (softmax of a product), where transformers' default is scaled_dot_product_attention."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast's dtype."""
    measure: bool = False
    """Run the step on real tensors, and count what it holds, instead of predicting it."""
    layers: Literal["alike", "all", "none"] = "alike"
    """The table's rows: layers that differ in a block's number alone are added up (alike), or all, or none."""
    out: str = ""
    """File for the picture (.png, .svg, .pdf); empty draws none."""
    json: str = ""
    """File for all numbers, in bytes."""
    overwrite: bool = False
    """Write over files that exist."""


PICTURES = (".png", ".svg", ".pdf")
"""What --out may end in."""


def check(config: MemoryConfig) -> MemoryConfig:
    """The configuration itself.

    Raises:
        UserError: naming the flag and what would be right.
    """
    if not config.model:
        raise UserError(f"MODEL is missing: give one of {', '.join(KNOWN)}, or a folder of transformers")
    at_least(config, batch_size=1, image_size=0, sequence_length=1, classes=2)
    fraction(config, "keep")
    if config.out and Path(config.out).suffix not in PICTURES:
        raise UserError(f"--out {config.out} must end in one of {', '.join(PICTURES)}")
    check_targets({"--out": config.out, "--json": config.json})
    for name in ("out", "json"):
        if (path := getattr(config, name)) and Path(path).exists() and not config.overwrite:
            raise UserError(f"--{name} {path} exists: choose another file, or write over it with --overwrite")
    if config.model in KNOWN:
        check_size(config, pictures=not config.model.startswith(("bert", "roberta", "gpt2")))
    return config


def check_size(config: MemoryConfig, *, pictures: bool) -> None:
    """Refuse the size of what the model does not see."""
    unused, seen = ("sequence_length", "pictures") if pictures else ("image_size", "tokens")
    refuse_unused(config, MemoryConfig(), (unused,), f"{config.model} sees {seen}")
