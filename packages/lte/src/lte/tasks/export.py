"""``lte-export``: a trained model, its heads merged, as nanoGPT's checkpoint or as a transformers GPT-2 folder."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memtrain_common.commands.cli import parse, run_command
from memtrain_common.errors import UserError
from memtrain_common.files import check_targets

PROG = "lte-export"
DESCRIPTION = """Write a run's merged model for other tools. The first word is a run folder of lte-train's.

nanogpt writes OUT, a ckpt.pt that nanoGPT's sample.py and train.py load; transformers writes the folder OUT, which
GPT2LMHeadModel.from_pretrained loads. Both give the logits that lte-train evaluated."""


@dataclass(frozen=True)
class ExportConfig:
    """Every flag of lte-export."""

    run: str = ""
    """Run folder, if it is not the first word."""
    format: Literal["nanogpt", "transformers"] = "nanogpt"
    """Whose file to write."""
    out: str = ""
    """Where; empty takes RUN/ckpt.pt or RUN/gpt2."""
    dataset: str = ""
    """nanogpt: the folder in nanoGPT's data/ with the vocabulary (meta.pkl); empty takes the data folder's name."""
    tokenizer_dir: str = ""
    """transformers: folder with GPT-2's encoder.json and vocab.bpe, to go along; empty takes the run's, or
    those beside the bins."""


def export(argv: Sequence[str]) -> None:
    words = list(argv)
    if words and not words[0].startswith("-"):
        words[0] = f"--run={words[0]}"
    config = parse(ExportConfig, words, prog=PROG, description=DESCRIPTION)
    if not config.run:
        raise UserError("name the run to export as the first word")
    out = Path(config.out or Path(config.run) / ("ckpt.pt" if config.format == "nanogpt" else "gpt2"))
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out, or remove it")
    check_targets({"--out": str(out)}, makes_folders=True)
    if config.format == "nanogpt" and config.tokenizer_dir:
        raise UserError("--tokenizer-dir is for --format transformers: nanoGPT takes GPT-2's vocabulary from tiktoken")
    if config.format == "transformers" and config.dataset:
        raise UserError("--dataset is for --format nanogpt, whose sample.py looks for a vocabulary there")
    from memtrain_common.console import format_bytes
    from memtrain_common.data.text.tokenizers import GPT2_FILES, gpt2_files
    from memtrain_common.models.gpt_files import write_gpt2, write_nanogpt

    from .starting import read_run

    trained = read_run(Path(config.run), say=print)
    asked = trained.config
    if config.format == "nanogpt":
        globals_of_nanogpt = {
            **{name: getattr(asked, name) for name in _NANOGPT_KEYS},
            "dataset": config.dataset or Path(asked.data_dir or trained.data["name"]).name,
            "min_lr": asked.min_lr_ratio * asked.learning_rate,
        }
        write_nanogpt(
            out,
            trained.plain,
            iter_num=trained.step,
            best_val_loss=float("inf") if trained.best_loss is None else trained.best_loss,
            config=globals_of_nanogpt,
            dropout=asked.dropout,
        )
        size = out.stat().st_size
    else:
        folder = Path(config.tokenizer_dir) if config.tokenizer_dir else trained.tokenizer_dir
        files = gpt2_files(folder) if folder is not None else None
        if config.tokenizer_dir and files is None:
            raise UserError(f"{folder} does not hold {' and '.join(GPT2_FILES)}: --tokenizer-dir needs both")
        files = files if trained.data["tokenizer"] == "gpt2" else None
        write_gpt2(out, trained.plain, tokenizer=files)
        size = sum(p.stat().st_size for p in out.iterdir())
        if files is None:
            print(f"without a tokenizer: the tokens are {trained.data['tokenizer']}" + _hint(trained.data["tokenizer"]))
    print(f"{out}: {trained.choice}, {format_bytes(size)}")


_NANOGPT_KEYS = (
    "learning_rate", "max_iters", "weight_decay", "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters",
    "lr_decay_iters", "batch_size", "block_size", "gradient_accumulation_steps", "eval_interval", "eval_iters",
)  # fmt: skip


def _hint(tokenizer: str) -> str:
    return "; give GPT-2's files by --tokenizer-dir" if tokenizer == "gpt2" else ", which transformers has none for"


def main() -> None:
    """The console script."""
    sys.exit(run_command(export, prog=PROG))
