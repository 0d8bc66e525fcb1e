"""The composition behind ``lte-train``: corpus, GPT, heads, optimizer, the shared loop, and the summary."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memtrain_common.console import Console, format_bytes, format_count, format_seconds, format_table
from memtrain_common.data.text.corpus import Corpus, Crops, load_corpus, ngram_entropies
from memtrain_common.data.text.tokenizers import default_prompt, printable
from memtrain_common.errors import UserError
from memtrain_common.measuring.environment import device_name
from memtrain_common.measuring.memory import CATEGORIES, Ledger
from memtrain_common.measuring.plots import plot_loss, plot_memory
from memtrain_common.models.gpt import GPT, next_token_loss
from memtrain_common.runs.run_folder import RunFolder, default_run_path
from memtrain_common.runs.trackers import check_tracker
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import World, gather_objects, launch, parallelize, unwrap, world
from memtrain_common.training.loop import FitConfig, FitResult, fit, mean_loss
from memtrain_common.training.rng import seed_all
from torch import Tensor, nn

from ..merging import averaged
from .evaluating import evaluate_only
from .heads import add_heads, check_world, lr_factor, sent_facts
from .starting import freeze, gpt_config, starting_gpt, with_architecture
from .summary import write_summary
from .train_config import MAY_CHANGE, PROG, TrainConfig

HEARTBEAT_S = 15.0  # of silence: torchrun gives a process 30 s between SIGTERM and SIGKILL, in which it must have saved


@dataclass(frozen=True)
class Trained:
    """One trained model with what there is to say of it."""

    model: nn.Module
    result: FitResult
    trainable: int
    """Trained numbers."""
    total: int
    """Numbers of the model as it is trained: weights, heads, no buffers."""
    plain: dict[str, Tensor]
    """The state dict of the plain model that evaluation saw."""
    facts: list[tuple[str, str]]
    """What else the summary says of the run."""


def run_training(config: TrainConfig, argv: Sequence[str]) -> None:
    """Everything that ``lte-train`` does once its flags are checked."""
    world, device = launch(config.device, patience_s=config.peer_timeout if config.parallel == "heads" else None)
    if device.type == "cpu" and config.dtype == "bfloat16":
        avoid_broken_amx()
    check_world(config, world)
    check_tracker(config.tracker)
    corpus = load_corpus(config.data_dir or None, config.tokenizer, config.tokenizer_dir or None)
    crops = Crops(
        corpus,
        batch_size=config.batch_size,
        block_size=config.block_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        contiguous=config.parallel == "heads",
    )
    config = with_architecture(config, corpus)
    if config.eval_only:
        evaluate_only(config, corpus, crops, device, world)
        return
    run, config = _open_run(config, argv, corpus, device, world)
    console = Console(run.path / "log.txt" if world.is_main else None, quiet=not world.is_main)
    console.say(f"{run.path}: {corpus.name}, {len(corpus.train):,} training tokens ({corpus.tokenizer.name})")

    lte = train_one(config, corpus, crops, run, console, device, world.rank, full=config.method == "full")
    full = None
    if config.compare_full:
        folder = run.path / "full"
        again = config.resume and (folder / "config.json").exists()
        full_run = (RunFolder.open if again else RunFolder.create)(folder, writes=world.is_main)
        if not again:
            made = {"data": corpus.describe(), "device": device_name(device), "processes": world.size}
            alone = dataclasses.replace(
                config, method="full", compare_full=False, learning_rate=config.full_learning_rate
            )
            full_run.write_config(alone, prog=PROG, argv=argv, **made)
        full = train_one(config, corpus, crops, full_run, console, device, world.rank, full=True)
    if world.is_main:
        _report(config, corpus, run, console, lte, full)


def _open_run(
    config: TrainConfig, argv: Sequence[str], corpus: Corpus, device: torch.device, world: World
) -> tuple[RunFolder, TrainConfig]:
    """Make the run's folder, or open it, and write its config.json."""
    if config.resume:
        run = RunFolder.open(Path(config.resume), writes=world.is_main)
        before = run.read_config()["data"]
        if before["sha256"] != corpus.sha256:
            raise UserError(
                f"{config.resume} was trained on {before['name']} (SHA-256 {before['sha256'][:12]}…), and the text "
                f"found now has {corpus.sha256[:12]}…: give it the same --data-dir, or begin a new run"
            )
    else:
        path = gather_objects(Path(config.out) if config.out else default_run_path(PROG))[0]  # the first one's clock
        run = RunFolder.create(path, writes=world.is_main)
    config = dataclasses.replace(config, out=str(run.path))
    if config.resume:
        run.add_resume(config, prog=PROG, argv=argv)
    else:
        made = {"data": corpus.describe(), "device": device_name(device), "processes": world.size}
        run.write_config(config, prog=PROG, argv=argv, **made)
    return run, config


def train_one(
    config: TrainConfig,
    corpus: Corpus,
    crops: Crops,
    run: RunFolder | None,
    console: Console,
    device: torch.device,
    rank: int = 0,
    *,
    full: bool,
    each_step: Callable[[], Any] | None = None,
) -> Trained:
    """Train the GPT by LTE, or all of its parameters: same initial weights, same batches, same schedule.

    Args:
        run: where it goes; None keeps no files.
        rank: this process's, under torchrun.
        full: train all parameters, without heads.
        each_step: called after each optimizer step, and after the merge that may follow it.
    """
    seed_all(config.seed)
    config = with_architecture(config, corpus)
    resumed = bool(config.resume) and run is not None and bool(run.checkpoints.steps())
    model: nn.Module = starting_gpt(config, resumed=resumed).to(device)
    full_parameters, heads = sum(p.numel() for p in model.parameters()), None
    if full:
        freeze(model, config.freeze_n)
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.full_learning_rate,
            betas=(config.beta1, config.beta2),
        )
    else:
        heads = add_heads(config, model, world())
        optimizer = heads.optimizer
    seed_all(config.seed + rank)  # dropout differs between processes; the weights above must not
    ranks = heads.ranks if heads is not None else None

    def evaluate(m: nn.Module) -> dict[str, float]:
        with averaged(unwrap(m), ranks) if heads is not None else nullcontext():
            return mean_loss(m, next_token_loss, crops.validation(config.eval_iters))

    options = heads.fit_options() if heads is not None else {}
    options["after_step"] = _one_after_the_other(options.get("after_step"), each_step)
    result = fit(
        model if ranks is not None else parallelize(model, "ddp", device),
        crops,
        next_token_loss,
        optimizer,
        FitConfig(
            max_iters=config.max_iters,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            grad_clip=config.grad_clip,
            dtype=config.dtype,
            compile=config.compile,
            eval_interval=config.eval_interval,
            checkpoint_interval=0 if config.always_save_checkpoint else config.max_iters + 1,
            log_interval=config.log_interval,
            units_per_step=config.gradient_accumulation_steps * config.batch_size * config.block_size,
            unit="tokens",
            tracker=config.tracker,
            tracker_project=config.wandb_project,
            tracker_name=config.wandb_run_name,
            agree_interval=config.lte_merge_steps or config.log_interval,
            patience_s=min(config.peer_timeout, HEARTBEAT_S),
        ),
        evaluate=evaluate,
        lr_factor=lr_factor(config),
        **options,
        run=run,
        resume=bool(config.resume),
        resume_path=Path(config.out) if run is not None else None,
        identity=_identity(config, corpus),
        console=console,
        label="full" if full else "lte",
    )
    trainable = heads.trained() if heads is not None else sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = heads.plain() if heads is not None else dict(model.state_dict())
    tokens = result.step * config.gradient_accumulation_steps * config.batch_size * config.block_size
    facts = []
    if heads is not None and run is not None:
        facts = sent_facts(heads, run, tokens, full_parameters)
    total = trainable + sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Trained(unwrap(model), result, trainable, total, plain, facts)


def _one_after_the_other(*calls: Callable[[], Any] | None) -> Callable[[], Any] | None:
    there = [call for call in calls if call is not None]
    return (lambda: [call() for call in there]) if there else None


def _identity(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint must agree in: all that the weights depend on."""
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    return {**kept, "text_sha256": corpus.sha256}


def _report(
    config: TrainConfig, corpus: Corpus, run: RunFolder, console: Console, lte: Trained, full: Trained | None
) -> None:
    """Say what came out, and draw it."""
    name = "LTE" if config.method == "lte" else "full"
    entropies = _entropies(corpus)
    unit = {"bytes": "byte", "chars": "character", "gpt2": "token"}[corpus.tokenizer.name]
    ledgers = {name: _ledger(lte, run.path)}
    if full is not None:
        ledgers["full"] = _ledger(full, run.path / "full")
    measured = {name: ledger for name, ledger in ledgers.items() if ledger is not None}
    loss = lte.result.evaluation["loss"]
    console.say()
    console.say(f"validation loss, nats per {unit}")
    losses: list[tuple[str, ...]] = [(name, f"{loss:.4f}"), *((n, f"{value:.4f}") for n, value in entropies.items())]
    if full is not None:
        other = full.result.evaluation["loss"]
        beside = f"LTE {100 * (loss / other - 1):+.1f} %" if other > 0 else ""
        losses.insert(1, ("full training, same batches", f"{other:.4f}", beside))
    if corpus.tokenizer.name != "bytes" and corpus.n_bytes:
        losses.append((f"{name}, nats per byte", f"{loss / corpus.bytes_per_token:.4f}"))
    console.say(format_table(losses))
    if measured:  # not where no step was taken
        console.say("memory of a training step")
        heading = [("", *measured)] if len(measured) > 1 else []
        rows = [(c, *(format_bytes(x.total(c)) for x in measured.values())) for c in CATEGORIES]
        total = ("total", *(format_bytes(sum(x.totals.values())) for x in measured.values()))
        console.say(format_table([*heading, *rows, total]))
    peaks = ", ".join(
        f"{phase} {'unavailable' if n is None else format_bytes(n)}" for phase, n in lte.result.peak_bytes.items()
    )
    joules = "unavailable" if lte.result.joules is None else f"{lte.result.joules:.0f} J ({lte.result.energy_source})"
    speed = f"{format_count(lte.result.units_per_second)} tokens/s, {format_seconds(lte.result.seconds)} of training"
    console.say("run")
    facts = [
        ("trained", f"{lte.trainable:,} of {lte.total:,} parameters"),
        ("peak memory", peaks),
        ("speed", speed),
        ("energy", joules),
        *lte.facts,
    ]
    console.say("\n".join(f"  {name:12} {value}" for name, value in facts))
    write_summary(run, lte.result, trained=lte.trainable, total=lte.total)
    if full is not None:
        write_summary(RunFolder.open(run.path / "full"), full.result, trained=full.trainable, total=full.total)
    if name in measured:
        plot_memory(measured[name], run.path / "memory.png")
    bigram = {n: value for n, value in entropies.items() if n.startswith("bigram")}
    curves = {name: run.metrics()}
    if full is not None:
        curves["full"] = RunFolder.open(run.path / "full").metrics()
    plot_loss(curves, run.path / "loss.png", ylabel=f"loss, nats per {unit}", levels=bigram)
    if config.sample_tokens:
        try:
            sample = _sample(config, corpus, lte.plain)
            console.say(f"{config.sample_tokens} generated {unit}s")
            console.say(sample)
        except UserError as error:  # bins without the vocabulary that would turn tokens to text
            console.say(f"no sample: {error}")
    console.say(f"run folder {run.path}")


def _ledger(trained: Trained, folder: Path) -> Ledger | None:
    """The ledger of this process, or of an earlier one that finished the run; None where no step was taken."""
    if trained.result.ledger is not None:
        return trained.result.ledger
    path = folder / "memory.json"
    return Ledger.read(path) if path.exists() else None


def _entropies(corpus: Corpus) -> dict[str, float]:
    """Losses to compare with, by name; none where the tokens are so many that counting them would take minutes."""
    if len(corpus.train) + len(corpus.val) > 2**26:
        return {}
    unigram, bigram = ngram_entropies(np.concatenate([corpus.train, corpus.val]))
    return {"unigram entropy": unigram, "bigram entropy": bigram}


def _sample(config: TrainConfig, corpus: Corpus, weights: dict[str, Tensor]) -> str:
    """Text from the merged model: a plain GPT with the weights that evaluation used."""
    plain = GPT(gpt_config(config))
    plain.load_state_dict({name: value.cpu() for name, value in weights.items()})
    coder = corpus.tokenizer
    prompt = torch.from_numpy(default_prompt(coder).astype(np.int64))[None]  # (1, 1)
    tokens = plain.generate(prompt, config.sample_tokens, seed=config.seed, vocab_size=coder.vocab_size)
    text = printable(coder.decode(tokens[0, prompt.shape[1] :].numpy()))
    return "\n".join("  | " + line for line in text.splitlines())
