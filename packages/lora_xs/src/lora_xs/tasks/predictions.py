"""The predictions of ``lora-xs eval``: JSON Lines, gone on with only by what made them.

Beside ``OUT`` lies ``OUT.about.json``: adapter, base model, and whatever else an answer depends on.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memtrain_common.errors import UserError
from memtrain_common.files import parse_json, read_json, write_json
from memtrain_common.models.encoders import model_parts
from torch import nn

from ..adapter_header import ADAPTER, ADAPTER_FORMAT
from ..digest import weight_digests
from ..files import read_header

Row = dict[str, Any]


def line_of(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def about_of(model: nn.Module, tokenizer: Any, name: str, adapter: str, **settings: Any) -> dict[str, Any]:
    """What the answers depend on besides the questions, for ``OUT.about.json``.

    Args:
        model: with the adapter in it.
        tokenizer: of the prompts and the answers.
        name: the base model's folder or hub name; where it lies makes no difference.
        adapter: its folder; "" is none.
        settings: beams, lengths, the base's type.
    """
    sha, state = hashlib.sha256(), model.state_dict()
    for key, digest in zip(state, weight_digests(state.values()), strict=True):
        sha.update(key.encode() + digest)
    generation = model.generation_config.to_dict()  # type: ignore[operator,union-attr]
    kept = {k: v for k, v in generation.items() if k not in ("transformers_version", "_from_model_config")}
    more: list[Any] = [model_parts(name), kept, sorted(tokenizer.get_vocab().items())]
    own, end = kept.get("eos_token_id"), tokenizer.eos_token_id
    if end is not None and end not in (own if isinstance(own, list) else [own]):  # else as files of before have it
        more.append(["the tokenizer's end token", end])
    sha.update(json.dumps(more, sort_keys=True, default=str).encode())
    stated = read_header(Path(adapter) / ADAPTER, ADAPTER_FORMAT)["sha256"] if adapter else ""
    return {"adapter_sha256": stated, **settings, "model_sha256": sha.hexdigest(), "model": name}


def finished(out: Path, resume: bool, now: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows that a file already has, and the bytes of their lines; a last line that a kill cut short is left out.

    Args:
        now: of each question what its row must have: "prompt", "expected", "official_metric".

    Raises:
        UserError: if the file is there and is not to be gone on with, or has rows of other questions.
    """
    if not out.exists():
        if resume:
            raise UserError(f"there is no {out} to go on with: leave --resume out")
        _refuse_another(_beside(out))
        return [], 0
    if not resume:
        raise UserError(f"{out} exists: choose another --out, or resume it with --resume")
    try:
        raw = out.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        rows = [parse_json(line) for line in whole.split(b"\n")[:-1]]
        if raw and not whole and not _beside(out).exists():
            raise ValueError("it has no whole line")
    except (OSError, ValueError) as error:
        raise UserError(f"{out} holds other things than predictions ({error}): choose another --out") from None
    if len(rows) > len(now):
        raise UserError(f"{out} holds other predictions than these ({len(rows):,} of them): choose another --out")
    for number, (row, wanted) in enumerate(zip(rows, now, strict=False), start=1):
        there = row if isinstance(row, dict) else {}
        differs = next((name for name, value in wanted.items() if name not in there or there[name] != value), None)
        if differs is not None or not isinstance(there.get("correct"), bool):
            what = differs or "correct"
            raise UserError(
                f"{out} holds other predictions than these: {what} of line {number} is {there.get(what)!r:.60}, and "
                f"would be {wanted.get(what, 'true or false')!r:.60}; choose another --out"
            )
    return rows, len(whole)


def begin(out: Path, done: Sequence[Row], whole: int, about: Mapping[str, Any]) -> None:
    """Make the file ready for the next rows: what made it is beside it, and its last line is whole.

    Args:
        done, whole: as :func:`finished` found them.
        about: as :func:`about_of` makes it.

    Raises:
        UserError: if the finished rows were made by something else, naming what.
    """
    if done:
        _compare(out, _beside(out), about)
        os.truncate(out, whole)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(_beside(out), dict(about))
        out.write_bytes(b"")


def _beside(out: Path) -> Path:
    return out.with_name(out.name + ".about.json")


def _refuse_another(beside: Path) -> None:
    """Refuse to write over a file beside the predictions that no evaluation has written."""
    try:
        ours = not beside.exists() or "model_sha256" in read_json(beside)
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{beside} is there already, and says of no predictions what made them: choose another --out")


def _compare(out: Path, beside: Path, about: Mapping[str, Any]) -> None:
    try:
        before = read_json(beside)
        lacks = next((name for name in about if name not in before), None)
    except FileNotFoundError:
        raise UserError(
            f"{out} does not say what made its predictions: there is no {beside.name} beside it, as earlier versions "
            "wrote none; choose another --out"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{beside} cannot be read ({error}): choose another --out") from None
    if lacks is not None:
        raise UserError(f"{beside} does not say {lacks}: choose another --out")
    for name, value in about.items():
        if name == "model" or before[name] == value:
            continue
        if name == "adapter_sha256":
            by = ("another adapter" if value else "an adapter") if before[name] else "the base model alone"
        elif name == "model_sha256":
            by = f"another base model ({before['model']})"
        else:
            by = f"--{name.replace('_', '-')} {before[name]}, not {value}"
        raise UserError(f"the predictions in {out} were made by {by}: go on with the same, or choose another --out")
