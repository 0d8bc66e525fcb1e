"""What commands' flags have in common: a resumed run's own configuration, and checks that name the flag. No torch."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from .cli import changed_fields, flag_value, parse

Config = TypeVar("Config")

# What a resumed run may do otherwise than it began.
MAY_CHANGE = {"out", "resume", "tracker", "device", "data_dir", "select", "data_changed"}


def configure(
    config_type: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Config],
    check: Callable[[Config, Config], Config],
    may_change: Set[str] = MAY_CHANGE,
) -> Config:
    """Flags and presets, or with ``--resume`` the configuration that the run began with, checked.

    Args:
        config_type: with fields ``resume`` and ``out``.
        argv, prog, description, presets: as :func:`memtrain_common.commands.cli.parse` has them.
        check: (the configuration, the preset or the resumed run that flags were laid over) -> the configuration, or a
            UserError.
        may_change: fields that a resumed run may have otherwise than it began.

    Raises:
        UserError: if a flag contradicts the run that is resumed.
    """
    argv = with_new_names(argv, config_type)
    resume = flag_value(argv, "--resume")
    if resume is None:
        plain = presets.get(argv[0]) if argv else None
        config = parse(config_type, argv, prog=prog, description=description, presets=presets)
        return check(config, plain or config_type())
    before = saved_config(config_type, Path(resume), prog)
    config = parse(config_type, argv, prog=prog, description=description, default=before)
    if config.out not in (before.out, resume):  # type: ignore[attr-defined]
        raise UserError(f"--out {config.out} differs from --resume {resume}: a resumed run stays in its folder")  # type: ignore[attr-defined]
    for name, (old, new) in changed_fields(placed(before), placed(config)).items():
        if _has_moved(config, name, old, new):
            _check_begun(Path(resume), config, name, old)
        elif name not in may_change:
            raise UserError(f"{resume} was begun with {flag(name)} {old}, not {new}: leave the flag out, or begin anew")
    return check(replace(config, out=resume), before)  # type: ignore[type-var]


def saved_config(config_type: type[Config], folder: Path, prog: str) -> Config:
    """The configuration in a run's folder, under the names of today. The folder is only read: no lock is taken.

    Raises:
        UserError: if it is no run of ``prog``.
    """
    from ..runs.run_folder import RunFolder

    saved = RunFolder.open(folder, writes=False).read_config()
    made_by = str(saved.get("command", ""))
    if not made_by.startswith(prog + " ") and made_by != prog:
        raise UserError(f"{folder} was made by another command ({made_by}), not by {prog}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["config"].items()}
    try:
        config = config_type(**config_type.modernise(values))  # type: ignore[attr-defined]
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        raise UserError(f"{folder} was not made by this version of {prog}: {error}") from None
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, usual = getattr(config, field.name), type(field.default)
        kinds: Any = {bool: bool, int: int, float: (int, float), str: str, tuple: tuple}.get(usual)
        if kinds is not None and (not isinstance(value, kinds) or (usual is not bool and isinstance(value, bool))):
            raise UserError(
                f"{folder / 'config.json'} has {field.name} {value!r}: it must be {_KINDS[usual]}, as the run wrote it"
            )
    return config


def placed(config: Config) -> Config:
    """The configuration with the files and folders that it names by where they are, whatever the working folder is."""
    names = [n for n in getattr(config, "PLACES", ()) if is_place(config, n, getattr(config, n, ""))]
    return replace(config, **{n: os.path.abspath(getattr(config, n)) for n in names})  # type: ignore[type-var]


def is_place(config: Any, name: str, value: Any) -> bool:
    """Whether a field's value names a file or a folder that is there."""
    if not isinstance(value, str) or not value or value in config.NAMES:
        return False
    return os.path.isfile(value) and "." in value if name == "data" else os.path.exists(value)


def _has_moved(config: Any, name: str, old: Any, new: Any) -> bool:
    """Whether a flag can say where to find now what ``old`` named."""
    if name not in config.MOVABLE or not is_place(config, name, new):
        return False
    return bool(old) and old not in config.NAMES and ":" not in old and (name != "data" or "." in old)


def _check_begun(folder: Path, config: Any, name: str, old: str) -> None:
    """Raises:
    UserError: if a training of the run has no checkpoint, and would begin from what is there now.
    """
    begun = {p.parent for pattern in ("", "*/") for p in folder.glob(f"{pattern}checkpoints/step-*")}
    if len(begun) < config.trainings():
        raise UserError(
            f"{folder} has a training without a checkpoint, which begins from {flag(name)} {old}: put that back there, "
            "or begin a new run"
        )


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}


def with_new_names(argv: Sequence[str], config_type: Any) -> list[str]:
    """The words of a command line with old spellings of flags replaced by today's."""
    new = {flag(old): flag(name) for old, name in config_type.ALIASES.items()}

    def word(text: str) -> str:
        name, equals, value = text.partition("=")
        return new.get(name.replace("_", "-") if name.startswith("--") else name, name) + equals + value

    return [word(w) for w in argv]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def at_least(config: Any, **least: float) -> None:
    """Refuse fields below their least value."""
    for name, value in least.items():
        if not getattr(config, name) >= value:
            raise UserError(f"{flag(name)} must be at least {value}, got {getattr(config, name)}")
        _finite(config, name)


def positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{flag(name)} must be positive, got {getattr(config, name)}")
        _finite(config, name)


def _finite(config: Any, name: str) -> None:
    if getattr(config, name) == math.inf:
        raise UserError(f"{flag(name)} must be finite, got inf")


def below_one(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) < 1:
            raise UserError(f"{flag(name)} must be below 1, got {getattr(config, name)}")


def required(config: Any, **why: str) -> None:
    """Refuse empty fields, saying what would be right."""
    for name, text in why.items():
        if not getattr(config, name):
            raise UserError(f"{flag(name)} is missing: {text}")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}")


def fraction(config: Any, *names: str) -> None:
    """Refuse fields outside of (0, 1]."""
    for name in names:
        if not 0 < getattr(config, name) <= 1:
            raise UserError(f"{flag(name)} must be above 0 and at most 1, got {getattr(config, name)}")


def refuse_unused(config: Any, plain: Any, names: Sequence[str], why: str) -> None:
    """Refuse flags that would do nothing beside another one.

    Args:
        config: flags over a preset.
        plain: the preset.
        names: fields that must be as in the preset.
        why: what makes them useless.
    """
    for name in names:
        if getattr(config, name) != getattr(plain, name):
            raise UserError(f"{flag(name)} {getattr(config, name)} would do nothing: {why}, so leave it out")
