"""``galore-vit info``: the MedMNIST sets, and a ViT's optimizer state by optimizer and rank."""

import hashlib
import warnings
from pathlib import Path

import torch
from memtrain_common.console import Console, format_bytes, format_table
from memtrain_common.data.images.medmnist import file_name
from memtrain_common.data.images.medmnist_sets import SETS, SIZES
from memtrain_common.errors import UserError
from memtrain_common.models.vit import build_vit

from ..adamw import GaLoreAdamW
from ..adamw8bit import GaLoreAdamW8bit
from ..galore import GaLore
from ..groups import param_groups
from ..scaled import GaLoreScaled
from ..state_size import state_bytes
from .flags import InfoConfig

KINDS = {"galore-adamw": GaLoreAdamW, "galore-adamw8bit": GaLoreAdamW8bit, "galore-scaled": GaLoreScaled}


def run_info(config: InfoConfig) -> None:
    """Everything that ``galore-vit info`` does once its flags are checked."""
    console = Console()
    console.say("MedMNIST 2D sets (version 3)")
    heading = ("set", "task", "classes", "channels", "train", "val", "test", "license")
    rows: list[tuple[str, ...]] = [heading]
    rows += [(s.flag, s.task, str(s.classes), str(s.channels), *map(str, s.samples), s.license) for s in SETS.values()]
    console.say(format_table(rows))
    if config.data_dir:
        console.say(format_table(files(Path(config.data_dir))))
    model = (
        f"ViT-{config.model}, patches of {config.patch_size} pixels in {config.image_size}, {config.classes} classes"
    )
    console.say(f"optimizer state of {model}, float32")
    console.say(format_table(state_table(config)))


def files(folder: Path) -> list[tuple[str, str]]:
    """(file, what its MD5 says) of every MedMNIST file in a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: --data-dir names the one with MedMNIST's npz files")
    rows = []
    for known in SETS.values():
        for size, published in zip(SIZES, known.md5, strict=True):
            path = folder / file_name(known.flag, size)
            if path.is_file():
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "md5").hexdigest()
                rows.append((path.name, "MD5 as published" if found == published else f"MD5 {found}, not {published}"))
    return rows or [(str(folder), "holds no MedMNIST file")]


def state_table(config: InfoConfig) -> list[tuple[str, ...]]:
    """Bytes of state by optimizer, on the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = build_vit(
            config.model, image_size=config.image_size, patch_size=config.patch_size, classes=config.classes
        )
    plain = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    rows: list[tuple[str, ...]] = [("optimizer", "state", "AdamW's over it"), ("adamw", format_bytes(plain), "1.0")]
    for rank in config.ranks:
        for name, kind in KINDS.items():
            size = _galore_bytes(model, kind, rank)
            shown = ("projects nothing", "") if size is None else (format_bytes(size), f"{plain / size:.1f}")
            rows.append((f"{name}, rank {rank}", *shown))
    return rows


def _galore_bytes(model: torch.nn.Module, kind: type[GaLoreAdamW], rank: int) -> int | None:
    """None where no weight has a side above the rank."""
    try:
        groups = param_groups(model, rank)
    except ValueError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weights that stay plain: they are counted so
        optimizer: GaLore = kind(groups)
    optimizer.init_state()
    return state_bytes(optimizer)
