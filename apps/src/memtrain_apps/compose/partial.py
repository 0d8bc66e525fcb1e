"""Which blocks to checkpoint: what lives while each block runs, and the fastest choice that stays below a limit.

A checkpointed block keeps its inputs in place of all that its operations save, and runs its forward pass again. What
lives while a block runs, forward or backward, is what the blocks before it keep, and something that depends on the
block's own choice alone. So a choice stays below a limit if it does in every block, and the fewer bytes the blocks
before have kept, the better. Dynamic programming finds the fastest choice block by block: of two for the first blocks,
one that keeps no less and runs no less again is beaten whatever is chosen for the others.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from memtrain_common.errors import UserError

MOST = 2048
"""Choices that are kept of the first blocks; where there are more, those nearest to each other become one."""


@dataclass(frozen=True)
class BlockMoments:
    """A block in a step. Pairs are bytes where it keeps everything, and where it is checkpointed."""

    grows: tuple[int, int]
    """How many more live after its forward pass than before it."""
    most: tuple[int, int]
    """The most that live while it runs, forward or backward, beside what the blocks before it have grown by."""
    flops: int
    """Floating-point operations of the matrix products of its forward pass."""


@dataclass(frozen=True)
class StepMoments:
    """A training step over blocks."""

    blocks: tuple[BlockMoments, ...]
    loss: int
    """The most bytes that live between the last block's forward and backward pass, beside what all have grown by."""

    @property
    def flops(self) -> int:
        """Of the blocks' forward passes."""
        return sum(b.flops for b in self.blocks)


def fastest(step: StepMoments, limit: int, most: int = MOST) -> tuple[int, ...] | None:
    """Numbers of the blocks to checkpoint, so that the fewest operations run again and no moment is above ``limit``
    bytes; None where there is no such choice. Of equal ones those of earlier blocks: what they save lives longest."""
    choices: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]  # operations again, bytes grown by, blocks
    for i, block in enumerate(step.blocks):
        found = []
        for flops, grown, blocks in choices:
            if grown + block.most[0] <= limit:
                found.append((flops, grown + block.grows[0], blocks))
            if grown + block.most[1] <= limit:
                found.append((flops + block.flops, grown + block.grows[1], (*blocks, i)))
        choices = []
        for choice in sorted(found):
            if not choices or choice[1] < choices[-1][1]:
                choices.append(choice)
        if len(choices) > most:
            width = (choices[0][1] - choices[-1][1]) // (most - 1) + 1
            nearest = {c[1] // width: c for c in reversed(choices)}
            choices = sorted({*nearest.values(), choices[-1]})
    return next((blocks for _, grown, blocks in choices if grown + step.loss <= limit), None)


def numbers_of(words: str, n_blocks: int, save: str = "checkpoint") -> tuple[int, ...]:
    """Blocks that words name: none for all of them, "4" for the first four, "0-3,6" and "6-6" for those numbers, and
    for backrazor "0" for what is outside the blocks alone.

    Raises:
        UserError: if they name no block that is there.
    """
    if not words:
        return tuple(range(n_blocks))
    if words == "0" and save == "backrazor":
        return ()
    found: set[int] = set()
    if re.fullmatch("[0-9]{1,5}", words):
        found = set(range(int(words)))
    elif names_blocks(words):
        for part in words.split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    if not found or max(found) >= n_blocks:
        raise UserError(
            f"--save {save}:{words} names no blocks of the {n_blocks} that there are: give their number, as "
            f"{save}:{max(1, n_blocks // 2)} for the first, or numbers from 0, as {save}:0-{n_blocks - 1}"
        )
    return tuple(sorted(found))


def names_blocks(words: str) -> bool:
    """Whether words can name blocks of some model: at most 64 characters, which are a part of an arm's name, too."""
    return len(words) <= 64 and re.fullmatch("(?:[0-9]{1,5}(?:-[0-9]{1,5})?(?:,|$))*(?<!,)", words) is not None


def words_of(blocks: Sequence[int]) -> str:
    """What :func:`numbers_of` reads: "4" of the first four, otherwise ranges."""
    if list(blocks) == list(range(len(blocks))):
        return str(len(blocks))
    starts = [b for b in blocks if b - 1 not in blocks]
    ends = [b for b in blocks if b + 1 not in blocks]
    return ",".join(f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
