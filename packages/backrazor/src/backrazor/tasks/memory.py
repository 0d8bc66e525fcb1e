"""The composition behind ``backrazor-memory``: one step dense, one by Back Razor; tables, picture, numbers."""

import contextlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memtrain_common.console import format_bytes, format_table
from memtrain_common.errors import UserError
from memtrain_common.files import write_json
from memtrain_common.measuring.memory import SavedActivations
from memtrain_common.measuring.prediction import fake_step
from memtrain_common.models.shaped import Shaped, Wanted
from memtrain_common.models.shaped import shaped as shaped_model
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.loop import DTYPES
from torch import nn

from .memory_flags import MemoryConfig, check_size
from .memory_picture import plot_saved
from .saving import razor_of, train_only

Places = dict[tuple[str, str], int]
"""(layer, operation) -> bytes saved."""

HEADS = ("classifier", "score", "head", "fc", "linear", "lm_head")


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    dense: int
    """Bytes."""
    razor: int
    """Bytes."""

    def cells(self, batch: int) -> list[str]:
        times = f"{self.dense / self.razor:.1f}×" if self.razor and self.dense else "–"
        return [self.name, format_bytes(self.dense / batch), format_bytes(self.razor / batch), times]


def run_memory(config: MemoryConfig) -> tuple[Places, Places]:
    """Everything that ``backrazor-memory`` does; -> what is saved dense, and by Back Razor."""
    if config.dtype == "bfloat16" and config.measure:
        avoid_broken_amx()
    with contextlib.suppress(ModuleNotFoundError):
        import transformers  # fake_step tells it something, so it must be loaded by then, where it is installed

        transformers.utils.logging.set_verbosity_error()  # it remarks on configurations that are plain defaults
    razor = razor_of(config)
    try:
        model = shaped(config)
        check_size(config, pictures="image_size" in model.size)
        dense, order = saved(config, model, nullcontext)
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # without a Razor yet: the model itself cannot, or not with this input
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{config.model} cannot take a training step as it was asked: {why}") from error
    if not sum(dense.values()):
        raise UserError(
            f"{config.model} has nothing to save: no operation of it keeps an activation for the backward pass"
        )
    kept, _ = saved(config, model, lambda: razor)
    named = {layer: layer if config.layers == "all" else alike(layer) for layer in order}
    places = {name: i for i, name in reversed(list(enumerate(named.values())))}
    layers = sorted(rows(dense, kept, lambda layer, _: named[layer]), key=lambda r: places[r.name])
    operations = sorted(rows(dense, kept, lambda _, operation: operation), key=lambda r: -r.dense)
    total = Row("total", sum(dense.values()), sum(kept.values()))
    how = "measured on real tensors" if config.measure else "predicted, nothing allocated"
    print(f"{config.model}, {model.sample}, {config.dtype}, {config.train} training: saved per sample ({how})")
    head = ["", "dense", f"Back Razor, keep {config.keep:g}", ""]
    if config.layers != "none":
        print("\nby layer")
        print(format_table([head, *(r.cells(config.batch_size) for r in layers)]))
    print("\nby operation that saved it first (a tensor that several save is stored once)")
    print(format_table([head, *(r.cells(config.batch_size) for r in [*operations, total])]))
    if total.razor >= total.dense:
        print("Back Razor saves nothing here: what this step keeps is already small, or is not pruned")
    if config.out:
        title = f"{config.model}, {model.sample}"
        plot_saved(layers, operations, total, Path(config.out), title=title, batch=config.batch_size)
        print(f"\npicture {config.out}")
    if config.json:
        write_json(Path(config.json), as_json(config, model, dense, kept))
        print(f"numbers {config.json}")
    return dense, kept


def saved(
    config: MemoryConfig, model: Shaped, saving: Callable[[], AbstractContextManager[Any]]
) -> tuple[Places, list[str]]:
    """What one forward pass keeps, by layer and operation; and the layers' names in the model's order.

    On real tensors the backward pass is run too, to see that it can be.
    """
    with nullcontext() if config.measure else fake_step():
        made = model.build()
        recording = SavedActivations(made, by_operation=True)
        with saving(), torch.autocast("cpu", DTYPES[config.dtype], enabled=config.dtype != "float32"), recording:
            loss = model.loss(made)
        found = recording.by_operation()
        if config.measure:
            loss.backward()
        del loss
    return found, [*(name for name, _ in made.named_modules() if name), "(model)"]


def rows(dense: Places, kept: Places, name: Callable[[str, str], str]) -> list[Row]:
    """Both, added up under names."""
    sums: dict[str, list[int]] = {}
    for column, places in enumerate((dense, kept)):
        for (layer, operation), n_bytes in places.items():
            sums.setdefault(name(layer, operation), [0, 0])[column] += n_bytes
    return [Row(label, *values) for label, values in sums.items()]


def alike(layer: str) -> str:
    """A layer's name without its block's number: "vit.layers.3.mlp.fc1" -> "vit.layers.*.mlp.fc1"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer, count=1)


def as_json(config: MemoryConfig, model: Shaped, dense: Places, kept: Places) -> dict[str, Any]:
    """Everything in bytes of the whole batch."""
    places = [*dense, *(p for p in kept if p not in dense)]
    return {
        "unit": "bytes",
        "model": config.model,
        "batch": model.sample,
        "batch_size": config.batch_size,
        **model.size,
        "classes": config.classes,
        "train": config.train,
        "dtype": config.dtype,
        "eager": config.eager,
        "keep": config.keep,
        "razor_mode": config.razor_mode,
        "attention": config.attention,
        "values": config.values,
        "recompute": config.recompute,
        "exact": list(config.exact),
        "measured": config.measure,
        "dense": sum(dense.values()),
        "back_razor": sum(kept.values()),
        "saved": [
            {"layer": layer, "operation": operation, "dense": dense.get((layer, operation), 0),
             "back_razor": kept.get((layer, operation), 0)}
            for layer, operation in places
        ],
    }  # fmt: skip


def shaped(config: MemoryConfig) -> Shaped:
    """The model of the flags, with ``requires_grad`` set, and its loss.

    Raises:
        UserError: if there is no such model.
    """
    sizes = (config.batch_size, config.image_size, config.sequence_length, config.classes)
    return shaped_model(Wanted(config.model, *sizes, lambda model: _chosen(config, model)))


def _chosen(config: MemoryConfig, model: nn.Module) -> nn.Module:
    """Attention and what is trained, by the flags."""
    if config.eager:
        if not hasattr(model, "set_attn_implementation"):
            raise UserError(
                f"--eager would do nothing: {config.model} is none of transformers' models, so leave it out"
            )
        model.set_attn_implementation("eager")  # type: ignore[operator]
    heads = tuple(n for n in HEADS if isinstance(getattr(model, n, None), nn.Module))
    if config.train != "full" and not heads:
        raise UserError(f"--train {config.train} needs a task head, and {type(model).__name__} has none")
    return train_only(model, heads, config.train)
