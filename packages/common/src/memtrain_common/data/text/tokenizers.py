"""Text to integers and back: bytes, characters, and GPT-2's byte-pair encoding (by tiktoken)."""

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = ("encoder.json", "vocab.bpe")
Tokens = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class Tokenizer(Protocol):
    """What the data loaders and generation need of a tokenizer."""

    name: str
    vocab_size: int

    def encode(self, raw: bytes) -> Tokens: ...

    def decode(self, tokens: Tokens) -> bytes: ...


class ByteTokenizer:
    """A token is a byte; nothing can be out of vocabulary."""

    name = "bytes"
    vocab_size = 256

    def encode(self, raw: bytes) -> Tokens:
        return np.frombuffer(raw, np.uint8)

    def decode(self, tokens: Tokens) -> bytes:
        return np.asarray(tokens).astype(np.uint8).tobytes()


class CharTokenizer:
    """A token is a character: its place in the vocabulary. :meth:`of_text` sorts a text's, as nanoGPT's ``prepare.py``
    does; bins may have any other order (``meta.pkl``), which is kept."""

    name = "chars"

    def __init__(self, characters: str) -> None:
        """``characters``: the vocabulary, each of them once, in the order of their tokens."""
        if len(set(characters)) != len(characters):
            raise ValueError("a vocabulary has each character once: CharTokenizer.of_text makes one from a text")
        self.characters = characters
        self.vocab_size = len(characters)
        codes = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        self._order = np.argsort(codes)  # the tokens, by their code points
        self._codes = codes[self._order]

    @classmethod
    def of_text(cls, text: str) -> "CharTokenizer":
        """The vocabulary of a text: its characters, sorted."""
        return cls("".join(sorted(set(text))))

    def encode(self, raw: bytes) -> Tokens:
        codes = np.frombuffer(raw.decode().encode("utf-32-le"), np.uint32)
        places = np.searchsorted(self._codes, codes)
        wrong = (places == self.vocab_size) | (self._codes[np.minimum(places, self.vocab_size - 1)] != codes)
        if wrong.any():
            raise UserError(f"the character {chr(int(codes[wrong][0]))!r} is not in the vocabulary of this corpus")
        tokens = self._order[places]
        return tokens.astype(np.uint16) if self.vocab_size <= 2**16 else tokens.astype(np.uint32)

    def decode(self, tokens: Tokens) -> bytes:
        return "".join(self.characters[int(t)] for t in tokens).encode()


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding: 50,257 tokens, of which the last is ``<|endoftext|>``.

    Read from a folder that holds ``encoder.json`` and ``vocab.bpe`` (:func:`gpt2_files`), or, without one, by tiktoken,
    which downloads the same two files once and verifies their hashes.
    """

    name = "gpt2"

    def __init__(self, folder: Path | None = None, *, vocab_size: int | None = None) -> None:
        """``vocab_size``, where it is known already, puts off reading the files until something is encoded."""
        self._folder = folder
        self.vocab_size = self._encoding.n_vocab if vocab_size is None else vocab_size

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        if self._folder is not None:
            return tiktoken.Encoding("gpt2-local", **_local_gpt2(self._folder))
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' exceptions, which tiktoken lets through
            raise UserError(
                f"tiktoken could not download the GPT-2 vocabulary ({type(error).__name__}): put encoder.json and "
                "vocab.bpe into a folder and name it with --tokenizer-dir"
            ) from None

    @property
    def end_of_text(self) -> int:
        """The token ``<|endoftext|>``, which no text encodes to."""
        return int(self._encoding.eot_token)

    def encode(self, raw: bytes) -> Tokens:
        """Text to tokens; "<|endoftext|>" in it is text like any other."""
        return self._encoding.encode_to_numpy(raw.decode(), disallowed_special=()).astype(np.uint16)

    def encode_documents(self, texts: Sequence[str]) -> Tokens:
        """Texts one after another, each by itself, with ``end_of_text`` behind each.

        One call of tiktoken, which lets go of Python's lock: threads encode at the same time.
        """
        if any(END_OF_TEXT in text for text in texts):  # there it is text
            end = np.array([self.end_of_text], np.uint16)
            return np.concatenate([tokens for text in texts for tokens in (self.encode(text.encode()), end)])
        joined = "".join(text + END_OF_TEXT for text in texts)
        return self._encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}).astype(np.uint16)

    def decode(self, tokens: Tokens) -> bytes:
        return self._encoding.decode_bytes([int(t) for t in tokens])


def gpt2_files(folder: Path) -> tuple[Path, Path] | None:
    """GPT-2's two files of a vocabulary in a folder, under OpenAI's names or transformers'; None where they are not."""
    for names in (GPT2_FILES, ("vocab.json", "merges.txt")):
        encoder, merges = (folder / name for name in names)
        if encoder.is_file() and merges.is_file():
            return encoder, merges
    return None


def _local_gpt2(folder: Path) -> dict[str, Any]:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

    found = gpt2_files(folder)
    if found is None:
        lacking = next(path for name in GPT2_FILES if not (path := folder / name).is_file())
        raise UserError(f"{lacking} is missing: --tokenizer-dir needs GPT-2's encoder.json and vocab.bpe")
    encoder, merges = found
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
    except (AssertionError, KeyError, ValueError):
        raise UserError(f"{encoder} and {merges} do not belong together, or are not GPT-2's files") from None
    return {
        "explicit_n_vocab": len(ranks) + 1,
        "pat_str": r50k_pat_str,
        "mergeable_ranks": ranks,
        "special_tokens": {ENDOFTEXT: len(ranks)},
    }


def default_prompt(tokenizer: Tokenizer) -> Tokens:
    """What generation starts from: a newline, or the first token where a corpus has none."""
    try:
        return tokenizer.encode(b"\n")
    except UserError:
        return np.zeros(1, np.uint16)


def printable(raw: bytes) -> str:
    """Generated bytes as text for a terminal: what is not UTF-8 is shown as ``�``, control characters removed."""
    text = raw.decode("utf-8", "replace")
    shown = "".join(c for c in text if c in "\n\t" or c.isprintable())
    return shown.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8")
