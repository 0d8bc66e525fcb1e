"""Another project's command line in this one's words: flags under their names there, those without a meaning named.

No torch here. Fields under an old name of our own are ``ALIASES`` of the configuration; here are whole command lines.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from ..errors import UserError

Words = tuple[str, ...]


@dataclass(frozen=True)
class Official:
    """How the flags of another project's command are said here; names have underscores and no dashes."""

    switches: Mapping[str, Words]
    """A flag without a value, or with True: what it is here. With False it is left out."""
    values: Mapping[str, str | Callable[[str], Words]]
    """A flag with one value: its name here, or a function of the value."""
    unused: Set[str]
    """Flags without a meaning here."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """A flag that cannot be had in this command -> what to do instead."""
    presets: Mapping[str, str] = field(default_factory=dict)
    """A flag of the other command alone -> the preset that has its defaults."""
    late: Set[str] = frozenset()
    """Switches that win over what other flags say."""
    shared: Set[str] = frozenset()
    """Flags that are old spellings of ours as well: by themselves they make no line the other project's."""
    finish: Callable[[dict[str, list[str]]], None] = lambda said: None
    """Changes the flags in our words where several decide together."""


def translate(argv: Sequence[str], official: Official, *, prog: str) -> tuple[list[str], list[str]]:
    """-> (the command line here, lines to say: the command in our words, and which flags have no meaning here).

    A line of ours comes back as it is, and nothing is said.
    """
    leading = list(argv[:1]) if argv and not argv[0].startswith("-") else []
    said: dict[str, list[str]] = {}
    unused: list[str] = []
    late: list[Words] = []
    preset, foreign = "", False
    for name, values in _flags(argv[len(leading) :]):
        key = name.removeprefix("--").replace("-", "_")
        preset = preset or official.presets.get(key, "")
        if key in official.refused and values[:1] not in (["False"], ["false"]):
            raise UserError(f"{name} cannot be had in this command: {official.refused[key]}")
        known = key in official.switches or key in official.values or key in official.unused
        foreign |= known and key not in official.shared
        if key in official.switches:
            if values not in ([], ["True"], ["true"], ["False"], ["false"]):
                raise UserError(f"{name} takes True or False, got {' '.join(values)}")
            if values[:1] not in (["False"], ["false"]):
                (late.append if key in official.late else lambda words: _set(said, words))(official.switches[key])
        elif key in official.values:
            if len(values) != 1:
                raise UserError(f"{name} takes one value, got {' '.join(values) or 'none'}")
            rule = official.values[key]
            _set(said, (rule, values[0]) if isinstance(rule, str) else rule(values[0]))
        elif key in official.unused:
            unused.append(name)
        else:
            said[name] = values
    if not foreign:
        return list(argv), []
    for words in late:
        _set(said, words)
    official.finish(said)
    leading = leading or ([preset] if preset and "--resume" not in said else [])  # a resumed run has its own flags
    line = [*leading, *(word for name, values in said.items() for word in (name, *values))]
    notes = [f"in this command's words: {shlex.join([*prog.split(), *line])}"]
    if unused:
        notes.append(f"without a meaning here: {' '.join(unused)}")
    return line, notes


def in_our_words(argv: Sequence[str], official: Official, *, prog: str) -> list[str]:
    """The command line here; what :func:`translate` has to say is printed, by the first process alone."""
    line, notes = translate(argv, official, prog=prog)
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(note)
    return line


def _set(said: dict[str, list[str]], words: Words) -> None:
    for name, values in _flags(words):
        said[name] = values


def _flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags with the values that follow; ``--flag=value`` is one of them."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            found.append((word, []))
    return found


def only(name: str, *values: str) -> Callable[[str], Words]:
    """A flag of which only some values can be had, and they are what happens anyway."""

    def rule(value: str) -> Words:
        if value not in values:
            raise UserError(f"--{name} {value} cannot be had here: it can be {' or '.join(values)}")
        return ()

    return rule


def choice(name: str, words: Mapping[str, Words]) -> Callable[[str], Words]:
    """A flag whose values are words."""

    def rule(value: str) -> Words:
        if value not in words:
            raise UserError(f"--{name} {value} cannot be had here: choose one of {', '.join(words)}")
        return words[value]

    return rule


DATASET = choice("dataset", {
    "cifar10": ("--data", "cifar10"), "cifar100": ("--data", "cifar100"), "aircraft": ("--data", "aircraft"),
    "stanford_car": ("--data", "cars"), "car": ("--data", "cars"), "cub200": ("--data", "cub200"),
    "food101": ("--data", "food101"), "Pet37": ("--data", "pets"), "pets": ("--data", "pets"),
    "flowers": ("--data", "flowers102"), "flowers102": ("--data", "flowers102"),
})  # fmt: skip
"""--dataset of Back Razor's ViT and CNN code and of its forks."""
MODEL_TYPE = choice("model_type", {
    "ViT-Ti_16": ("--model", "vit-ti-16"), "ViT-S_16": ("--model", "vit-s-16"), "ViT-B_16": ("--model", "vit-b-16"),
    "ViT-L_16": ("--model", "vit-l-16"),
})  # fmt: skip
"""--model_type of the same."""
REPORT_TO = choice("report_to", {
    "none": ("--tracker", "none"), "all": ("--tracker", "tensorboard"), "tensorboard": ("--tracker", "tensorboard"),
    "wandb": ("--tracker", "wandb"),
})  # fmt: skip
"""--report_to of transformers' Trainer."""
TRAINERS_UNUSED = frozenset({
    "do_train", "do_eval", "do_predict", "overwrite_output_dir", "overwrite_cache", "cache_dir", "save_steps",
    "save_total_limit", "save_strategy", "logging_dir", "logging_strategy", "run_name", "metric_for_best_model",
    "greater_is_better", "dataloader_num_workers", "disable_tqdm", "local_rank", "use_fast_tokenizer", "push_to_hub",
})  # fmt: skip
"""Flags of transformers' run_glue.py that have no meaning in any command here."""


def kept(name: str) -> Callable[[str], Words]:
    """A fraction that is pruned, as --keep, the one that is left."""

    def rule(value: str) -> Words:
        try:
            pruned = float(value)
        except ValueError:
            pruned = -1.0
        if not 0 <= pruned < 1:
            raise UserError(f"--{name} must be a fraction from 0 to below 1, got {value}")
        return ("--keep", f"{round(1 - pruned, 6):g}")

    return rule
