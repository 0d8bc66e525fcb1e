"""``backrazor-train``, ``backrazor-glue``, ``backrazor-memory``: torch is imported after the flags are parsed."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from memtrain_common.commands.cli import parse, run_command
from memtrain_common.commands.configure import configure
from memtrain_common.commands.official import in_our_words
from memtrain_common.errors import UserError

from .tasks import glue_flags, memory_flags, official, train_flags


def _train(argv: Sequence[str]) -> None:
    argv = in_our_words(argv, official.TRAIN, prog=train_flags.PROG)
    argv = train_flags.with_preset(argv)
    config = configure(
        train_flags.TrainConfig, argv, prog=train_flags.PROG, description=train_flags.DESCRIPTION,
        presets=train_flags.PRESETS, check=train_flags.check, may_change=train_flags.FREE,
    )  # fmt: skip
    if not config.resume:
        train_flags.needs_weights(argv, config)
    from .tasks.train import run_training

    run_training(config, argv)


def _glue(argv: Sequence[str]) -> None:
    argv = in_our_words(argv, official.GLUE, prog=glue_flags.PROG)
    config = configure(
        glue_flags.GlueConfig, argv, prog=glue_flags.PROG, description=glue_flags.DESCRIPTION,
        presets=glue_flags.PRESETS, check=glue_flags.check,
    )  # fmt: skip
    from .tasks.glue import run_glue

    run_glue(config, argv)


def _memory(argv: Sequence[str]) -> None:
    default = memory_flags.MemoryConfig()
    words = list(argv)
    if words and not words[0].startswith("-"):
        default = replace(default, model=words.pop(0))
    config = memory_flags.check(
        parse(
            memory_flags.MemoryConfig, words, prog=memory_flags.PROG, description=memory_flags.DESCRIPTION,
            default=default,
        )
    )  # fmt: skip
    from .tasks.memory import run_memory

    run_memory(config)


def _run(main: Callable[[Sequence[str]], None], prog: str) -> None:
    """The command; what the library refuses becomes one sentence."""

    def refusing(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except Exception as error:
            if type(error).__name__ != "RazorError":  # its module is imported by the library, not for the help
                raise
            raise UserError(str(error).rstrip(".").replace("\n", " ")) from error

    sys.exit(run_command(refusing, prog=prog))


def train() -> None:
    """The console script ``backrazor-train``: tune an image classifier."""
    _run(_train, train_flags.PROG)


def glue() -> None:
    """The console script ``backrazor-glue``: tune an encoder on a GLUE task."""
    _run(_glue, glue_flags.PROG)


def memory() -> None:
    """The console script ``backrazor-memory``: what every layer of a model saves, dense and by Back Razor."""
    _run(_memory, memory_flags.PROG)
