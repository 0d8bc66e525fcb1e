"""What a run goes without where an extra is not installed, each in one line."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..measuring.memory import Ledger
from ..measuring.plots import plot_loss, plot_memory
from ..optional import installed, without
from ..training.fit_config import FitConfig


def with_what_is_installed(config: FitConfig, device: torch.device, say: Callable[[str], None]) -> FitConfig:
    """The tracker "auto" is TensorBoard where it is there, and none elsewhere."""
    if device.type == "cuda" and not installed("pynvml"):
        say(without("energy", "pynvml"))
    if config.tracker != "auto":
        return config
    there = installed("tensorboard")
    if not there:
        say(without("TensorBoard's events", "tensorboard"))
    return replace(config, tracker="tensorboard" if there else "none")


def draw(
    folder: Path,
    ledger: Ledger | None,
    rows: Mapping[str, list[dict[str, Any]]],
    *,
    ylabel: str,
    levels: Mapping[str, float],
) -> str:
    """``loss.png`` of the runs' metrics by name, and ``memory.png``; -> the line to say where they cannot be drawn."""
    if not installed("matplotlib"):
        return without("pictures", "matplotlib")
    if ledger is not None:
        plot_memory(ledger, folder / "memory.png")
    plot_loss(rows, folder / "loss.png", ylabel=ylabel, levels=levels)
    return ""
