"""The flags of Back Razor that its commands share, and what they must satisfy. No torch here."""

from typing import Any, Literal

from memtrain_common.commands.configure import fraction, refuse_unused

Mode = Literal["full", "bitfit", "backrazor", "head"]
RazorMode = Literal["default", "paper"]
Attention = Literal["pruned", "exact"]
Values = Literal["bf16", "fp32", "fp16", "int8"]
FIELDS = ("keep", "razor_mode", "attention", "values")


def check_razor(config: Any, plain: Any) -> None:
    """Refuse a keep outside of (0, 1], and Back Razor's flags where ``config.mode`` is another.

    Args:
        config: with the fields ``mode`` and :data:`FIELDS`.
        plain: the preset that flags were laid over.
    """
    fraction(config, "keep")
    if config.mode != "backrazor":
        refuse_unused(config, plain, FIELDS, f"--mode {config.mode} saves everything that its backward pass needs")
