"""What to keep for the backward pass within a memory budget: the fastest exact choice whose predicted peak fits, else
the one that makes the least approximate."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from memtrain_common.commands.units import parse_bytes
from memtrain_common.console import format_bytes
from memtrain_common.errors import UserError
from memtrain_common.measuring.prediction import Prediction

from ..compose.axes import Axes, save_words
from ..compose.partial import StepMoments, fastest, words_of
from .config import RunConfig
from .predicting import predict_moments, predict_run
from .workload import Workload

RESERVE, MARGIN = 768 << 20, 0.05
"""Of a GPU's memory no tensor gets so many bytes, and such a part of the peak is the allocator's: plan's defaults."""


TRIES = 6
"""Choices of blocks whose whole prediction is asked for: each that is above the budget lowers the limit for the next,
and the last one is that of every block."""


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
    """Everything, else the blocks to checkpoint that run the least again, else Back Razor in as few blocks as fit with
    the others checkpointed.

    Every choice is predicted as the run would take it; none is taken whose predicted peak is above the budget.

    Raises:
        UserError: if nothing fits, with the least that is needed.
    """
    budget = parse_bytes(config.budget, "--budget")
    usable = int((budget - RESERVE) / (1 + MARGIN)) if device.type == "cuda" else budget
    here = Axes(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Axes)})
    peaks = []

    def predicted(axes: Axes) -> Prediction:
        found = predict_run(workload, config, axes, device=device)
        peaks.append(found.peak_bytes)
        return found

    def search(first: Axes, second: Axes, blocks_of: Callable[[tuple[int, ...]], Axes], back: int = 0) -> _Found | None:
        """The fewest blocks by the second choice, the others by the first. Where the moments of some blocks by one and
        some by the other are not those of all by one, single blocks of what fits are tried by the first again, at most
        ``back`` times."""
        try:
            moments = predict_moments(workload, config, (first, second), device)
        except UserError:  # it has no numbered blocks
            if second.save == "checkpoint":
                return None
            moments = StepMoments((), 0)
        limit, n_blocks = usable, len(moments.blocks)
        every = tuple(range(n_blocks))
        for tried in range(TRIES):
            blocks = fastest(moments, limit) if tried < TRIES - 1 else every
            if blocks is None:  # by the moments nothing fits: the least tells
                blocks = every
            axes = second if blocks == every else blocks_of(blocks)
            found = predicted(axes)
            if found.peak_bytes <= usable:
                largest_first = sorted(blocks, key=lambda i: -moments.blocks[i].flops)
                while largest_first and back:
                    i, back = largest_first.pop(0), back - 1
                    fewer = tuple(b for b in blocks if b != i)
                    without = predicted(blocks_of(fewer))
                    if without.peak_bytes <= usable:
                        blocks, axes, found = fewer, blocks_of(fewer), without
                        largest_first = sorted(blocks, key=lambda i: -moments.blocks[i].flops)
                part = sum(moments.blocks[i].flops for i in blocks) / moments.flops if moments.flops else 1.0
                return _Found(axes, found, part, f"{len(blocks)} of {n_blocks} blocks")
            if blocks == every:
                break
            limit -= found.peak_bytes - usable
        return None

    everything = predicted(here)
    if everything.peak_bytes <= usable:
        return _chosen(here, everything, 0.0, config, "keeps everything")
    if here.train != "head":
        change = dataclasses.replace
        found = search(
            here,
            change(here, save="checkpoint"),
            lambda blocks: change(here, save="checkpoint", checkpoint_blocks=words_of(blocks)) if blocks else here,
        )
        if found is not None:
            what = f"checkpoints {found.blocks}, gradients are exact"
            return _chosen(found.axes, found.predicted, found.part, config, what)
        found = search(
            change(here, save="backrazor", razor_blocks="0"),
            change(here, save="backrazor"),
            lambda blocks: change(here, save="backrazor", razor_blocks=words_of(blocks)),
            back=2 * TRIES,
        )
        if found is not None:
            what = f"keeps {here.keep:g} of each activation, gradients are approximate"
            if found.axes.razor_blocks:
                what = (
                    f"keeps {here.keep:g} of each activation outside the blocks and in {found.blocks}, and checkpoints "
                    "the others; gradients are approximate"
                )
            return _chosen(found.axes, found.predicted, 1 - found.part, config, what)
    least = min(peaks)
    need = int(least * (1 + MARGIN)) + RESERVE if device.type == "cuda" else least
    raise UserError(
        f"nothing fits --budget {config.budget}: the least that train {here.train} with {here.optim} needs at "
        f"--batch-size {config.batch_size} is {format_bytes(need)}; give more, a smaller batch with "
        "--gradient-accumulation-steps, or another --train or --optim"
    )


@dataclass(frozen=True)
class _Found:
    axes: Axes
    predicted: Prediction
    part: float
    """Of the blocks' operations, in the blocks by the second choice."""
    blocks: str
    """How many, in words."""


def _chosen(axes: Axes, found: Prediction, flops: float, config: RunConfig, what: str) -> Chosen:
    peak = format_bytes(found.peak_bytes)
    why = f"--budget {config.budget}: --save {save_words(axes)}, which {what}; predicted peak {peak}"
    return Chosen(axes, found, flops, why)
