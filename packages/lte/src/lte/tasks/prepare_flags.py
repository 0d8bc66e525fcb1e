"""``lte-prepare``: a data set to nanoGPT's token bins: flags and data sets. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from memtrain_common.commands.cli import flag_value, parse
from memtrain_common.errors import UserError

PROG = "lte-prepare"
DESCRIPTION = """Turn a data set into token bins: train.bin and val.bin (uint16, as nanoGPT reads them) and meta.json.

The first word is a data set, or a folder of text, CSV, JSON Lines or parquet. A command that was killed goes on when it
is given again. Without --data-dir a data set comes from the hub."""


@dataclass(frozen=True)
class DataSet:
    """Where a known data set comes from, and how it is cut."""

    column: str = "text"
    val_fraction: float = 0.1
    separator: Literal["eot", "newline", "nothing"] = "eot"
    tokenizer: Literal["gpt2", "chars"] = "gpt2"
    hub: tuple[str, str | None, str | None] | None = None
    """Name, subset, revision on the hub."""
    hub_splits: dict[str, str] = field(default_factory=dict)
    """Our split by the hub's."""
    url: str = ""
    sha256: str = ""
    """Of the file at ``url``."""


TINY_SHAKESPEARE = DataSet(
    separator="nothing",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
DATASETS = {
    "openwebtext": DataSet(
        val_fraction=0.0005,
        hub=("Skylion007/openwebtext", None, "refs/convert/parquet"),
        hub_splits={"train": "train"},
    ),
    "shakespeare": TINY_SHAKESPEARE,
    "shakespeare-char": replace(TINY_SHAKESPEARE, tokenizer="chars"),
    "cnn-dailymail": DataSet(
        column="article",
        hub=("abisee/cnn_dailymail", "3.0.0", None),
        hub_splits={"train": "train", "validation": "val", "test": "test"},
    ),
}


@dataclass(frozen=True)
class PrepareConfig:
    """Every flag of lte-prepare; what is empty is filled in by :func:`resolve`."""

    dataset: str = ""
    """openwebtext, shakespeare, shakespeare-char or cnn-dailymail; empty for files of your own."""
    data_dir: str = ""
    """Folder of files (or one file): text, or CSV, TSV, JSON Lines, parquet, which come before text."""
    out: str = ""
    """Folder for the bins; empty takes data/NAME, as nanoGPT has it."""
    column: str = ""
    """Column of a table that holds the text; empty takes the data set's, or "text"."""
    tokenizer: Literal["", "gpt2", "chars", "bytes"] = ""
    """What a token is; empty takes the data set's, or gpt2."""
    tokenizer_dir: str = ""
    """Folder with GPT-2's encoder.json and vocab.bpe, which are copied beside the bins; empty lets tiktoken download
    them."""
    separator: Literal["", "eot", "newline", "nothing"] = ""
    """What follows each document: <|endoftext|>, a newline or nothing. Empty: nothing after a single text, else eot
    (newline where the tokenizer has no such token)."""
    val_fraction: float = -1.0
    """Share for validation where no file is named after val: documents at equal distances, or the end of a single
    text. Negative takes the data set's, or 0.1."""
    workers: int = 0
    """Threads that tokenize; 0 takes one a core."""


def resolve(argv: Sequence[str]) -> PrepareConfig:
    """The flags, checked, with a data set's own values filled in."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        first = words.pop(0)
        name = first.replace("_", "-")  # nanoGPT's names
        if name in DATASETS:
            words.append(f"--dataset={name}")
        elif Path(first).exists():
            if flag_value(words, "--data-dir") is not None:
                raise UserError(f"{first} and --data-dir name the files twice: drop one of them")
            words.append(f"--data-dir={first}")
        else:
            raise UserError(f"{first} is neither a folder nor one of {', '.join(DATASETS)}")
    config = parse(PrepareConfig, words, prog=PROG, description=DESCRIPTION)
    if config.dataset and config.dataset not in DATASETS:
        raise UserError(f"unknown data set {config.dataset!r}: choose one of {', '.join(DATASETS)}, or name a folder")
    if not config.dataset and not config.data_dir:
        raise UserError(f"name a data set ({', '.join(DATASETS)}) or a folder as the first word")
    known = DATASETS.get(config.dataset, DataSet())
    tokenizer = config.tokenizer or known.tokenizer
    if tokenizer != "gpt2":
        if config.tokenizer_dir:
            raise UserError("--tokenizer-dir is for --tokenizer gpt2: give both or neither")
        if config.separator == "eot":
            raise UserError(f"--separator eot needs --tokenizer gpt2, which has that token; {tokenizer} has none")
    val_fraction = known.val_fraction if config.val_fraction < 0 else config.val_fraction
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction must be above 0 and below 1, got {config.val_fraction}")
    if config.workers < 0:
        raise UserError(f"--workers must be at least 0, got {config.workers}")
    name = config.dataset.replace("-", "_") or Path(config.data_dir).resolve().name.partition(".")[0]
    out = config.out or str(Path("data") / name)
    if config.data_dir and Path(config.data_dir).is_dir():
        inside = [Path(out).resolve(), *Path(out).resolve().parents]
        if Path(config.data_dir).resolve() in inside:
            raise UserError(f"the bins would lie in the data folder, {out}: choose another place with --out")
    if Path(out).is_file():
        raise UserError(f"{out} is a file: --out needs the name of a folder")
    return replace(
        config,
        out=out,
        column=config.column or known.column,
        tokenizer=tokenizer,
        separator=config.separator or ("nothing" if known.separator == "nothing" else ""),
        val_fraction=val_fraction,
    )
