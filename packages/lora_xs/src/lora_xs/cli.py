"""``lora-xs COMMAND``: each command's flags are a dataclass in ``tasks``; torch is imported after they are parsed."""

import difflib
import sys
from collections.abc import Sequence

from memtrain_common.commands.cli import run_command
from memtrain_common.errors import UserError

from .errors import LoRAXSError
from .tasks.commands import COMMANDS

PROG = "lora-xs"


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROG} COMMAND [flags]", "", "r×r adapters between frozen SVD bases (LoRA-XS).", "", "commands:"]
    lines += [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROG} COMMAND --help lists a command's flags."])


def dispatch(argv: Sequence[str]) -> None:
    """Hand the words after the command's name to the command.

    Raises:
        UserError: on an unknown command, and for whatever the library refuses.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown command {name!r}{hint}: the commands are {', '.join(COMMANDS)}")
    command, description = COMMANDS[name]
    try:
        command(rest, description[0].upper() + description[1:] + ".")
    except LoRAXSError as error:
        raise UserError(str(error).rstrip(".").replace("\n", " ")) from error


def main() -> None:
    """The console script."""
    words = sys.argv[1:]
    prog = f"{PROG} {words[0]}" if words and words[0] in COMMANDS else PROG
    sys.exit(run_command(dispatch, prog=prog))
