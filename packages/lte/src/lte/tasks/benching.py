"""The work of ``lte-bench``: the training itself, through the shared loop, each step timed to the device's end."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from memtrain_common.commands.session import Session
from memtrain_common.console import Console, format_bytes, format_count, format_table
from memtrain_common.data.text.corpus import Corpus, Crops, load_corpus
from memtrain_common.data.text.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from memtrain_common.measuring.environment import device_name
from memtrain_common.measuring.memory import CATEGORIES
from memtrain_common.models.gpt import GPT
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import launch
from memtrain_common.training.rng import seed_all

from .bench_flags import BenchConfig, flops_per_token, peak_flops, plain_train_config
from .heads import check_world
from .starting import gpt_config, with_architecture
from .train import Trained, train_one
from .train_config import TrainConfig


class _Progress(Console):
    """The training's bar without its lines: its losses mean nothing here."""

    def say(self, text: str = "") -> None:
        pass


class Clock:
    """Times between optimizer steps, each ended when the device has done its work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ends: list[float] = []

    def __call__(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.ends.append(time.perf_counter())

    def seconds(self, steps: int) -> list[float]:
        """Of the last ``steps`` steps."""
        return [b - a for a, b in zip(self.ends[-steps - 1 :], self.ends[-steps:], strict=False)]


def measure_training(config: BenchConfig) -> None:
    """Time it and say so: LTE (or full training), and with ``--compare-full`` both."""
    world, device = launch(config.device)
    check_world(config, world)
    if device.type == "cpu" and config.dtype == "bfloat16":
        avoid_broken_amx()
    console = Console(quiet=not world.is_main)
    corpus = load_corpus(config.data_dir, config.tokenizer, config.tokenizer_dir or None) if config.data_dir else None
    corpus = corpus or random_corpus(config)
    plain = with_architecture(plain_train_config(config), corpus)
    crops = Crops(
        corpus,
        batch_size=plain.batch_size,
        block_size=plain.block_size,
        seed=plain.seed,
        rank=world.rank,
        world_size=world.size,
    )
    ways = [config.method == "full"] + ([True] if config.compare_full else [])
    name = device_name(device)
    peak = peak_flops(config, name)
    with torch.device("meta"):
        flops = flops_per_token(GPT(gpt_config(plain)))
    tokens = plain.gradient_accumulation_steps * plain.batch_size * plain.block_size
    columns: list[list[str]] = []
    for full in ways:
        clock = Clock(device)
        with ExitStack() as stack:
            each: Callable[[], Any] = clock
            if config.profile and full == ways[0]:
                each = _profiled(stack, clock, config, device)
            seed_all(plain.seed)
            session = Session.alone(plain, device=config.device)
            session.console = _Progress(quiet=not world.is_main)
            trained = train_one(session, corpus, crops, full=full, each_step=each)
        columns.append(_column(trained, clock.seconds(config.steps), tokens, flops, peak, world.size, full))
        del trained
    shape = f"{plain.n_layer} blocks, width {plain.n_embd}, {plain.gradient_accumulation_steps} × {plain.batch_size} × "
    console.say(
        f"{name}, {plain.dtype}{', compiled' if plain.compile else ''}; {shape}{plain.block_size} tokens a step"
    )
    heads = [
        "",
        "step, ms (median)",
        "quartiles, ms",
        "tokens/s",
        "MFU",
        "trained parameters",
        *CATEGORIES,
        "total",
        "peak",
    ]
    console.say(format_table([list(row) for row in zip(heads, *columns, strict=True)]))
    console.say(
        f"MFU by nanoGPT's formula, of {peak / 1e12:g} TFLOP/s" if peak else "MFU: this device's peak is not known"
    )


def _column(
    trained: Trained, seconds: list[float], tokens: int, flops: float, peak: float | None, processes: int, full: bool
) -> list[str]:
    """One way's numbers, as the table shows them."""
    low, median, high = statistics.quantiles(seconds, n=4)
    ledger = trained.outcome.result.ledger
    assert ledger is not None  # every training measures its first step
    mfu = f"{100 * tokens / median * flops / (peak * processes):.1f} %" if peak else "unavailable"
    bytes_at_peak = trained.outcome.result.peak_bytes.get("training")
    return [
        "full" if full else "LTE",
        f"{1e3 * median:.1f}",
        f"{1e3 * low:.1f} to {1e3 * high:.1f}",
        format_count(tokens / median),
        mfu,
        format_count(trained.numbers[0]),
        *(format_bytes(ledger.total(c)) for c in CATEGORIES),
        format_bytes(sum(ledger.totals.values())),
        "unavailable" if bytes_at_peak is None else format_bytes(bytes_at_peak),
    ]


def _profiled(stack: ExitStack, clock: Clock, config: BenchConfig, device: torch.device) -> Callable[[], None]:
    """The clock, and a profiler that watches the last three steps and writes its trace."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    watched = min(3, config.steps - 1)
    skipped = config.warmup_steps + config.steps - watched
    profiler = stack.enter_context(
        torch.profiler.profile(
            activities=kinds,
            schedule=torch.profiler.schedule(wait=skipped, warmup=1, active=watched, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(config.profile),
        )
    )

    def each() -> None:
        clock()
        profiler.step()

    return each


def random_corpus(config: TrainConfig) -> Corpus:
    """Random tokens of the vocabulary that the flags name: what is in them does not change the time of a step."""
    sizes = {"bytes": 256, "chars": 65, "gpt2": 50257}
    vocab = min(config.vocab_size or sizes[config.tokenizer], sizes[config.tokenizer])
    coder: Tokenizer = ByteTokenizer()
    if config.tokenizer == "gpt2":
        coder = GPT2Tokenizer(vocab_size=vocab)
    elif config.tokenizer == "chars":
        coder = CharTokenizer("".join(map(chr, range(32, 32 + vocab))))
    rng = np.random.default_rng(config.seed)
    length = max(2**16, 4 * config.block_size)
    train, val = (rng.integers(0, vocab, length).astype(np.uint16) for _ in range(2))
    return Corpus("random tokens", train, val, coder, 0, "")
