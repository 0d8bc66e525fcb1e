"""``lte-sample``: text from a run, a nanoGPT checkpoint or GPT-2, with the flags of nanoGPT's ``sample.py``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memtrain_common.commands.cli import parse, run_command
from memtrain_common.errors import UserError

from .nanogpt import translate

if TYPE_CHECKING:
    from memtrain_common.data.text.tokenizers import Tokenizer

PROG = "lte-sample"
DESCRIPTION = """Generate text. nanoGPT's --key=value is understood.

The first word is a run folder of lte-train's (its heads are merged), a nanoGPT ckpt.pt or its folder, a transformers
GPT-2 folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
END = "<|endoftext|>"


@dataclass(frozen=True)
class SampleConfig:
    """Every flag of lte-sample: nanoGPT's names and defaults."""

    init_from: str = ""
    """What to sample from, if it is not the first word."""
    start: str = "\n"
    """What every sample begins with; FILE:path reads it from a file. GPT-2's <|endoftext|> in it is that token."""
    num_samples: int = 10
    """Samples to draw."""
    max_new_tokens: int = 500
    """Tokens to generate in each."""
    temperature: float = 0.8
    """Below 1 less random, above 1 more."""
    top_k: int = 200
    """Draw among so many most likely tokens; 0 draws among all."""
    seed: int = 1337
    """Of the first sample; the next ones take the numbers that follow."""
    data_dir: str = ""
    """Folder of bins whose vocabulary nanoGPT's checkpoint uses (meta.json or meta.pkl); a run knows its own, and a
    checkpoint the name of its data set, which is looked for in data/."""
    tokenizer_dir: str = ""
    """Folder with GPT-2's encoder.json and vocab.bpe; empty takes the run's, and lets tiktoken download them where it
    has none."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast's dtype."""
    compile: bool = False
    """Run the model through torch.compile."""


def configure(argv: Sequence[str]) -> SampleConfig:
    """The flags, checked."""
    words, notes = translate(argv, SampleConfig)
    words = [w.replace("--resume=", "--init-from=", 1) for w in words]  # nanoGPT: init_from=resume, out_dir=RUN
    if words and not words[0].startswith("-"):
        words[0] = f"--init-from={words[0]}"
    elif not any(w.startswith("--init-from") for w in words):  # nanoGPT's default is to resume from out_dir
        words = [w.replace("--out=", "--init-from=", 1) for w in words]
    for note in notes:
        print(note)
    config = parse(SampleConfig, words, prog=PROG, description=DESCRIPTION)
    if not config.init_from:
        raise UserError("name what to sample from as the first word: a run folder, a checkpoint, or gpt2")
    for name, least in (("num_samples", 1), ("max_new_tokens", 0), ("top_k", 0), ("seed", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}")
    if not 1e-6 <= config.temperature < float("inf"):
        raise UserError(
            f"--temperature must be positive, finite and at least 1e-6, where the likeliest token is always taken; got "
            f"{config.temperature}"
        )
    if config.seed + config.num_samples > 2**63:
        raise UserError(f"--seed must be at most 2^63 − --num-samples, got {config.seed}")
    return config


def sample(argv: Sequence[str]) -> None:
    config = configure(argv)
    import torch
    from memtrain_common.console import Console
    from memtrain_common.data.text.tokenizers import printable
    from memtrain_common.training.cpu_workarounds import avoid_broken_amx
    from memtrain_common.training.distributed import launch
    from memtrain_common.training.loop import DTYPES

    from .starting import plain_model

    _, device = launch(config.device)
    if device.type == "cpu" and config.dtype == "bfloat16":
        avoid_broken_amx()
    text = _start(config.start)
    console = Console()
    model, data = plain_model(config.init_from, console.say)
    coder = _tokenizer(config, data, model.config.vocab_size)
    ids = _encode(coder, text)
    if not ids:
        raise UserError("--start is empty: give at least one character to go on from")
    model = model.to(device)
    if config.compile:
        model.forward = torch.compile(model.forward, dynamic=True)  # type: ignore[method-assign]
    dtype = DTYPES[config.dtype]
    prompt = torch.tensor([ids], device=device)  # (1, T)
    bar = console.progress(config.num_samples * config.max_new_tokens, label="tokens")
    for i in range(config.num_samples):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = model.generate(
                prompt,
                config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k or None,
                seed=config.seed + i,
                vocab_size=coder.vocab_size,
                each=bar.update,
            )
        console.say(printable(coder.decode(tokens[0].cpu().numpy())))
        console.say("---------------")
    bar.close()


def _start(start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --start {start} ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None


def _tokenizer(config: SampleConfig, data: dict[str, Any] | None, vocab_size: int) -> "Tokenizer":
    """The tokenizer that a run remembers, that of the bins, or GPT-2's where the vocabulary is as large.

    GPT-2's files are those of ``--tokenizer-dir``, else those that lie beside the bins, that the run was trained with,
    or that lie in the model's own folder; tiktoken downloads them where there are none.
    """
    from memtrain_common.data.text.bins import read_tokenizer, tokenizer_of
    from memtrain_common.data.text.tokenizers import GPT2Tokenizer, gpt2_files

    own = data.get("tokenizer_dir") if data is not None else Path(config.init_from)
    places = [own, Path(config.data_dir)] if config.data_dir else [own]
    found = next((place for place in reversed(places) if place is not None and gpt2_files(place)), None)
    folder = Path(config.tokenizer_dir) if config.tokenizer_dir else found
    if config.data_dir:
        coder = read_tokenizer(Path(config.data_dir), folder)
    elif data is not None and "folder" in data:  # that of nanoGPT's bins
        coder = read_tokenizer(Path(data["folder"]), folder)
    elif data is not None:
        coder = tokenizer_of(data, folder)
    elif found is not None:
        coder = GPT2Tokenizer(found)
    elif vocab_size in (50257, 50304):
        coder = tokenizer_of({"tokenizer": "gpt2", "vocab_size": 50257}, folder)
    else:
        raise UserError(
            f"{config.init_from} has a vocabulary of {vocab_size} and does not say which: name the folder of its bins "
            "with --data-dir"
        )
    if coder.vocab_size > vocab_size:
        raise UserError(f"the vocabulary of {coder.vocab_size} tokens is not that of {config.init_from}, {vocab_size}")
    return coder


def _encode(coder: "Tokenizer", text: str) -> list[int]:
    from memtrain_common.data.text.tokenizers import GPT2Tokenizer

    if not isinstance(coder, GPT2Tokenizer):
        return [int(t) for t in coder.encode(text.encode())]
    ids: list[int] = []
    for i, part in enumerate(text.split(END)):
        ids += [coder.end_of_text] * (i > 0)
        ids += [int(t) for t in coder.encode(part.encode())]
    return ids


def main() -> None:
    """The console script."""
    sys.exit(run_command(sample, prog=PROG))
