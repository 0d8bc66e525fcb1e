"""Language-modelling data: a corpus as two token arrays, cut into crops by :mod:`memtrain_common.data.order`.

The corpus is a folder of text files or of token bins (``--data-dir``), or, with no folder, the source of Python's
standard library, which every machine has.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ...files import visible_files
from ..order import random_offsets, rank_share
from .bins import describe_tokenizer, is_bins, read_bins
from .tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, Tokens

if TYPE_CHECKING:
    import torch

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".html", ".json", ".jsonl", ".csv", ".tsv")
VAL_FRACTION = 0.1  # nanoGPT's: the last tenth of a folder's text is for validation


@dataclass(frozen=True)
class Corpus:
    """Tokens for training and validation, and what is needed to describe and repeat them."""

    name: str
    train: Tokens  # (n_train,)
    val: Tokens  # (n_val,)
    tokenizer: Tokenizer
    n_bytes: int
    """Size of the text in bytes, both splits; 0 where bins do not tell."""
    sha256: str
    """Hash of the text or of the bins, both splits: a run refuses to resume on another corpus."""

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / (len(self.train) + len(self.val))

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            **describe_tokenizer(self.tokenizer),
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "bytes": self.n_bytes,
            "sha256": self.sha256,
        }


def load_corpus(data_dir: str | None = None, tokenizer: str = "bytes", tokenizer_dir: str | None = None) -> Corpus:
    """Read a corpus and tokenize it.

    Args:
        data_dir: folder of text files, read recursively in the order of their names and split 90/10 at the end; or
            of bins (:mod:`memtrain_common.data.text.bins`), which know their tokenizer; None takes the standard
            library's source, of which every tenth file (by a hash of its name) is for validation.
        tokenizer: "bytes", "chars" or "gpt2".
        tokenizer_dir: folder with GPT-2's ``encoder.json`` and ``vocab.bpe``.

    Raises:
        UserError: if the folder is missing or holds no text, or a file is not UTF-8 where characters are needed.
    """
    if data_dir is not None and is_bins(Path(data_dir)):
        corpus = Corpus(**read_bins(Path(data_dir), Path(tokenizer_dir) if tokenizer_dir else None))
        if tokenizer not in ("bytes", corpus.tokenizer.name):  # bytes is what a caller who chose nothing has
            raise UserError(f"the bins in {data_dir} hold {corpus.tokenizer.name} tokens, not {tokenizer}")
        return corpus
    if data_dir is None:
        train_raw, val_raw = _standard_library()
        name = "python-stdlib"
    else:
        raw = _read_folder(Path(data_dir))
        name = Path(data_dir).resolve().name
        train_raw, val_raw = _split(raw, whole_characters=tokenizer != "bytes", where=data_dir)
    coder: Tokenizer
    if tokenizer == "bytes":
        coder = ByteTokenizer()
    elif tokenizer == "chars":
        coder = CharTokenizer.of_text((train_raw + val_raw).decode())
    elif tokenizer == "gpt2":
        coder = GPT2Tokenizer(Path(tokenizer_dir) if tokenizer_dir else None)
    else:
        raise UserError(f"unknown tokenizer {tokenizer!r}: choose bytes, chars or gpt2")
    digest = hashlib.sha256(train_raw)
    digest.update(val_raw)
    return Corpus(
        name=name,
        train=coder.encode(train_raw),
        val=coder.encode(val_raw),
        tokenizer=coder,
        n_bytes=len(train_raw) + len(val_raw),
        sha256=digest.hexdigest(),
    )


def _standard_library() -> tuple[bytes, bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    train: list[bytes] = []
    val: list[bytes] = []
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip]  # installed packages are not even listed
        paths += [Path(folder, f) for f in files if f.endswith(".py")]
    for path in sorted(paths):
        raw = path.read_bytes()
        if not _is_utf8(raw):  # a tokenizer of characters must be able to read the whole corpus
            continue
        held_out = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[0] < 256 * VAL_FRACTION
        (val if held_out else train).append(raw)
    if not train or not val:
        raise UserError(f"this Python has no standard-library source in {root}: name a folder with --data-dir")
    return b"\n".join(train), b"\n".join(val)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_folder(folder: Path) -> bytes:
    if not folder.is_dir():
        raise UserError(f"the data folder {folder} does not exist: --data-dir needs a folder of text files")
    try:
        found = sorted(visible_files(folder))
        texts = [p for p in found if p.suffix.lower() in TEXT_SUFFIXES]
        raw = b"\n".join(p.read_bytes() for p in texts)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename} ({error.strerror}): mend it, or take it out of --data-dir"
        ) from None
    if not texts:
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        there = f"only {found[0].name}{others}" if found else "nothing"
        wanted = ", ".join(TEXT_SUFFIXES)
        raise UserError(f"the data folder {folder} holds {there}: --data-dir needs text files ({wanted})")
    if not raw.strip():
        raise UserError(f"the {len(texts)} text files in {folder} are empty: --data-dir needs some text")
    return raw


def _split(raw: bytes, *, whole_characters: bool, where: str) -> tuple[bytes, bytes]:
    if not whole_characters:
        cut = int(len(raw) * (1 - VAL_FRACTION))
        return raw[:cut], raw[cut:]
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"the text in {where} is not UTF-8 (byte {error.start}): convert it, or use --tokenizer bytes"
        ) from None
    cut = int(len(text) * (1 - VAL_FRACTION))
    return text[:cut].encode(), text[cut:].encode()


class Crops:
    """Random crops of the training tokens, and fixed ones of the validation tokens.

    ``crops(i)`` is micro-batch number i: inputs x (batch, block) and targets y (batch, block), where y is x moved by
    one token. It is a pure function of (seed, i); a process gets its share of the global batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_size: int,
        block_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        contiguous: bool = False,
    ) -> None:
        """``contiguous``: how the batch is shared out; see :func:`memtrain_common.data.order.rank_share`."""
        shortest = min(len(corpus.train), len(corpus.val))
        if shortest <= block_size:
            raise UserError(
                f"the corpus {corpus.name} has a split of {shortest} tokens, too few for a block of {block_size} and "
                "its target: use more text or a smaller --block-size"
            )
        self.corpus, self.batch_size, self.block_size, self.seed = corpus, batch_size, block_size, seed
        self.rank, self.world_size, self.contiguous = rank, world_size, contiguous

    def __call__(self, i: int) -> "tuple[torch.Tensor, torch.Tensor]":
        rows = random_offsets(
            self.seed, i, size=self.batch_size, high=len(self.corpus.train) - self.block_size
        )  # (batch,)
        return self._cut(self.corpus.train, rank_share(rows, self.rank, self.world_size, contiguous=self.contiguous))

    def validation(self, n_batches: int) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """``n_batches`` batches spread evenly over the validation tokens: the same ones at every evaluation.

        Where the tokens are fewer than that, every block of them once. Every process gets all of them.
        """
        last = len(self.corpus.val) - self.block_size - 1
        n_rows = max(1, min(n_batches * self.batch_size, last // self.block_size + 1))
        if n_rows > self.batch_size:  # batches of equal size: the mean of their losses is the mean over all tokens
            n_rows -= n_rows % self.batch_size
        rows = np.linspace(0, last, n_rows).astype(np.int64)
        for start in range(0, n_rows, self.batch_size):
            yield self._cut(self.corpus.val, rows[start : start + self.batch_size])

    def _cut(self, tokens: Tokens, rows: npt.NDArray[np.int64]) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        span = rows[:, None] + np.arange(self.block_size + 1)  # (batch, block + 1)
        window = torch.from_numpy(tokens[span].astype(np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def ngram_entropies(tokens: Tokens) -> tuple[float, float]:
    """The unigram and the bigram entropy of a token sequence, in nats per token.

    H₁ = −Σ p(a) ln p(a);  H₂ = −Σ p(a, b) ln p(b | a), with the sequence's own relative frequencies: the losses of
    the best model that knows no context, and of the best one that knows one token of it, on this very sequence.
    """
    wide = tokens.astype(np.int64)
    pairs = wide[:-1] * (int(wide.max()) + 1) + wide[1:]
    return _entropy(wide), _entropy(pairs) - _entropy(wide[:-1])


def _entropy(symbols: npt.NDArray[np.int64]) -> float:
    """−Σ p ln p of the symbols' relative frequencies, in nats."""
    few = symbols.max() < 2**20  # counting into a table is ten times faster than sorting, where a table is small
    counts = np.bincount(symbols) if few else np.unique(symbols, return_counts=True)[1]
    p = counts[counts > 0] / len(symbols)
    return float(-(p * np.log(p)).sum())
