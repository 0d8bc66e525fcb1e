"""The fixture of runs that were made before the rooms: its folder, and its commands by name."""

import importlib.util

from support import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "runs_before_rooms"
_spec = importlib.util.spec_from_file_location("make_runs_before_rooms", FOLDER / "make.py")
assert _spec is not None
assert _spec.loader is not None
_make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_make)

COMMANDS: dict[str, list[str]] = {name: words.split() for name, words in _make.COMMANDS.items()}
"""Name of a run -> the words of the command that made it, without --out."""
QUICK: list[str] = _make.QUICK.split()


def resumed_by(name: str) -> list[str]:
    """The command that goes on with a run, up to the run's folder."""
    program, *rest = COMMANDS[name]
    command = rest[:1] if rest and not rest[0].startswith("-") else []
    return [program, *command, "--resume"]
