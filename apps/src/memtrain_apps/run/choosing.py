"""What to keep for the backward pass within a memory budget: the fastest exact choice whose predicted peak fits."""

import dataclasses
from dataclasses import dataclass

import torch
from memtrain_common.commands.units import parse_bytes
from memtrain_common.console import format_bytes
from memtrain_common.errors import UserError
from memtrain_common.measuring.prediction import Prediction

from ..compose.axes import Axes
from ..compose.partial import unbeaten, words_of
from .config import RunConfig
from .predicting import predict_blocks, predict_run
from .workload import Workload

RESERVE, MARGIN = 768 << 20, 0.05
"""Of a GPU's memory no tensor gets so many bytes, and such a part of the peak is the allocator's: plan's defaults."""


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
            costs = predict_blocks(workload, config, here, device=device)
        except UserError:  # it has no numbered blocks
            costs = []
        choices = unbeaten(costs)[1:]
        low, high, best = 0, len(choices) - 1, None
        while low <= high:  # the fastest that fits: peaks fall along the list
            middle = (low + high) // 2
            blocks = choices[middle].blocks
            words = "" if len(blocks) == len(costs) else words_of(blocks)
            axes = dataclasses.replace(here, save="checkpoint", checkpoint_blocks=words)
            found = predicted(axes)
            least = min(least, found.peak_bytes)
            if found.peak_bytes <= usable:
                part = choices[middle].flops / max(1, sum(c.flops for c in costs))
                what = f"checkpoints {len(blocks)} of {len(costs)} blocks, gradients are exact"
                best, high = _chosen(axes, found, part, config, what), middle - 1
            else:
                low = middle + 1
        if best is not None:
            return best
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
