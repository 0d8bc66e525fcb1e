"""What glue and instruct share: R and the head through the shared loop, the adapter that comes out, the summary."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memtrain_common.commands.result import Outcome
from memtrain_common.commands.session import Session
from memtrain_common.console import Console, format_bytes, format_table
from memtrain_common.measuring.memory import CATEGORIES
from memtrain_common.training.distributed import parallelize
from memtrain_common.training.fit_config import FitConfig
from memtrain_common.training.task import Task
from memtrain_common.training.trained_state import trained_state
from torch import Tensor, nn

from ..adapter_checks import base_digests
from ..adapter_file import save_adapter
from ..adapters import param_groups, trained
from ..config import LoRAXSConfig
from ..injection import inject
from ..layer import layers
from ..untrained import NOT_REACHED, check_called
from .models import write_task
from .shared_flags import TrainingFlags


def configured(config: TrainingFlags, rank: int, alpha: float | None, head: tuple[str, ...]) -> LoRAXSConfig:
    """What the flags of glue and instruct say of the adapter."""
    return LoRAXSConfig(
        rank, alpha, config.targets, init=config.init, seed=config.seed, first_step=config.first_step, head=head
    )


def adapt(task: Task, xs: LoRAXSConfig, batches: int, console: Console) -> nn.Module:
    """The task's model, on its device, with an adapter; with init="gradient" its first ``batches`` give the bases."""
    if xs.init != "gradient":
        return inject(task.model, xs)
    task.model.train()
    with contextlib.closing(console.progress(2 * batches, label="gradient")) as bar:

        def losses() -> Iterator[Tensor]:
            for loss in task.losses(batches):
                yield loss
                bar.update()

        return inject(task.model, xs, losses=losses)


def train(
    session: Session, task: Task, config: FitConfig, *, rates: tuple[float, float], key: Mapping[str, Any], label: str
) -> Outcome:
    """Train R and the head; the model ends with the weights that ``--select`` asks for.

    Args:
        task: without an optimizer; its model has an adapter and is on its device.
        rates: peak learning rates of R and of the head.
        key: what a checkpoint must agree in, besides the base weights.
    """
    optimizer = torch.optim.AdamW(
        param_groups(task.model, lr=rates[0], head_lr=rates[1]), weight_decay=session.config.weight_decay
    )
    sha256, _ = base_digests(task.model, reuse=True)
    wrapped = replace(
        task,
        model=parallelize(task.model, "ddp", session.device),
        optimizer=optimizer,
        # Adapters that the first step did not reach end the run instead of the library's warning.
        after_first_step=lambda: check_called(task.model),
    )
    bases = [p for _, layer in layers(task.model) if not layer.regenerable for p in (layer.A, layer.B)]
    with trained_state(task.model, also=bases), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOT_REACHED)
        return session.fit(
            wrapped, config, resume_key={**key, "base_sha256": sha256}, label=label, select=session.config.select
        )


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


def finish(
    session: Session,
    outcome: Outcome,
    *,
    scores: Mapping[str, Mapping[str, float]],
    lines: Sequence[tuple[str, str]],
    about: Mapping[str, Any],
    title: str = "",
) -> None:
    """Write the adapter, with what it is for beside it, and say what came out.

    Args:
        lines: the scores as people read them.
        about: the adapter's task, for later commands.
    """
    facts: dict[str, str] = {}
    if session.place.is_main:
        folder = session.folder.path / "adapter"
        sizes = save(outcome.model, folder)
        name = session.config.model
        write_task(folder, **about, model=str(Path(name).resolve()) if Path(name).exists() else name)
        n = counts(outcome.model)
        head = f", {n['head']:,} in the head" if n["head"] else ""
        facts["trained"] = f"{n['R']:,} in R{head}, of {n['model']:,}"
        facts["saved"] = ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items())
        ledger = outcome.result.ledger
        if ledger is not None:
            facts["memory"] = ", ".join(f"{c} {format_bytes(ledger.total(c))}" for c in CATEGORIES)
    session.finish(
        outcome, scores=scores, own=about, table=(f"{title}\n" if title else "") + format_table(lines), facts=facts
    )
