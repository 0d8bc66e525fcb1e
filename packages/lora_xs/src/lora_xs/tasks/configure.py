"""What the commands' flags have in common: a resumed run's own configuration, and checks that name the flag."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from memtrain_common.cli import changed_fields, flag_value, parse
from memtrain_common.errors import UserError

from .shared_flags import TrainingFlags

Config = TypeVar("Config")

# What a resumed run may do otherwise than it began.
MAY_CHANGE = {"out", "resume", "tracker", "device", "data_dir"}


def configure(
    config_type: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Config],
    check: Callable[[Config], Config],
) -> Config:
    """Flags and presets, or with ``--resume`` the configuration that the run began with, checked.

    Raises:
        UserError: if a flag contradicts the run that is resumed.
    """
    resume = flag_value(argv, "--resume")
    if resume is None:
        return check(parse(config_type, argv, prog=prog, description=description, presets=presets))
    from memtrain_common.run_folder import RunFolder  # imports torch

    saved = RunFolder.open(Path(resume)).read_config()
    if not saved.get("command", "").startswith(prog + " "):
        raise UserError(f"{resume} was made by another command ({saved.get('command')}), not by {prog}")
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["config"].items()}
        before = config_type(**values)
    except TypeError as error:
        raise UserError(f"{resume} was not made by this version of {prog}: {error}") from None
    config = parse(config_type, argv, prog=prog, description=description, default=before)
    for name, (old, new) in changed_fields(before, config).items():
        if name not in MAY_CHANGE:
            raise UserError(f"{resume} was begun with {flag(name)} {old}, not {new}: leave the flag out, or begin anew")
    return check(replace(config, out=resume))  # type: ignore[type-var]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def at_least(config: Any, **least: float) -> None:
    """Refuse fields below their least value."""
    for name, value in least.items():
        if not getattr(config, name) >= value:
            raise UserError(f"{flag(name)} must be at least {value}, got {getattr(config, name)}")


def positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{flag(name)} must be positive, got {getattr(config, name)}")


def below_one(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) < 1:
            raise UserError(f"{flag(name)} must be below 1, got {getattr(config, name)}")


def check_training(config: TrainingFlags) -> None:
    """What holds of the flags that glue and instruct share."""
    at_least(config, batch_size=1, max_length=2, warmup_ratio=0, weight_decay=0, grad_clip=0, log_interval=1)
    positive(config, "learning_rate", "epochs")
    below_one(config, "warmup_ratio")


def required(config: Any, **why: str) -> None:
    """Refuse empty fields, saying what would be right."""
    for name, text in why.items():
        if not getattr(config, name):
            raise UserError(f"{flag(name)} is missing: {text}")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}")
