"""nanoGPT's ``meta.pkl``, the vocabulary beside character-level bins: written for nanoGPT, and read without unpickling.

nanoGPT pickles ``{"vocab_size": 65, "itos": {0: "\\n", …}, "stoi": {"\\n": 0, …}}``. Unpickling can run any code, so
the file is read as a list of opcodes, and only those that build dicts of numbers and strings are understood.
"""

import pickletools
from collections.abc import Iterator
from pathlib import Path
from pickle import dumps  # writing runs nothing; nothing here loads a pickle
from typing import Any

from ...errors import UserError


def write_meta_pickle(path: Path, characters: str) -> None:
    """Write what nanoGPT's ``train.py`` and ``sample.py`` read beside the bins."""
    pairs = list(enumerate(characters))
    path.write_bytes(dumps({"vocab_size": len(pairs), "itos": dict(pairs), "stoi": {c: i for i, c in pairs}}))


def read_meta_pickle(path: Path) -> str:
    """The characters of nanoGPT's ``meta.pkl``, in the order of their tokens.

    Raises:
        UserError: if the file holds anything but such a vocabulary, or its two dicts say different things.
    """
    try:
        meta = _build(path.read_bytes())
        itos = meta["itos"]
        characters = [itos[i] for i in range(len(itos))]
        stoi = {c: i for i, c in enumerate(characters)}
        if (
            meta["vocab_size"] == len(characters) == len(stoi)
            and meta.get("stoi", stoi) == stoi
            and all(isinstance(c, str) and len(c) == 1 for c in characters)
        ):
            return "".join(characters)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError):
        pass
    raise UserError(
        f"{path} is not a vocabulary as nanoGPT writes it (a pickle of anything else is never loaded): prepare the "
        "data again with lte-prepare"
    )


def _build(raw: bytes) -> Any:
    """The value of a pickle that is made of dicts, strings and whole numbers; ValueError for every other opcode."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = object()
    operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(raw)
    for opcode, argument, _ in operations:
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                stack.append(mark)
            case "BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                start = max(i for i, item in enumerate(stack) if item is mark)
                items = stack[start + 1 :]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(name)
    raise ValueError("no end")
