"""What ``--help`` prints: a dataclass's flags in groups, from its docstrings and defaults. No torch.

Groups are the comments ``# -- name`` between the fields, as they stand in the source; a class without any has one
group of the class's own name.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

METAVARS = {int: "N", float: "X", str: "TEXT"}
WIDEST = 120  # longer lines are hard to read, however wide the terminal is
COLUMN = 30  # where the texts begin, at most


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag, in words."""

    names: tuple[str, ...]
    """``--n-layer``, and what else it is called."""
    values: str
    """What is written after it: ``N``, ``X``, ``TEXT``, ``a|b``; empty for a switch."""
    default: str
    """Empty where there is none to speak of."""
    text: str
    """The field's docstring as one paragraph."""
    group: str


def flags_of(config_type: type, default: Any = None) -> list[Flag]:
    """The flags of a configuration's dataclass by group, those of its ``GROUPS`` first; in each the class's own first.

    Args:
        config_type: with a docstring below each field.
        default: whose values are shown; the dataclass's own if None.
    """
    default = config_type() if default is None else default
    hints = get_type_hints(config_type, include_extras=True)
    flags: dict[str, list[tuple[int, Flag]]] = {}
    for field in dataclasses.fields(config_type):
        mro = [c for c in config_type.__mro__ if field.name in _fields_of(c)]
        said = [_fields_of(c)[field.name] for c in mro]  # a class that changes a default alone inherits the words,
        text = next((t for t, _ in said if t), "")
        group = next((g for _, g in reversed(said) if g), "flags")  # and a field stays in its first class's group
        hint, aliases = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
            aliases = next((tuple(m.aliases) for m in marks if getattr(m, "aliases", None)), ())
        name = "--" + field.name.replace("_", "-")
        names = (f"--[no-]{name[2:]}",) if hint is bool else (name, *aliases)
        flag = Flag(names, _values(hint), _value_text(getattr(default, field.name)), text, group)
        flags.setdefault(group, []).append((config_type.__mro__.index(mro[0]), flag))
    first = [g for g in getattr(config_type, "GROUPS", ()) if g in flags]
    return [flag for g in dict.fromkeys([*first, *flags]) for _, flag in sorted(flags[g], key=lambda item: item[0])]


def help_text(
    config_type: type,
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Any],
    default: Any = None,
    width: int = 0,
) -> str:
    """The whole help: usage, description, presets, flags by group, examples (the class's ``EXAMPLES``).

    Args:
        prog: the command.
        description: what it does, as paragraphs.
        presets: names for the command's first word.
        default: the configuration whose values are shown.
        width: of a line; 0 is the terminal's, at most 120.
    """
    width = width or min(WIDEST, shutil.get_terminal_size((100, 24)).columns)
    usage = f"usage: {prog} {'[PRESET] ' if presets else ''}[--flag value ...]"
    parts = [] if "usage: " in description else [usage]
    parts += [_wrapped(description, width)]
    if presets:
        parts.append(
            textwrap.fill(f"presets: {', '.join(presets)}", width, subsequent_indent="  ", break_on_hyphens=False)
        )
    flags = flags_of(config_type, default)
    column = min(COLUMN, 4 + max(len(_left(f)) for f in flags))
    for group in dict.fromkeys(f.group for f in flags):
        lines = [_line(f, column, width) for f in flags if f.group == group]
        parts.append("\n".join([group if ":" in group else f"{group}:", *lines]))
    examples: Sequence[str] = getattr(config_type, "EXAMPLES", ())
    if examples:
        parts.append("\n".join(["examples:", *(f"  {e}" for e in examples)]))
    return "\n\n".join(parts) + "\n"


def _left(flag: Flag) -> str:
    values = flag.values if len(flag.values) <= 24 else "CHOICE"
    return f"{', '.join(flag.names)} {values}".rstrip()


def _line(flag: Flag, column: int, width: int) -> str:
    left = "  " + _left(flag)
    said = all(value in flag.text for value in flag.values.split("|"))
    text = flag.text if len(flag.values) <= 24 or said else f"{flag.text} [{flag.values}]"
    text += f" (default {flag.default})" if flag.default else ""
    first = left.ljust(column) if len(left) < column else left + "\n" + " " * column
    body = textwrap.wrap(text, width - column, break_on_hyphens=False, break_long_words=False)
    return first + ("\n" + " " * column).join(body)


def _wrapped(description: str, width: int) -> str:
    """Each paragraph to the width; a paragraph of several short lines (a list, a usage) keeps them."""
    paragraphs = []
    for paragraph in description.strip().split("\n\n"):
        lines = paragraph.splitlines()
        prose = len(lines) == 1 or all(len(line) > 70 for line in lines[:-1])
        paragraphs.append(
            textwrap.fill(" ".join(lines), width) if prose else "\n".join(textwrap.fill(x, width) for x in lines)
        )
    return "\n\n".join(paragraphs)


def _values(hint: Any) -> str:
    """What a person writes after a flag of this type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is bool:
        return ""
    if origin is Literal:
        return "|".join(str(a) for a in args if a != "")
    if origin is tuple:
        return f"{_values(args[0])} ..."
    if origin in (Union, UnionType):
        return "|".join("none" if a is type(None) else _values(a) for a in args)
    return METAVARS.get(hint, "TEXT")


def _value_text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if isinstance(value, str) and value.isspace() else str(value)


@cache
def _fields_of(owner: type) -> dict[str, tuple[str, str]]:
    """name -> (docstring as one paragraph, group) of the fields that a class itself declares."""
    if not dataclasses.is_dataclass(owner):
        return {}
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except (OSError, TypeError):  # made at run time: it has no text
        return {name: ("", "") for name in inspect.get_annotations(owner)}
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
        headings = [m[1] for line in lines[: node.lineno] if (m := re.match(r"\s*# -- (.*?)\s*-*$", line))]
        found[node.target.id] = (text, headings[-1] if headings else "")
    return found
