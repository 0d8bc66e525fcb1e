"""What to keep for the backward pass within a memory budget: the fastest exact choice whose predicted peak fits, else
the one that makes the least approximate."""

import contextlib
import dataclasses
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
"""Choices of blocks to checkpoint whose whole prediction is asked for: each that is above the budget lowers the limit
for the next, and the last one is that of every block."""
BACK = 12
"""Blocks under Back Razor of which each is tried checkpointed."""


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

    def fits(axes: Axes) -> Prediction | None:
        found = predicted(axes)
        return found if found.peak_bytes <= usable else None

    def checkpointed(moments: StepMoments) -> _Found | None:
        limit, every = usable, tuple(range(len(moments.blocks)))
        for tried in range(TRIES):
            blocks = fastest(moments, limit) if tried < TRIES - 1 else every
            if blocks is None:  # by the moments nothing fits: the least tells
                blocks = every
            words = "" if blocks == every else words_of(blocks)
            axes = dataclasses.replace(here, save="checkpoint", checkpoint_blocks=words) if blocks else here
            found = predicted(axes)
            if found.peak_bytes <= usable:
                return _Found(axes, found, blocks)
            if blocks == every:
                break
            limit -= found.peak_bytes - usable
        return None

    def razored(moments: StepMoments) -> _Found | None:
        """The fewest of the first blocks: what a block saves, it saves until the last one has run, and where Back Razor
        follows a checkpointed block both keep what passes between them. Then single ones are tried checkpointed."""
        every = tuple(range(len(moments.blocks)))

        def axes_of(blocks: tuple[int, ...]) -> Axes:
            return dataclasses.replace(here, save="backrazor", razor_blocks="" if blocks == every else words_of(blocks))

        whole = fits(axes_of(every))
        if whole is None:
            return None
        best = _Found(axes_of(every), whole, every)
        low, high = 0, len(every)  # the fewest are between these
        while low < high:
            blocks = every[: (low + high) // 2]
            found = fits(axes_of(blocks))
            if found is not None:
                best, high = _Found(axes_of(blocks), found, blocks), len(blocks)
            else:
                low = len(blocks) + 1
        largest_first, back = _by_size(best.blocks, moments), BACK
        while largest_first and back:
            i, back = largest_first.pop(0), back - 1
            blocks = tuple(b for b in best.blocks if b != i)
            found = fits(axes_of(blocks))
            if found is not None:
                best = _Found(axes_of(blocks), found, blocks)
                largest_first = _by_size(blocks, moments)
        return best

    everything = predicted(here)
    if everything.peak_bytes <= usable:
        return _chosen(here, everything, 0.0, config, "keeps everything")
    if here.train != "head":
        moments = StepMoments((), 0)
        with contextlib.suppress(UserError):  # it has no numbered blocks
            moments = predict_moments(workload, config, here, device=device)
        n_blocks = len(moments.blocks)
        found = checkpointed(moments) if n_blocks else None
        if found is not None:
            what = f"checkpoints {len(found.blocks)} of {n_blocks} blocks, gradients are exact"
            return _chosen(found.axes, found.predicted, found.part(moments), config, what)
        found = razored(moments)
        if found is not None:
            what = f"keeps {here.keep:g} of each activation, gradients are approximate"
            again = 0.0
            if found.axes.razor_blocks:
                again = 1 - found.part(moments)
                what += f" in {len(found.blocks)} of {n_blocks} blocks and outside them, the others are checkpointed"
            return _chosen(found.axes, found.predicted, again, config, what)
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
    blocks: tuple[int, ...]
    """That are checkpointed, or under Back Razor."""

    def part(self, moments: StepMoments) -> float:
        """Of the blocks' operations, in these blocks."""
        return sum(moments.blocks[i].flops for i in self.blocks) / max(1, moments.flops)


def _by_size(blocks: tuple[int, ...], moments: StepMoments) -> list[int]:
    return sorted(blocks, key=lambda i: -moments.blocks[i].flops)


def _chosen(axes: Axes, found: Prediction, flops: float, config: RunConfig, what: str) -> Chosen:
    peak = format_bytes(found.peak_bytes)
    why = f"--budget {config.budget}: --save {save_words(axes)}, which {what}; predicted peak {peak}"
    return Chosen(axes, found, flops, why)
