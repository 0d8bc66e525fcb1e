"""What to keep for the backward pass within a memory budget: the fastest exact choice whose predicted peak fits."""

import dataclasses
from dataclasses import dataclass

import torch
from memtrain_common.commands.units import parse_bytes
from memtrain_common.console import format_bytes
from memtrain_common.errors import UserError
from memtrain_common.measuring.prediction import Prediction

from ..compose.axes import Axes
from ..compose.partial import StepMoments, fastest, words_of
from .config import RunConfig
from .predicting import predict_moments, predict_run
from .workload import Workload

RESERVE, MARGIN = 768 << 20, 0.05
"""Of a GPU's memory no tensor gets so many bytes, and such a part of the peak is the allocator's: plan's defaults."""


TRIES = 6
"""Choices whose whole prediction is asked for: each that is above the budget lowers the limit for the next, and the
last one checkpoints every block."""


@dataclass(frozen=True)
class Chosen:
    """A choice of ``save``."""

    axes: Axes
    predicted: Prediction
    flops: float
    """Operations that run again, as part of the blocks' forward pass."""
    why: str
    """In one sentence."""


def choose_saving(workload: Workload, config: RunConfig, device: torch.device) -> Chosen:
    """Everything, else the blocks to checkpoint that run the least again, else Back Razor.

    Every choice is predicted as the run would take it; none is taken whose predicted peak is above the budget.

    Raises:
        UserError: if nothing fits, with the least that is needed.
    """
    budget = parse_bytes(config.budget, "--budget")
    usable = int((budget - RESERVE) / (1 + MARGIN)) if device.type == "cuda" else budget
    here = Axes(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Axes)})

    def predicted(axes: Axes) -> Prediction:
        return predict_run(workload, config, axes, device=device)

    everything = predicted(here)
    if everything.peak_bytes <= usable:
        return _chosen(here, everything, 0.0, config, "keeps everything")
    least = everything.peak_bytes
    if here.train != "head":
        try:
            moments = predict_moments(workload, config, here, device=device)
        except UserError:  # it has no numbered blocks
            moments = StepMoments((), 0)
        limit, n_blocks = usable, len(moments.blocks)
        for tried in range(TRIES if n_blocks else 0):
            last = tuple(range(n_blocks))
            blocks = fastest(moments, limit) if tried < TRIES - 1 else last
            blocks = blocks or last  # by the moments nothing fits, or all does, which does not: the least tells
            words = "" if blocks == last else words_of(blocks)
            axes = dataclasses.replace(here, save="checkpoint", checkpoint_blocks=words)
            found = predicted(axes)
            least = min(least, found.peak_bytes)
            if found.peak_bytes <= usable:
                part = sum(moments.blocks[i].flops for i in blocks) / max(1, moments.flops)
                what = f"checkpoints {len(blocks)} of {n_blocks} blocks, gradients are exact"
                return _chosen(axes, found, part, config, what)
            if blocks == last:
                break
            limit -= found.peak_bytes - usable
        axes = dataclasses.replace(here, save="backrazor")
        found = predicted(axes)
        least = min(least, found.peak_bytes)
        if found.peak_bytes <= usable:
            what = f"keeps {here.keep:g} of each activation, weight gradients are approximate"
            return _chosen(axes, found, 0.0, config, what)
    need = int(least * (1 + MARGIN)) + RESERVE if device.type == "cuda" else least
    raise UserError(
        f"nothing fits --budget {config.budget}: the least that train {here.train} with {here.optim} needs at "
        f"--batch-size {config.batch_size} is {format_bytes(need)}; give more, a smaller batch with "
        "--gradient-accumulation-steps, or another --train or --optim"
    )


def _chosen(axes: Axes, found: Prediction, flops: float, config: RunConfig, what: str) -> Chosen:
    name = axes.save + (f":{axes.checkpoint_blocks}" if axes.save == "checkpoint" and axes.checkpoint_blocks else "")
    why = f"--budget {config.budget}: --save {name}, which {what}; predicted peak {format_bytes(found.peak_bytes)}"
    return Chosen(axes, found, flops, why)
