"""Commands from frozen dataclasses: flags by tyro, presets by name, and errors as one sentence.

A field's docstring is its flag's help. Nothing here imports torch: ``--help`` must stay fast.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from ..console import printable
from ..errors import LostRankError, Stopped, UserError, lost_rank, ran_out_of_memory
from ..interrupts import leaving, nothing_lost
from ..optional import package_of
from ..runs.unstarted import remove_unstarted
from .flag_help import help_text
from .quiet import quiet_libraries

Config = TypeVar("Config")


def parse(
    config_type: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Config] | None = None,
    default: Config | None = None,
) -> Config:
    """Turn ``[PRESET] --flag value …`` into a ``config_type``.

    Args:
        config_type: a dataclass; ``n_layer: int = 4`` becomes ``--n-layer``.
        argv: the words after the program's name. A first word without a dash names a preset.
        prog: the program's name, for messages.
        description: the first lines of ``--help``.
        presets: configurations by name; flags override their values.
        default: what flags override when no preset is named; the dataclass's own defaults if None.

    Raises:
        UserError: on an unknown flag or preset (with the nearest name), or a value of the wrong type.
        SystemExit: with code 0, after printing the help.
    """
    presets = presets or {}
    words = list(argv)
    if words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in presets:
            raise UserError(f"unknown preset {name!r}{_nearest(name, presets)}: the presets are {_list(presets)}")
        default = presets[name]
    if {"-h", "--help"} & set(words):
        print(help_text(config_type, prog=prog, description=description, presets=presets, default=default), end="")
        raise SystemExit(0)
    known = [f.name.replace("_", "-") for f in dataclasses.fields(config_type)]  # type: ignore[arg-type]
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            config, unknown = tyro.cli(
                config_type,
                prog=prog,
                args=words,
                default=config_type() if default is None else default,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_sentence(complaints.getvalue())) from None
    seed = getattr(config, "seed", 0)
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2^63 − 1, got {seed}")
    if unknown:
        flag = unknown[0].split("=")[0]
        if flag.startswith("-"):
            near = _nearest(flag.lstrip("-").replace("_", "-"), known, dashes="--")
            raise UserError(f"unknown flag {flag}{near}; {prog} --help lists the flags")
        raise UserError(f"unexpected word {flag!r}; flags begin with --, and a preset is the first word")
    return config


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The value of one flag, before everything is parsed: ``--resume RUN`` decides the other flags' defaults.

    Raises:
        UserError: if it is given twice, or without a value.
    """
    values = [word[len(flag) + 1 :] for word in argv if word.startswith(flag + "=")]
    values += [after for word, after in zip(argv, [*argv[1:], "--"], strict=False) if word == flag]
    if len(values) > 1:
        raise UserError(f"{flag} was given {len(values)} times: give it once")
    if values and (not values[0] or values[0].startswith("--")):
        raise UserError(f"{flag} needs a value")
    return values[0] if values else None


def run_command(main: Callable[[Sequence[str]], None], *, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run ``main(argv)`` and turn what the user can mend into one line on stderr and an exit code."""
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    with leaving(prog):
        ended = _end_of(main, sys.argv[1:] if argv is None else argv)
    if isinstance(ended, int):
        return ended
    code, line = ended
    print(f"{prog}: {printable(line)}", file=sys.stderr)
    return code


def _end_of(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int | tuple[int, str]:
    """Call it; -> the exit code, with a line to say if there is one."""
    try:
        main(argv)
        return 0
    except UserError as error:
        if error.exit_code == UserError.exit_code:  # refused; what trained and failed has a story to tell
            remove_unstarted()
        code, line = error.exit_code, f"error: {error}"
    except ModuleNotFoundError as error:
        package = package_of(error)
        if package is None:
            raise
        code = UserError.exit_code
        line = f"error: this needs the package {package}, which is not installed: pip install {package}"
    except Stopped as stop:
        if os.environ.get("RANK", "0") != "0":  # every process stops; the first one says so
            return stop.exit_code
        code, line = stop.exit_code, str(stop)
    except KeyboardInterrupt as interrupt:
        signum = interrupt.args[0] if interrupt.args else signal.SIGINT
        code, line = 128 + signum, nothing_lost(signal.Signals(signum).name)
    except (ConnectionAbortedError, MemoryError, RuntimeError) as error:  # before or after a training, which says more
        if ran_out_of_memory(error):
            return 1, _memory_ran_out(error)
        why = str(error) if isinstance(error, ConnectionAbortedError) else lost_rank(error)
        if not why:
            raise
        code, line = LostRankError.exit_code, f"error: stopped, since {why}"
    except BrokenPipeError:  # the reader of a pipe (`--help | head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if ran_out_of_memory(error):
            return 1, _memory_ran_out(error)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if error.filename is None:
                raise
            places = " and ".join(
                os.fsdecode(f) for f in (error.filename, error.filename2) if isinstance(f, str | bytes)
            )
            why = "is it gone, or was it renamed" if error.errno == errno.ENOENT else "look at what lies there"
            return UserError.exit_code, f"error: cannot use {places} ({error.strerror}): {why}"
        where = error.filename or "the run folder"
        code = UserError.exit_code
        line = f"error: could not write {where} ({error.strerror}): free some space, or choose another place with --out"
    return code, line


def _memory_ran_out(error: BaseException) -> str:
    said = str(error).strip().split("\n")[0]
    why = f" ({said})" if said else ""
    return f"error: memory ran out{why}: take a smaller batch or model, or keep less for the backward pass"


def changed_fields(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Fields of two configurations of one type that differ, by name: ``{name: (old, new)}``."""
    names = [f.name for f in dataclasses.fields(old)]
    return {n: (getattr(old, n), getattr(new, n)) for n in names if getattr(old, n) != getattr(new, n)}


def _nearest(word: str, names: Mapping[str, Any] | Sequence[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names) if names else "none"


def _sentence(box: str) -> str:
    """tyro's message as one line: it stands between the first rule (a box's upper edge, or dashes) and the second."""
    lines: list[str] = []
    inside = False
    for line in box.splitlines():
        text = line.strip("│ ")
        rule = line.startswith(("╭", "╰")) or (len(text) > 9 and set(text) <= set("─-"))
        if rule and inside and lines:
            break
        inside = inside or rule
        if inside and not rule and text:
            lines.append(text)
    return " ".join(lines) or " ".join(box.split())
