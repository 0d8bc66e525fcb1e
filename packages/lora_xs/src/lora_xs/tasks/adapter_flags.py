"""``lora-xs merge``, ``export-peft``, ``import`` and ``info``: flags and checks."""

from dataclasses import dataclass
from typing import Literal

from memtrain_common.commands.configure import required
from memtrain_common.errors import UserError

from .shared_flags import AdapterFlags, Dtype

ADAPTER = "give an adapter's folder, as training writes it"
OUT = "name the folder to write"


@dataclass(frozen=True)
class MergeConfig(AdapterFlags):
    """Every flag of lora-xs merge."""

    out: str = ""
    """Folder to write: a transformers model with its tokenizer, new or empty."""
    base_dtype: Dtype = "float32"
    """Of the base weights, and of the merged ones; it must be the one that the adapter was trained with."""


@dataclass(frozen=True)
class ExportConfig(AdapterFlags):
    """Every flag of lora-xs export-peft."""

    out: str = ""
    """Folder to write: adapter_config.json and adapter_model.safetensors, new or empty."""
    dtype: Dtype = "float32"
    """Of the exported factors."""


@dataclass(frozen=True)
class ImportConfig:
    """Every flag of lora-xs import."""

    folder: str = ""
    """Folder to read (or the first word), as the official code or PEFT writes it: adapter_config.json and
    adapter_model.safetensors or .bin."""
    model: str = ""
    """The base model's folder or hub name."""
    out: str = ""
    """Folder to write: an adapter, new or empty."""
    bases: Literal["auto", "svd", "official", "file"] = "auto"
    """Where A and B come from: the SVD of the base weights, by our algorithm or by the official one (then R alone is
    saved), or the file (then they are saved too). auto takes the first of these that is exact."""
    base_dtype: Dtype = "float32"
    """Of the base weights."""


@dataclass(frozen=True)
class InfoConfig:
    """Every flag of lora-xs info."""

    adapter: str = ""
    """Adapter folder to describe; or leave it out and give --model."""
    model: str = ""
    """A model's folder or hub name: with --adapter, whether the adapter fits it; alone, what adapters would cost."""
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Without --adapter, ranks to count for."""
    targets: tuple[str, ...] = ()
    """Without --adapter, modules by the ends of their names; empty takes the paper's for the model's family."""


def check_info(config: InfoConfig) -> InfoConfig:
    """The configuration itself.

    Raises:
        UserError: naming what is missing or out of range.
    """
    if not config.adapter and not config.model:
        raise UserError("--adapter and --model are both missing: give at least one of them")
    if not config.adapter:
        required(config, ranks="give at least one rank")
        if min(config.ranks) < 1:
            raise UserError(f"--ranks must be at least 1, got {min(config.ranks)}")
    return config
