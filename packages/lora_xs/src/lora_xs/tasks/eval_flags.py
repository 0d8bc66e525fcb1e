"""``lora-xs eval``: flags and checks."""

from dataclasses import dataclass
from typing import Literal

from memtrain_common.commands.configure import at_least, required
from memtrain_common.errors import UserError
from memtrain_common.files import check_targets

from .shared_flags import AdapterFlags

PROG = "lora-xs eval"
COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")


@dataclass(frozen=True)
class EvalConfig(AdapterFlags):
    """Every flag of lora-xs eval."""

    adapter: str = ""
    """Adapter folder; empty evaluates the base model alone."""
    out: str = ""
    """JSON Lines file for the predictions; empty names one in runs/ by date and time."""
    data: str = ""
    """gsm8k, math, commonsense:NAME (commonsense:boolq, …), or a JSON or JSON Lines file of such rows."""
    data_dir: str = ""
    """Folder with the set's test file (DIR/test.jsonl, DIR/boolq/test.json); empty reads gsm8k from the hub."""
    resume: bool = False
    """Go on with the predictions that --out already has."""
    official_metric: bool = False
    """Ask, read and compare as the official code does, bugs included, to compare with published numbers."""
    prompt: Literal["auto", "alpaca", "commonsense"] = "auto"
    """How to ask; auto asks as the adapter was trained, or else as the official runs do for such data."""
    num_beams: int = 0
    """Beams; 1 is greedy. 0 takes the official number: 1 for gsm8k and math, 4 for commonsense."""
    max_new_tokens: int = 0
    """Longest answer; 0 takes the official length: 1024 for gsm8k, 2048 for math, 32 for commonsense."""
    batch_size: int = 16
    """Prompts generated together."""
    limit: int = 0
    """Use the first so many rows; 0 uses all."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def check(config: EvalConfig) -> EvalConfig:
    """The configuration itself.

    Raises:
        UserError: naming the flag and what would be right.
    """
    required(config, data="give gsm8k, math, commonsense:NAME or a file")
    at_least(config, num_beams=0, max_new_tokens=0, batch_size=1, limit=0)
    if not config.adapter and not config.model:
        raise UserError("--adapter and --model are both missing: give at least one of them")
    kind, _, name = config.data.partition(":")
    if kind == "commonsense":
        if name not in COMMONSENSE:
            raise UserError(f"--data {config.data} names no known set: commonsense:NAME with {', '.join(COMMONSENSE)}")
        if not config.data_dir:
            raise UserError(f"--data {config.data} needs --data-dir, the folder with {name}/test.json")
    if config.data == "math" and not config.data_dir:
        raise UserError("--data math needs --data-dir, the folder with test.jsonl (problem and solution a line)")
    if config.resume and not config.out:
        raise UserError("--resume needs --out, the file to go on with")
    check_targets({"--out": config.out}, makes_folders=True)
    return config
