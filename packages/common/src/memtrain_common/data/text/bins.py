"""Token bins as nanoGPT reads them: ``train.bin`` and ``val.bin``, little-endian uint16, memory-mapped.

``lte-prepare`` writes ``meta.json`` beside them: tokenizer, vocabulary, tokens, bytes and SHA-256 a split. Bins without
one are nanoGPT's own: characters where there is a ``meta.pkl``, GPT-2's tokens where there is none.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...console import Console
from ...errors import UserError
from ...files import read_json
from .nanogpt_meta import read_meta_pickle
from .tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, gpt2_files

META, META_PICKLE, UNFINISHED = "meta.json", "meta.pkl", ".preparing"
SPLITS = ("train", "val", "test")
GPT2_VOCAB = 50257
_CHUNK = 2**24
_ENOUGH = 16
"""Tokens from which on zeros at every second place are no text's."""


def is_bins(folder: Path) -> bool:
    """Whether a folder holds bins, finished or not, rather than text."""
    return any((folder / name).exists() for name in ("train.bin", "val.bin", UNFINISHED))


def read_bins(folder: Path, tokenizer_dir: Path | None = None) -> dict[str, Any]:
    """The fields of a :class:`memtrain_common.data.text.corpus.Corpus`.

    All tokens are read once, for their largest and their SHA-256.

    Args:
        tokenizer_dir: GPT-2's ``encoder.json`` and ``vocab.bpe``; None takes those beside the bins, or tiktoken's.

    Raises:
        UserError: if a bin is missing, empty, of odd length, of wider tokens, other than ``meta.json`` says, or holds a
            token beyond the vocabulary.
    """
    if (folder / UNFINISHED).exists():
        raise UserError(f"{folder} is not prepared to its end: give the same lte-prepare command again, which goes on")
    meta = _read_meta(folder)
    coder = read_tokenizer(folder, tokenizer_dir)
    arrays, digest = {}, hashlib.sha256()
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        said = meta["splits"].get(split) if meta else None
        arrays[split], sha = _read_bin(path, coder, said)
        digest.update(bytes.fromhex(sha))
    n_bytes = sum(meta["splits"][s]["text_bytes"] for s in arrays) if meta else 0
    name = folder.resolve().name
    return {"name": name, **arrays, "tokenizer": coder, "n_bytes": n_bytes, "sha256": digest.hexdigest()}


def _read_meta(folder: Path) -> dict[str, Any] | None:
    path = folder / META
    if not path.exists():
        return None
    try:
        meta = read_json(path)
        for split in ("train", "val"):
            int(meta["splits"][split]["tokens"]), int(meta["splits"][split]["text_bytes"])
        if meta["tokenizer"] == "chars":
            letters = isinstance(meta["characters"], str) and len(set(meta["characters"])) == meta["vocab_size"]
            known = letters and len(meta["characters"]) == meta["vocab_size"]
        else:
            known = meta["tokenizer"] in ("gpt2", "bytes")
        if known and int(meta["vocab_size"]) > 0:
            return meta
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise UserError(
        f"{path} is not what lte-prepare writes: prepare the data again, or remove it if the bins are GPT-2's"
    )


def read_tokenizer(folder: Path, tokenizer_dir: Path | None = None) -> Tokenizer:
    """The tokenizer of the bins in a folder, by ``meta.json``, by nanoGPT's ``meta.pkl``, or else GPT-2's."""
    meta = _read_meta(folder)
    if meta is None and (folder / META_PICKLE).exists():
        return CharTokenizer(read_meta_pickle(folder / META_PICKLE))
    described = meta or {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB}
    return tokenizer_of(described, tokenizer_dir or (folder if gpt2_files(folder) else None))


def describe_tokenizer(coder: Tokenizer) -> dict[str, Any]:
    """What :func:`tokenizer_of` makes it again from."""
    letters = {"characters": coder.characters} if isinstance(coder, CharTokenizer) else {}
    return {"tokenizer": coder.name, "vocab_size": coder.vocab_size, **letters}


def tokenizer_of(described: dict[str, Any], tokenizer_dir: Path | None = None) -> Tokenizer:
    """The tokenizer that ``meta.json``, or a run's ``data``, describes: "tokenizer", "vocab_size", "characters".

    GPT-2's files are read only when something is encoded or decoded.
    """
    if described["tokenizer"] == "bytes":
        return ByteTokenizer()
    if described["tokenizer"] == "chars":
        return CharTokenizer(described["characters"])
    return GPT2Tokenizer(tokenizer_dir, vocab_size=described["vocab_size"])


def _read_bin(path: Path, coder: Tokenizer, said: dict[str, Any] | None) -> tuple[npt.NDArray[np.uint16], str]:
    """-> (tokens (n,), their SHA-256), after looking at every one of them."""
    if not path.is_file():
        raise UserError(f"{path} is missing: a folder of bins needs train.bin and val.bin, as lte-prepare makes them")
    size = path.stat().st_size
    if size % 2:
        raise UserError(f"{path} has {size} bytes, an odd number: uint16 tokens were cut short; prepare the data again")
    if not size:
        raise UserError(f"{path} is empty: prepare the data again")
    if said is not None and 2 * said["tokens"] != size:
        raise UserError(
            f"{path} holds {size // 2} tokens and {META} beside it says {said['tokens']}: they do not belong together; "
            "prepare the data again"
        )
    tokens: npt.NDArray[np.uint16] = np.memmap(path, "<u2", "r")
    digest = hashlib.sha256()
    bar = Console(quiet=size < 2**28).progress(size, label=f"checking {path.name}", scale=True)
    wider = said is None and len(tokens) >= _ENOUGH  # what meta.json counted has the width that was counted
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        if chunk.max() >= coder.vocab_size:
            at = int(np.argmax(chunk >= coder.vocab_size))
            raise UserError(
                f"{path} holds the token {chunk[at]} at position {start + at}, beyond the vocabulary of "
                f"{coder.vocab_size} ({coder.name}): it was made with another tokenizer, or is damaged"
            )
        wider = wider and not chunk[1::2].any()
        digest.update(chunk.data)
        bar.update(chunk.nbytes)
    bar.close()
    if wider:
        raise UserError(
            f"{path} has a 0 at every second place, as tokens of 32 or 64 bits have it: bins hold uint16; write it "
            "again with the dtype numpy.uint16, or prepare the data again with lte-prepare"
        )
    sha = digest.hexdigest()
    if said is not None and said.get("sha256", sha) != sha:
        raise UserError(f"{path} does not have the SHA-256 that {META} recorded: it is damaged; prepare the data again")
    return tokens, sha
