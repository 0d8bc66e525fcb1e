"""The commands of ``lora-xs``: flags parsed and checked, then what does the work, which imports torch."""

from collections.abc import Callable, Sequence

from memtrain_common.commands.cli import parse
from memtrain_common.commands.configure import at_least, configure, required
from memtrain_common.commands.official import in_our_words
from memtrain_common.files import check_targets

from . import adapter_flags, demo_flags, eval_flags, glue_flags, instruct_flags, official
from .adapter_flags import ADAPTER, OUT

GLUE = """

Metrics: Matthews correlation (cola), Pearson and Spearman (stsb), accuracy and F1 (mrpc, qqp), accuracy (the rest; mnli
matched and mismatched), on the rows of the development set.

Presets: scratch (the defaults; official for cola, sst2, qnli), from-mnli (official for mrpc, rte, stsb)."""
INSTRUCT = """

Presets: math (the official settings for MetaMathQA: the defaults, with float16), commonsense (for commonsense_170k)."""
IMPORT = """

The first word may be the folder: lora-xs import FOLDER --model roberta-large --out adapter"""
DEMO = """

A small ViT learns scikit-learn's handwritten digits 0 to 4, then 5 to 9 by each method, from the same weights."""


def glue(argv: Sequence[str], description: str) -> None:
    argv = in_our_words(argv, official.GLUE, prog=glue_flags.PROG)
    config = configure(
        glue_flags.GlueConfig, argv, prog=glue_flags.PROG, description=description + GLUE, presets=glue_flags.PRESETS,
        check=lambda c, _: glue_flags.check(c),
    )  # fmt: skip
    if config.grid:
        from .glue_grid import run_grid

        run_grid(config, argv)
    else:
        from .glue import run_glue

        run_glue(config, argv)


def instruct(argv: Sequence[str], description: str) -> None:
    config = configure(
        instruct_flags.InstructConfig, argv, prog=instruct_flags.PROG, description=description + INSTRUCT,
        presets=instruct_flags.PRESETS, check=lambda c, _: instruct_flags.check(c),
    )  # fmt: skip
    from .instruct import run_instruct

    run_instruct(config, argv)


def evaluate(argv: Sequence[str], description: str) -> None:
    config = eval_flags.check(parse(eval_flags.EvalConfig, argv, prog=eval_flags.PROG, description=description))
    from .evaluate import run_eval

    run_eval(config)


def merge(argv: Sequence[str], description: str) -> None:
    config = parse(adapter_flags.MergeConfig, argv, prog="lora-xs merge", description=description)
    required(config, adapter=ADAPTER, out=OUT)
    from .adapters import run_merge

    run_merge(config)


def export_peft(argv: Sequence[str], description: str) -> None:
    config = parse(adapter_flags.ExportConfig, argv, prog="lora-xs export-peft", description=description)
    required(config, adapter=ADAPTER, out=OUT)
    from .adapters import run_export

    run_export(config)


def import_(argv: Sequence[str], description: str) -> None:
    words = ["--folder", *argv] if argv and not argv[0].startswith("-") else argv
    config = parse(adapter_flags.ImportConfig, words, prog="lora-xs import", description=description + IMPORT)
    required(config, folder="give a folder as the official code or PEFT writes it")
    required(config, model="give the base model's folder or hub name", out=OUT)
    from .adapters import run_import

    run_import(config)


def info(argv: Sequence[str], description: str) -> None:
    config = parse(adapter_flags.InfoConfig, argv, prog="lora-xs info", description=description)
    adapter_flags.check_info(config)
    from .adapters import run_info

    run_info(config)


def demo(argv: Sequence[str], description: str) -> None:
    config = parse(demo_flags.DemoConfig, argv, prog="lora-xs demo", description=description + DEMO)
    required(config, ranks="give at least one rank")
    at_least(config, lora_rank=1, seeds=1, pretrain_steps=1, steps=1)
    check_targets({"--out": config.out}, makes_folders=True)
    from .demo import run_demo

    run_demo(config, argv)


# command: (what runs it, what it does)
COMMANDS: dict[str, tuple[Callable[[Sequence[str], str], None], str]] = {
    "glue": (glue, "train on a GLUE task, from scratch or from another adapter; --grid for the official grids"),
    "instruct": (instruct, "tune a language model on instructions, the prompt masked from the loss"),
    "eval": (evaluate, "generate answers to gsm8k, math, a commonsense set or a file, and score them"),
    "merge": (merge, "write a model folder with the adapter in its weights"),
    "export-peft": (export_peft, "write the adapter as a plain LoRA that PEFT and transformers load"),
    "import": (import_, "make an adapter of a checkpoint of the official code, or of a LoRA of PEFT's"),
    "info": (info, "say what is in an adapter, or what an adapter of some rank would be"),
    "demo": (demo, "LoRA-XS, LoRA and full fine-tuning side by side on embedded data, in two minutes"),
}
