"""The three axes: which numbers are trained, what is kept for the backward pass, what state the optimizer keeps.

No torch here: commands build their flags from these names, and refuse invalid combinations before anything is loaded.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from memtrain_common.commands.configure import flag
from memtrain_common.errors import UserError

Train = Literal["full", "head", "bitfit", "lora", "melo", "lora-xs", "lte"]
Save = Literal["all", "backrazor", "checkpoint", "offload"]
Optim = Literal["sgd", "adamw", "adamw8bit", "galore-adamw", "galore-adamw8bit", "galore-adafactor", "galore-scaled"]
TRAIN: tuple[Train, ...] = get_args(Train)
SAVE: tuple[Save, ...] = get_args(Save)
OPTIM: tuple[Optim, ...] = get_args(Optim)

GALORE: tuple[Optim, ...] = ("galore-adamw", "galore-adamw8bit", "galore-adafactor", "galore-scaled")
ADAPTERS = ("lora", "melo", "lora-xs", "lte")
"""Choices of ``train`` that add matrices of a rank."""


@dataclass(frozen=True)
class Axes:
    """One choice on each axis, and the settings of the choices."""

    # -- train: which numbers are trained
    train: Train = "full"
    """full, head, bitfit (biases, head), lora (PEFT's), melo (LoRA on q, v), lora-xs (r×r), lte (parallel heads)."""
    # -- save: what is kept for the backward pass
    save: Save = "all"
    """all, backrazor (activations in few bits), checkpoint (block inputs), offload (all, in host memory)."""
    # -- optim: what state the optimizer keeps
    optim: Optim = "adamw"
    """sgd, adamw, adamw8bit, or moments of projected gradients: galore-adamw, galore-adamw8bit, galore-adafactor, and
    galore-scaled, where they scale the whole gradient."""
    # -- train: which numbers are trained
    rank: int = 8
    """lora, melo, lora-xs, lte: rank r of an adapter."""
    alpha: float = 0.0
    """lora, melo, lora-xs, lte: adapters are multiplied by α/r; 0 takes α = r."""
    init: Literal["svd", "gradient", "random"] = "svd"
    """lora-xs: bases from the SVD of each weight, from the gradient of the first batches, or random ones."""
    init_batches: int = 8
    """lora-xs, init gradient: micro-batches whose gradient gives the bases."""
    first_step: float = 0.0
    """lora-xs, init gradient: R starts at a step of this size down it (about the rate of full training), not at 0."""
    adapt: Literal["attention", "all"] = "all"
    """lora, lora-xs, lte: adapt attention only, or the MLP and convolutions too."""
    dropout: float = 0.0
    """lora: dropout before A; it keeps a copy of every adapted layer's input."""
    heads: int = 4
    """lte: heads per layer; each sees its own share of the batch."""
    merge_steps: int = 10
    """lte: optimizer steps between merges."""
    lte_rest: Literal["auto", "frozen", "trained"] = "auto"
    """lte: norms, biases, position embeddings, at the heads' rate; auto: frozen where the model has a task head."""
    # -- save: what is kept for the backward pass
    checkpoint_blocks: str = ""
    """checkpoint: which blocks, as --save checkpoint:4 says it for the first four; empty takes all."""
    razor_blocks: str = ""
    """backrazor: which blocks, as --save backrazor:8-11 says it; the others are checkpointed. Empty takes all."""
    keep: float = 0.1
    """backrazor: fraction of an activation's bits (low-bit) or elements (pruned, paper) to keep."""
    razor_mode: Literal["low-bit", "pruned", "paper"] = "low-bit"
    """backrazor: few bits of each element, the largest elements, or the paper's pruning."""
    recompute: Literal["auto", "none", "attention", "block"] = "auto"
    """backrazor, low-bit: what the backward pass recomputes; auto: below keep 0.09 the block."""
    # -- optim: what state the optimizer keeps
    galore_rank: int = 4
    """galore-*: rank r of a gradient's subspace."""
    gap: int = 50
    """galore-*: optimizer steps T between refreshes of a subspace."""
    galore_scale: float = 1.0
    """galore-*: α, which multiplies the update of a projected weight."""

    def __post_init__(self) -> None:
        if self.razor_mode == "default":  # of a run begun when the mode "pruned" was called so
            object.__setattr__(self, "razor_mode", "pruned")

    @property
    def name(self) -> str:
        """``train+save+optim``."""
        return f"{self.train}+{self.save}+{self.optim}"

    @property
    def scale(self) -> float:
        """α/r."""
        return (self.alpha or self.rank) / self.rank


USED_BY = {
    "rank": ("train", ADAPTERS),
    "alpha": ("train", ADAPTERS),
    "init": ("train", ("lora-xs",)),
    "init_batches": ("train", ("lora-xs",)),
    "first_step": ("train", ("lora-xs",)),
    "adapt": ("train", ("lora", "lora-xs", "lte")),
    "dropout": ("train", ("lora",)),
    "heads": ("train", ("lte",)),
    "merge_steps": ("train", ("lte",)),
    "lte_rest": ("train", ("lte",)),
    "checkpoint_blocks": ("save", ("checkpoint",)),
    "razor_blocks": ("save", ("backrazor",)),
    "keep": ("save", ("backrazor",)),
    "razor_mode": ("save", ("backrazor",)),
    "recompute": ("save", ("backrazor",)),
    "galore_rank": ("optim", GALORE),
    "gap": ("optim", GALORE),
    "galore_scale": ("optim", GALORE),
}
"""Setting -> the axis and the choices that read it."""
BLOCK_FLAGS = {"checkpoint": "checkpoint_blocks", "backrazor": "razor_blocks"}
"""Choice of save -> the setting that says which blocks, as ``--save CHOICE:BLOCKS`` does."""


def combinations() -> Iterator[Axes]:
    """All 7 × 4 × 7, with default settings, valid or not."""
    for train in TRAIN:
        for save in SAVE:
            for optim in OPTIM:
                yield Axes(train, save, optim)


def refusal(axes: Axes) -> str | None:
    """Why the combination is invalid for every model, and what to choose instead; None if it is valid."""
    galore = axes.optim.startswith("galore")
    if axes.train == "head" and axes.save != "all":
        return (
            f"save {axes.save} would do nothing with train head: no gradient passes through the frozen backbone, so "
            "nothing of it is kept; choose save all"
        )
    if galore and axes.train in ("head", "bitfit"):
        trained = "the head alone" if axes.train == "head" else "biases and the head"
        return (
            f"optim {axes.optim} would project nothing: train {axes.train} trains {trained}, no matrix of a block; "
            "choose optim adamw, or another train"
        )
    if galore and axes.train in ADAPTERS and axes.galore_rank >= axes.rank:
        return (
            f"optim {axes.optim} of rank {axes.galore_rank} would project nothing: train {axes.train} trains matrices "
            f"of rank {axes.rank}; choose a galore rank below it, or optim adamw"
        )
    return None


def check(axes: Axes) -> Axes:
    """The axes themselves.

    Raises:
        UserError: naming a value out of its range, a setting that nothing reads, or an invalid combination.
    """
    for name in ("rank", "heads", "init_batches", "galore_rank", "gap"):
        if getattr(axes, name) < 1:
            raise UserError(f"{flag(name)} must be at least 1, got {getattr(axes, name)}")
    if axes.merge_steps < 0:
        raise UserError(f"--merge-steps must be 0 (never) or a number of steps, got {axes.merge_steps}")
    if not (0 <= axes.alpha < math.inf):
        raise UserError(f"--alpha must be positive, or 0 for α = r, got {axes.alpha}")
    if not (0 <= axes.first_step < math.inf):
        raise UserError(f"--first-step must be 0 or a small positive number, got {axes.first_step}")
    if axes.first_step and axes.init != "gradient":
        raise UserError(f"--first-step would do nothing with --init {axes.init}: it belongs to gradient; leave it out")
    if not (0 < axes.galore_scale < math.inf):
        raise UserError(f"--galore-scale must be positive, got {axes.galore_scale}")
    if not 0 <= axes.dropout < 1:
        raise UserError(f"--dropout must be at least 0 and below 1, got {axes.dropout}")
    if not 0 < axes.keep <= 1:
        raise UserError(f"--keep must be above 0 and at most 1, got {axes.keep}")
    if axes.recompute not in ("auto", "none") and axes.razor_mode != "low-bit":
        raise UserError(
            f"--recompute {axes.recompute} is for --razor-mode low-bit: the mode {axes.razor_mode} stores what it "
            "keeps, so leave it out"
        )
    why = refusal(axes)
    if why is not None:
        raise UserError(why)
    return axes


def refuse_unused(axes: Axes, given: set[str]) -> None:
    """Refuse settings that the user gave and no choice reads.

    Args:
        given: names of :class:`Axes` fields that stood on the command line.

    Raises:
        UserError: naming the flag and the choice that it belongs to.
    """
    for name, (axis, choices) in USED_BY.items():
        if name in given and getattr(axes, axis) not in choices:
            raise UserError(
                f"{flag(name)} would do nothing with --{axis} {getattr(axes, axis)}: it belongs to "
                f"{', '.join(choices)}; leave it out"
            )
    if "init_batches" in given and axes.init != "gradient":
        raise UserError(
            f"--init-batches would do nothing with --init {axes.init}: it belongs to gradient; leave it out"
        )


def in_plain_words(argv: Sequence[str]) -> list[str]:
    """``--save checkpoint:4`` or ``backrazor:4`` as the two flags that it is, and without ``--save auto``, which
    ``--budget`` says.

    Raises:
        UserError: if ``auto`` stands without a budget, or a choice with two selections of blocks.
    """
    words: list[str] = []
    blocks: dict[str, str] = {}
    for word in argv:
        found = re.fullmatch(r"(?:--save=)?(checkpoint|backrazor):(.*)", word)
        if found is None:
            words.append(word)
            continue
        words.append(word.partition(":")[0])
        name = BLOCK_FLAGS[found[1]]
        if blocks.setdefault(name, found[2]) != found[2]:
            raise UserError(f"--save names {found[1]} with two choices of blocks: give them one after another")
    for i, word in enumerate(words):
        if word == "--save=auto" or (word == "--save" and words[i + 1 : i + 2] == ["auto"]):
            if not any(w.split("=")[0] == "--budget" for w in words):
                raise UserError("--save auto needs --budget, the memory that a training step may take, as 6GiB")
            del words[i : i + (1 if "=" in word else 2)]
            break
    return [*words, *(word for name, numbers in blocks.items() for word in (flag(name), numbers))]


def save_words(axes: Axes) -> str:
    """The choice of save as ``--save`` takes it: "checkpoint:4" where only some blocks are meant."""
    blocks = getattr(axes, BLOCK_FLAGS.get(axes.save, ""), "")
    return axes.save + (f":{blocks}" if blocks else "")


def read_settings(axes: Axes) -> dict[str, float | int | str]:
    """The settings that the three choices read, for a record of the run."""
    return {n: getattr(axes, n) for n, (axis, choices) in USED_BY.items() if getattr(axes, axis) in choices}


def names() -> list[str]:
    return [f.name for f in dataclasses.fields(Axes)]
