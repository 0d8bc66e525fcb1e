"""What glue and instruct share: one call of the loop, the adapter that comes out, the summary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memtrain_common.console import Console, format_bytes, format_count, format_seconds, format_table
from memtrain_common.measuring.memory import CATEGORIES, Ledger
from memtrain_common.runs.checkpoint import load as load_checkpoint
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.distributed import parallelize
from memtrain_common.training.loop import FitConfig, FitResult, fit
from torch import Tensor, nn

from ..adapter_checks import base_digests
from ..adapter_file import save_adapter
from ..adapters import trained
from .trained_state import trained_state


@dataclass(frozen=True)
class Job:
    """One training, ready to run."""

    model: nn.Module
    """With its adapter, on its device."""
    batches: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    lr_factor: Callable[[int], float]
    fit: FitConfig
    evaluate: Callable[[nn.Module], dict[str, float]] | None
    identity: dict[str, Any]
    keep: str
    """The weights to end with: "last" or "best"."""
    label: str


def train(job: Job, run: RunFolder, console: Console, device: torch.device, *, resume: bool) -> FitResult:
    """Train R and the head through the shared loop; the model ends with the weights that ``keep`` asks for."""
    groups = trained(job.model)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[name], "lr": lr}
            for name, lr in (("R", job.learning_rate), ("head", job.head_learning_rate))
            if groups[name]
        ],
        weight_decay=job.weight_decay,
    )
    sha256, _ = base_digests(job.model, reuse=True)
    start = copy.deepcopy({n: p.detach() for n, p in job.model.named_parameters() if p.requires_grad})
    with trained_state(job.model):
        result = fit(
            parallelize(job.model, "ddp", device),
            job.batches,
            job.loss,
            optimizer,
            job.fit,
            evaluate=job.evaluate,
            lr_factor=job.lr_factor,
            run=run,
            resume=resume,
            identity={**job.identity, "base_sha256": sha256},
            console=console,
            label=job.label,
        )
        if job.keep == "best" and result.best is not None and result.best[0] != result.step:
            step = result.best[0]
            state = load_checkpoint(run.checkpoints.path(step))["model"] if step else start
            job.model.load_state_dict(state, strict=bool(step))
            console.say(f"kept the weights of step {step}, the best evaluation")
    return result


def save(model: nn.Module, folder: Path) -> dict[str, int]:
    """Save the adapter; bytes of "adapter" and, where there is one, "head"."""
    save_adapter(model, folder)
    head = folder / "head.safetensors"
    sizes = {"adapter": (folder / "adapter.safetensors").stat().st_size}
    return {**sizes, "head": head.stat().st_size} if head.exists() else sizes


def counts(model: nn.Module) -> dict[str, int]:
    """Trained numbers by group, and those of the base model."""
    groups = {name: sum(p.numel() for p in ps) for name, ps in trained(model).items()}
    own = sum(p.numel() for n, p in model.named_parameters() if ".lora_xs" not in f".{n}")
    return {**groups, "model": own}


def summary(
    model: nn.Module, result: FitResult, run: RunFolder, sizes: dict[str, int], scores: Sequence[tuple[str, str]]
) -> str:
    """The lines at a run's end."""
    n = counts(model)
    ledger = result.ledger or Ledger.read(run.path / "memory.json")  # none where nothing was left to train
    peaks = ", ".join(f"{k} {'unavailable' if v is None else format_bytes(v)}" for k, v in result.peak_bytes.items())
    joules = "unavailable" if result.joules is None else f"{result.joules:.0f} J ({result.energy_source})"
    trained_text = f"{n['R']:,} in R" + (f", {n['head']:,} in the head" if n["head"] else "")
    facts = [
        ("trained", f"{trained_text}, of {n['model']:,}"),
        ("saved", ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items())),
        ("memory", ", ".join(f"{c} {format_bytes(ledger.total(c))}" for c in CATEGORIES)),
        ("peak memory", peaks),
        ("speed", f"{format_count(result.units_per_second)} samples/s, {format_seconds(result.seconds)} of training"),
        ("energy", joules),
    ]
    return "\n".join(
        [format_table(scores), *(f"  {name:12} {value}" for name, value in facts), f"run folder {run.path}"]
    )
