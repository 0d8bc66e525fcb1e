"""Which blocks to checkpoint: what each costs and saves, and the choices among them that no other choice beats.

A checkpointed block keeps its inputs in place of all that its operations save, and runs its forward pass again. A
choice of blocks keeps the sum of their bytes and takes the sum of their operations. Only those choices matter that no
other one beats in both. Dynamic programming finds them block by block: what is beaten among the first blocks is beaten
whatever is chosen for the others.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memtrain_common.errors import UserError
from memtrain_common.measuring.memory import SavedActivations
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

MOST = 2048
"""Choices that are kept of the first blocks; where there are more, those nearest to each other become one."""


@dataclass(frozen=True)
class BlockCost:
    """What a block saves and costs."""

    saved: int
    """Bytes that its operations save for the backward pass."""
    inputs: int
    """Bytes that it keeps when it is checkpointed."""
    flops: int
    """Floating-point operations of the matrix products of its forward pass."""


@dataclass(frozen=True, order=True)
class BlockChoice:
    """Checkpointed blocks. Of two that are equal the one of earlier blocks is less: what they save lives longest."""

    flops: int
    """Operations that run again."""
    kept: int
    """Bytes."""
    blocks: tuple[int, ...]
    """Numbers of the checkpointed ones, from 0."""


def unbeaten(costs: Sequence[BlockCost], most: int = MOST) -> list[BlockChoice]:
    """Choices that no other one beats in operations and in bytes, the fastest first, which checkpoints nothing."""
    choices = [BlockChoice(0, 0, ())]
    for i, cost in enumerate(costs):
        again = [BlockChoice(c.flops + cost.flops, c.kept + cost.inputs, (*c.blocks, i)) for c in choices]
        dense = [BlockChoice(c.flops, c.kept + cost.saved, c.blocks) for c in choices]
        choices = []
        for choice in sorted(again + dense):
            if not choices or choice.kept < choices[-1].kept:
                choices.append(choice)
        if len(choices) > most:
            width = (choices[0].kept - choices[-1].kept) // (most - 1) + 1
            fastest = {c.kept // width: c for c in reversed(choices)}
            choices = sorted({*fastest.values(), choices[-1]})
    return choices


def block_costs(model: nn.Module, blocks: Sequence[nn.Module], loss: Callable[[], Tensor]) -> list[BlockCost]:
    """Of the blocks of a model, in a forward pass; within :func:`memtrain_common.measuring.prediction.fake_step`
    nothing is allocated.

    Args:
        model: as it is trained; its own name for each block is found.
        blocks: in their order.
        loss: runs the forward pass.
    """
    inputs, flops = [0] * len(blocks), [0] * len(blocks)
    counter = _Flops()

    def begin(i: int, args: Any, kwargs: Any) -> None:
        tensors = {id(t): t.nbytes for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        inputs[i] = sum(tensors.values())
        flops[i] = -counter.total

    def end(i: int) -> None:
        flops[i] += counter.total

    handles = []
    for i, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda _, a, k, i=i: begin(i, a, k), with_kwargs=True))
        handles.append(block.register_forward_hook(lambda *_, i=i: end(i)))
    with SavedActivations(model) as recording, counter:
        value = loss()
    saved = recording.by_layer()
    del value
    for handle in handles:
        handle.remove()
    names = {id(m): n for n, m in model.named_modules()}
    of_block = [names[id(b)] for b in blocks]
    sums = [sum(n for layer, n in saved.items() if layer == b or layer.startswith(f"{b}.")) for b in of_block]
    return [BlockCost(s, n, f) for s, n, f in zip(sums, inputs, flops, strict=True)]


class _Flops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def numbers_of(words: str, n_blocks: int) -> tuple[int, ...]:
    """Blocks that words name: none for all of them, "4" for the first four, "0-3,6" and "6-6" for those numbers.

    Raises:
        UserError: if they name no block that is there.
    """
    if not words:
        return tuple(range(n_blocks))
    if words.isdigit():
        found = set(range(int(words)))
    else:
        parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", w) for w in words.split(",")]
        found = {n for p in parts if p for n in range(int(p[1]), int(p[2] or p[1]) + 1)}
        if not all(parts):
            found = set()
    if not found or max(found) >= n_blocks:
        raise UserError(
            f"--save checkpoint:{words} names no blocks of the {n_blocks} that there are: give their number, as "
            f"checkpoint:{max(1, n_blocks // 2)} for the first, or numbers from 0, as checkpoint:0-{n_blocks - 1}"
        )
    return tuple(sorted(found))


def words_of(blocks: Sequence[int]) -> str:
    """What :func:`numbers_of` reads: "4" of the first four, otherwise ranges."""
    if list(blocks) == list(range(len(blocks))):
        return str(len(blocks))
    starts = [b for b in blocks if b - 1 not in blocks]
    ends = [b for b in blocks if b + 1 not in blocks]
    return ",".join(f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
