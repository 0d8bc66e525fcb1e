"""What a forward pass saves for the backward pass: plain, by Back Razor, and by the official code's storage.

Unique bytes a sample, masks and codes included, parameters aside; a tensor that several operations save counts once.
Each is predicted (on fake tensors: shapes alone) and measured (a real step, whose backward pass is run too).

    uv run python benchmarks/backrazor_memory.py
"""

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from backrazor import Razor
from backrazor.groups import groups_for
from backrazor.layout import layout_of
from backrazor.packing import pack
from backrazor.tasks.memory import saved, shaped
from backrazor.tasks.memory_flags import MemoryConfig
from memtrain_common.console import Console, format_table
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.shaped import Shaped
from torch import nn

OUT = Path(__file__).parent / "results" / "backrazor_memory.json"
KEEPS = (0.1, 0.03)
ARMS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dense": nullcontext,
    **{f"low-bit, keep {k:g}": functools.partial(Razor, k) for k in (0.125, 0.1, 0.05)},
    "low-bit, keep 0.1, attention recomputed": lambda: Razor(0.1, recompute="attention"),
    "low-bit, keep 0.1, blocks recomputed": lambda: Razor(0.1, recompute="block"),
    **{f"pruned, keep {k:g}": functools.partial(Razor, k, mode="pruned") for k in KEEPS},
    **{f"paper, keep {k:g}": functools.partial(Razor, k, mode="paper") for k in KEEPS},
    "pruned, keep 0.1, exact attention": lambda: Razor(0.1, mode="pruned", attention="exact"),
}
MODELS: dict[str, tuple[MemoryConfig, float]] = {
    "ViT-S/16, eager": (MemoryConfig(model="vit-s-16", eager=True), 0.0),
    "ViT-S/16, SDPA": (MemoryConfig(model="vit-s-16"), 0.0),
    "ViT-B/16, eager": (MemoryConfig(model="vit-b-16", eager=True), 0.0),
    "ViT-B/16, eager, dropout": (MemoryConfig(model="vit-b-16", eager=True), 0.1),
    "ViT-B/16, SDPA": (MemoryConfig(model="vit-b-16"), 0.0),
    "ResNet-18": (MemoryConfig(model="resnet18"), 0.0),
    "ResNet-50": (MemoryConfig(model="resnet50"), 0.0),
    "ProxylessNAS-Mobile": (MemoryConfig(model="proxyless_mobile"), 0.0),
    "BERT-base, 128 tokens": (MemoryConfig(model="bert-base"), 0.0),
    "GPT-2 small, 128 tokens": (MemoryConfig(model="gpt2"), 0.0),
}


def with_dropout(model: Shaped, p: float) -> Shaped:
    """The same model, whose dropout modules (none of them within the attention) drop at the rate ``p``."""

    def build() -> nn.Module:
        made = model.build()
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        return made

    return replace(model, build=build)


def compare(
    config: MemoryConfig, dropout: float, batch: int, arms: tuple[str, ...], measure: bool
) -> dict[str, dict[str, float]]:
    """Bytes a sample of every arm."""
    config = replace(config, batch_size=batch)
    model = shaped(config)
    if dropout:
        model = with_dropout(model, dropout)
    found: dict[str, dict[str, float]] = {}
    for arm in arms:
        found[arm] = {
            ("measured" if real else "predicted"): sum(
                saved(replace(config, measure=real), model, ARMS[arm])[0].values()
            )
            / batch
            for real in ((False, True) if measure else (False,))
        }
    return found


def stored_bits() -> list[dict[str, float]]:
    """Bits an element of a large tensor takes, beside the limit for the same fraction."""
    rows = []
    for keep in KEEPS:
        groups = groups_for(keep)
        assert groups is not None
        x = torch.randn(8, 151_296)
        bits = 8 * sum(t.nbytes for t in pack(x, layout_of(8, 151_296, groups, "bf16"))) / x.numel()
        limit = groups.shannon_bits(16)
        rows.append({"keep": keep, "stored_bits": bits, "shannon_bits": limit, "ratio": bits / limit})
    return rows


def main(
    batch: int = 2,
    threads: int = 1,
    out: Path = OUT,
    models: tuple[str, ...] = tuple(MODELS),
    arms: tuple[str, ...] = tuple(ARMS),
    measure: bool = True,
) -> None:
    """
    Args:
        batch: samples.
        threads: of torch.
        out: where the results go.
        models: names of the table's rows.
        arms: ways of saving; "dense" is among them.
        measure: also take a real step of each, beside the prediction.
    """
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    console = Console()
    results = {}
    for name in models:
        config, dropout = MODELS[name]
        torch.manual_seed(0)
        results[name] = found = compare(config, dropout, batch, arms, measure)
        best = "measured" if measure else "predicted"
        dense = found["dense"][best]
        rows = [["", "MB a sample", "less", "predicted"]]
        for arm, n in found.items():
            same = "the same" if n["predicted"] == n[best] else f"{n['predicted'] / 1e6:.3f} MB"
            rows.append([arm, f"{n[best] / 1e6:.3f}", f"{dense / n[best]:.1f}×", same])
        console.say(f"\n{name}\n{format_table(rows)}")
    write_results(
        out,
        argv=["python", "benchmarks/backrazor_memory.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=[0],
        unit="bytes a sample",
        batch=batch,
        models=results,
        stored=stored_bits(),
    )
    console.say(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
