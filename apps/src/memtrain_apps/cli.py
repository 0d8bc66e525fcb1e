"""``finetune``, ``pretrain``, ``ablate`` and ``plan``. torch is imported after the flags are parsed and checked."""

import sys
from collections.abc import Sequence

from memtrain_common.commands.cli import run_command
from memtrain_common.commands.official import in_our_words

from .compose.axes import in_plain_words

FINETUNE = """Fine-tune a model with one choice on each of three axes: --train, --save, --optim.

Without flags: a small ViT on scikit-learn's digits. The first word may name a preset."""
PRETRAIN = """Pre-train a language model with one choice on each of three axes: --train, --save, --optim.

Without flags: a small GPT on the source of Python's standard library. The first word may name a preset."""


def _finetune(argv: Sequence[str]) -> None:
    from .run.config import FINETUNE_PRESETS, FinetuneConfig, configure
    from .run.official import FORK

    argv = in_plain_words(in_our_words(argv, FORK, prog="finetune"))
    config = configure(argv, FinetuneConfig, prog="finetune", description=FINETUNE, presets=FINETUNE_PRESETS)
    from .run.finetune import run_finetune

    run_finetune(config, argv)


def _pretrain(argv: Sequence[str]) -> None:
    from .run.config import PRETRAIN_PRESETS, PretrainConfig, configure
    from .run.official import GALORE

    argv = in_plain_words(in_our_words(argv, GALORE, prog="pretrain"))
    config = configure(argv, PretrainConfig, prog="pretrain", description=PRETRAIN, presets=PRETRAIN_PRESETS)
    from .run.pretrain import run_pretrain

    run_pretrain(config, argv)


def _ablate(argv: Sequence[str]) -> None:
    from .ablate.config import configure

    request = configure(argv)
    from .ablate.ablate import run_ablation

    run_ablation(request, argv)


def _plan(argv: Sequence[str]) -> None:
    from .plan.config import configure

    config = configure(in_plain_words(argv))
    if config.list_models:
        from .plan.shapes import known_names

        print("\n".join(known_names()))
        return
    from .plan.command import run_plan

    run_plan(config)


def ablate() -> None:
    """The console script."""
    sys.exit(run_command(_ablate, prog="ablate"))


def finetune() -> None:
    """The console script."""
    sys.exit(run_command(_finetune, prog="finetune"))


def pretrain() -> None:
    """The console script."""
    sys.exit(run_command(_pretrain, prog="pretrain"))


def plan() -> None:
    """The console script."""
    sys.exit(run_command(_plan, prog="plan"))
