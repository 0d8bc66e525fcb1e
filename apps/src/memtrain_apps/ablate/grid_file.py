"""Grids from TOML files, and from what an ablation kept of its own: every name and value checked."""

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from memtrain_common.errors import UserError

from ..compose.axes import OPTIM, TRAIN, USED_BY, Axes
from ..compose.partial import names_blocks
from .grid import AXES, LISTED, OWN_FLAGS, TABLES, Grid

LARGEST = 2**31 - 1
"""Of a number on an axis."""
MOST_SEEDS = 10_000


def read_grid(path: Path) -> Grid:
    """The grid in a TOML file.

    Raises:
        UserError: naming the file, the key, and what would be right.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the grid {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not TOML: {reason}") from None
    try:
        return grid_of(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def grid_of(content: Mapping[str, Any]) -> Grid:
    """A grid from TOML's values.

    Raises:
        UserError: naming the key.
    """
    content = {k.replace("-", "_"): v for k, v in content.items()}
    _known(content, (*LISTED, "seeds", *TABLES), "")
    rates = content.get("lr") if isinstance(content.get("lr"), dict) else None
    shared = {n: _values(n, content[n]) for n in LISTED if n in content and not (n == "lr" and rates is not None)}
    tables = content.get("grid", [{}])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables) or not tables:
        raise UserError("grid must be tables, each begun by [[grid]]")
    products = []
    for number, table in enumerate(tables, start=1):
        where = f" in [[grid]] number {number}" if "grid" in content else ""
        table = {k.replace("-", "_"): v for k, v in table.items()}
        _known(table, LISTED, where)
        own = {n: _values(n, v, where) for n, v in table.items()}
        _all_read(own, {**shared, **own}, where)
        products.append({**shared, **own})
    for name in shared:
        if not any(_reads(name, p) for p in products):
            _all_read({name: shared[name]}, products[0], "")
    return Grid(
        tuple(products),
        _seeds(content.get("seeds", 3)),
        _rates(rates or {}),
        _flags(content, "finetune") or {},
        _flags(content, "pretrain"),
    )


def _values(name: str, given: Any, where: str = "") -> list[Any]:
    """One value or a list of them, each of the setting's type."""
    values = given if isinstance(given, list) else [given]
    if not values:
        raise UserError(f"{name}{where} lists nothing: name at least one value")
    out = []
    for value in values:
        if name in AXES:
            if value not in AXES[name]:
                near = nearest(str(value), AXES[name])
                raise UserError(f"{name}{where} {value!r} is unknown{near}: choose from {', '.join(AXES[name])}")
        else:
            value = _setting(name, value, where)
        if value in out:
            raise UserError(f"{name}{where} lists {value!r} twice: name each value once")
        out.append(value)
    return out


def _setting(name: str, value: Any, where: str) -> Any:
    kind = float if name == "lr" else get_type_hints(Axes)[name]
    if get_args(kind):  # a Literal
        if value not in get_args(kind):
            raise UserError(f"{name}{where} {value!r} is unknown: choose from {', '.join(get_args(kind))}")
        return value
    if kind is str:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UserError(f"{name}{where} must be words such as '0-3', got {value!r}")
        if not names_blocks(str(value)):
            raise UserError(
                f"{name}{where} {value!r} names no blocks: give 4 for the first four, or numbers from 0, as 0-3,6, in "
                "at most 64 characters"
            )
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{name}{where} must be {what}, got {value!r}")
    if name == "lr" and not 0 < value < math.inf:
        raise UserError(f"lr{where} must be above 0, got {value!r}")
    if not -LARGEST <= value <= LARGEST:
        raise UserError(f"{name}{where} is out of range: its size is at most {LARGEST:,}")
    return kind(value)


def _reads(name: str, product: Mapping[str, list[Any]]) -> bool:
    if name not in USED_BY:
        return True
    axis, users = USED_BY[name]
    return bool(set(product.get(axis, [getattr(Axes(), axis)])) & set(users))


def _all_read(own: Mapping[str, Any], product: Mapping[str, list[Any]], where: str) -> None:
    for name in own:
        if not _reads(name, product):
            axis, users = USED_BY[name]
            raise UserError(
                f"{name}{where} would do nothing: it belongs to {axis} {', '.join(users)}, and the grid has none of "
                "them"
            )


def _seeds(given: Any) -> tuple[int, ...]:
    counted = isinstance(given, int) and not isinstance(given, bool)
    values = list(range(given)) if counted and given <= MOST_SEEDS else given
    whole = isinstance(values, list) and all(type(s) is int and 0 <= s < 2**63 for s in values)
    if not whole or not values or len(set(values)) < len(values):
        raise UserError(
            f"seeds must be how many, at least 1 and at most {MOST_SEEDS:,}, or a list of different whole numbers "
            f"below 2^63, got {given!r}"
        )
    return tuple(values)


def _rates(table: Mapping[str, Any]) -> dict[str, float]:
    for name, value in table.items():
        train, _, optim = name.partition("+")
        if train not in TRAIN or (optim and optim not in OPTIM):
            raise UserError(f'[lr] has the key {name!r}: name a train ("lora"), or a train and an optim ("full+sgd")')
        _setting("lr", value, f" {name}")
    return {name: float(value) for name, value in table.items()}


def _flags(content: Mapping[str, Any], table: str) -> dict[str, Any] | None:
    """A table of finetune's flags, by the names of its fields."""
    from ..run.config import FinetuneConfig

    if table not in content:
        return None
    if not isinstance(content[table], dict):
        raise UserError(f"{table} must be a table, begun by [{table}]")
    given = {k.replace("-", "_"): v for k, v in content[table].items()}
    known = {f.name for f in fields(FinetuneConfig)} - OWN_FLAGS
    if table == "finetune":
        for name in given:
            if name in LISTED:
                raise UserError(
                    f"{name} in [finetune] is compared, not fixed: list it above the tables, or in [[grid]]"
                )
    for name in given:
        if name in OWN_FLAGS:
            raise UserError(f"{name} in [{table}] is ablate's own: it sets that flag of finetune for each arm")
        if name not in known:
            near = nearest(name, sorted(known))
            raise UserError(f"unknown key {name!r} in [{table}]{near}: it holds flags of finetune, which --help lists")
    for name, value in given.items():
        if isinstance(value, dict):
            raise UserError(f"{name} in [{table}] must be a value, not a table")
    return given


def _known(given: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in given:
        if name not in names:
            known = ", ".join(dict.fromkeys(names))
            raise UserError(f"unknown key {name!r}{where}{nearest(name, names)}; the keys are {known}")


def nearest(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def flags_of(words: Sequence[str]) -> dict[str, Any]:
    """Words as a table of flags: what ``[finetune]`` would hold.

    Raises:
        UserError: on a word that is no flag's, and on a flag that finetune lacks or a grid compares.
    """
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            name = "lr" if name == "learning_rate" else name
            off = name.startswith("no_") and not equals
            name = name.removeprefix("no_") if off else name
            found[name] = [value] if equals else not off
        elif not name or found[name] is False:
            raise UserError(f"unexpected word {word!r} after --: flags of finetune begin with --")
        else:
            before = found[name]
            found[name] = [*(before if isinstance(before, list) else []), word]
    return _flags({"finetune": found}, "finetune") or {}
