"""The flags of Back Razor that its commands share, and what they must satisfy. No torch here."""

from dataclasses import dataclass
from typing import Any, Literal

from memtrain_common.commands.configure import fraction, refuse_unused
from memtrain_common.errors import UserError

Mode = Literal["full", "bitfit", "backrazor", "head", "lite-residual", "lite-residual+bias"]
RazorMode = Literal["low-bit", "pruned", "paper"]
Attention = Literal["pruned", "exact"]
Values = Literal["bf16", "fp32", "fp16", "int8"]
Recompute = Literal["auto", "none", "attention", "block"]
FIELDS = ("keep", "razor_mode", "attention", "values", "recompute", "exact")


@dataclass(frozen=True)
class RazorFlags:
    """What Back Razor keeps of each activation."""

    keep: float = 0.1
    """Part of each activation that Back Razor keeps: of its bits in the mode low-bit, otherwise of its elements, as 1
    less the official back_prune_ratio."""
    razor_mode: RazorMode = "low-bit"
    """low-bit: all elements in some 32 · keep bits. pruned: the largest elements. paper: what the official code has."""
    attention: Attention = "pruned"
    """Whether attention's own activations are pruned too, or kept as they are."""
    values: Values = "bf16"
    """How kept values are written, in the mode pruned."""
    recompute: Recompute = "auto"
    """What is made again in the backward pass and not stored, in the mode low-bit: attention's Q, K and V; or a whole
    block from its norms. auto: nothing, and below keep = 0.09 the block."""
    exact: tuple[str, ...] = ()
    """What is left to PyTorch: kinds of operations (attention, norm, activation, convolution, depthwise) or patterns of
    modules, as "*.stem"."""

    def __post_init__(self) -> None:
        if self.razor_mode == "default":  # of a run begun when this was the pruned one
            object.__setattr__(self, "razor_mode", "pruned")


@dataclass(frozen=True)
class ModeFlags(RazorFlags):
    """What is trained, and what is saved for the backward pass."""

    mode: Mode = "backrazor"
    """full: all weights, dense (the baseline). bitfit: biases and the head. head: the head alone. backrazor: all
    weights, with the saved activations made smaller. lite-residual: TinyTL's branches and the head (proxyless_mobile);
    +bias: biases too."""


def check_razor(config: Any, plain: Any) -> None:
    """Refuse a keep outside of (0, 1], and Back Razor's flags where ``config.mode`` is another.

    Args:
        config: with the fields ``mode`` and :data:`FIELDS`.
        plain: the preset that flags were laid over.
    """
    fraction(config, "keep")
    if config.razor_mode != "low-bit" and config.recompute not in ("auto", "none"):
        raise UserError(
            f"--recompute {config.recompute} is for --razor-mode low-bit: the mode {config.razor_mode} stores "
            "what it keeps, so leave it out"
        )
    if config.mode != "backrazor":
        refuse_unused(config, plain, FIELDS, f"--mode {config.mode} saves everything that its backward pass needs")
