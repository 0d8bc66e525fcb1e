"""``backrazor-train``, ``backrazor-glue``, ``backrazor-memory``: torch is imported after the flags are parsed."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from memtrain_common.commands.cli import run_command
from memtrain_common.errors import UserError


def train() -> None:
    """The console script ``backrazor-train``: tune an image classifier."""
    sys.exit(run_command(_main("train_flags"), prog="backrazor-train"))


def glue() -> None:
    """The console script ``backrazor-glue``: tune an encoder on a GLUE task."""
    sys.exit(run_command(_main("glue_flags"), prog="backrazor-glue"))


def memory() -> None:
    """The console script ``backrazor-memory``: what every layer of a model saves, dense and by Back Razor."""
    sys.exit(run_command(_main("memory_flags"), prog="backrazor-memory"))


def _main(module: str) -> Callable[[Sequence[str]], None]:
    """``main`` of a module of ``tasks``; what the library refuses becomes one sentence."""

    def main(argv: Sequence[str]) -> None:
        try:
            import_module(f".tasks.{module}", __package__).main(argv)
        except Exception as error:
            if type(error).__name__ != "RazorError":  # its module is imported by the library, not for the help
                raise
            raise UserError(str(error).rstrip(".").replace("\n", " ")) from error

    return main
