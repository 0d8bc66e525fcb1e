"""``pretrain``: one choice on each axis, a language model from random weights."""

from collections.abc import Sequence
from typing import Any

from .config import PretrainConfig
from .text import text_workload
from .training import run

PROG = "pretrain"


def run_pretrain(config: PretrainConfig, argv: Sequence[str]) -> dict[str, Any] | None:
    """Train one combination; -> the content of its result.json, or None where memory was only explained."""
    return run(config, text_workload, argv, PROG)
