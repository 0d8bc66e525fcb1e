"""The composition behind ``lte-train``: corpus, GPT, heads, optimizer, and what a run has to tell."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from memtrain_common.commands.result import Outcome
from memtrain_common.commands.session import Session
from memtrain_common.commands.summary import ledger_table
from memtrain_common.console import format_table
from memtrain_common.data.text.corpus import Corpus, Crops, load_corpus, ngram_entropies
from memtrain_common.data.text.tokenizers import default_prompt, printable
from memtrain_common.errors import UserError
from memtrain_common.models.gpt import GPT, next_token_loss
from memtrain_common.training.distributed import parallelize, unwrap
from memtrain_common.training.fit_config import FitConfig
from memtrain_common.training.loop import mean_loss
from memtrain_common.training.rng import seed_all
from memtrain_common.training.task import Task
from torch import Tensor, nn

from ..merging import averaged
from .evaluating import evaluate_only
from .heads import add_heads, check_world, lr_factor, sent_facts
from .nanogpt import asked, translate
from .resuming_nanogpt import begin_at_nanogpts_step, with_nanogpts_settings
from .starting import freeze, gpt_config, starting_gpt, with_architecture, with_length
from .train_config import MAY_CHANGE, PROG, TrainConfig
from .unasked import said_of_warmup, with_nanogpts_choice

HEARTBEAT_S = 15.0  # of silence: torchrun gives a process 30 s between SIGTERM and SIGKILL, in which it must have saved


@dataclass(frozen=True)
class Trained:
    """One trained model with what there is to say of it."""

    session: Session
    outcome: Outcome
    numbers: tuple[int, int]
    """Trained parameters over all processes; and those of the model as it is trained: weights, heads, no buffers."""
    plain: dict[str, Tensor]
    """The state dict of the plain model that evaluation saw."""
    facts: dict[str, str]
    """What else the summary says of the run."""

    @property
    def loss(self) -> float:
        return self.outcome.evaluation["loss"]


def run_training(config: TrainConfig, argv: Sequence[str]) -> None:
    """Everything that ``lte-train`` does once its flags are checked."""
    config = with_nanogpts_settings(config)
    patience = config.peer_timeout if config.parallel == "heads" else None
    session = Session.begin(config, argv, prog=PROG, shared="", patience_s=patience)
    given = asked(translate(argv, TrainConfig)[0])
    if not config.resume and "select" not in given:
        config = with_nanogpts_choice(config, session.place.size)
    check_world(config, session.place)
    corpus = load_corpus(config.data_dir or None, config.tokenizer, config.tokenizer_dir or None)
    crops = Crops(
        corpus,
        batch_size=config.batch_size,
        block_size=config.block_size,
        seed=config.seed,
        rank=session.place.rank,
        world_size=session.place.size,
        contiguous=config.parallel == "heads",
    )
    config = with_architecture(config, corpus, session.console.say)
    config = with_length(config, corpus, keep_warmup="warmup_iters" in given)
    session.config = config
    if config.eval_only:
        evaluate_only(config, corpus, crops, session.device, session.place)
        return
    session.open(corpus.describe(), beside=("ckpt.pt",) if config.nanogpt_run else ())
    if not config.resume and said_of_warmup(config):
        session.console.say(said_of_warmup(config))
    session.console.say(
        f"{session.folder.path}: {corpus.name}, {len(corpus.train):,} training tokens ({corpus.tokenizer.name})"
    )
    main = train_one(session, corpus, crops, full=config.method == "full")
    full = None
    if config.compare_full:
        alone = dataclasses.replace(
            session.config, method="full", compare_full=False, learning_rate=config.full_learning_rate
        )
        full = train_one(session.beside("full", alone), corpus, crops, full=True)
    _report(corpus, main, full)


def train_one(
    session: Session, corpus: Corpus, crops: Crops, *, full: bool, each_step: Callable[[], Any] | None = None
) -> Trained:
    """Train the GPT by LTE, or all of its parameters: same initial weights, same batches, same schedule.

    Args:
        full: train all parameters, without heads.
        each_step: called after each optimizer step, and after the merge that may follow it.
    """
    config: TrainConfig = session.config
    place, device, run = session.place, session.device, session.run
    seed_all(config.seed)
    config = with_architecture(config, corpus)
    resumed = bool(config.resume) and run is not None and bool(run.checkpoints.steps())
    model: nn.Module = starting_gpt(config, resumed=resumed).to(device)
    full_parameters, heads = sum(p.numel() for p in model.parameters()), None
    if not full:
        heads = add_heads(config, model, place)
    seed_all(config.seed + place.rank)  # dropout differs between processes; the weights above must not
    ranks = heads.ranks if heads is not None else None

    def evaluate(m: nn.Module) -> dict[str, float]:
        with averaged(unwrap(m), ranks) if heads is not None else nullcontext():
            return mean_loss(m, next_token_loss, crops.validation(config.eval_iters))

    if full:
        freeze(model, config.freeze_n)
    wrapped = model if ranks is not None else parallelize(model, "ddp", device)
    task = Task(wrapped, crops, next_token_loss, evaluate=evaluate, lr_factor=lr_factor(config))
    task = heads.join(task) if heads is not None else dataclasses.replace(task, optimizer=_plain_adamw(model, config))
    task = dataclasses.replace(task, after_step=_one_after_the_other(task.after_step, each_step))
    per_step = config.gradient_accumulation_steps * config.batch_size * config.block_size
    fit_config = FitConfig(
        max_iters=config.max_iters,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        grad_clip=config.grad_clip,
        dtype=config.dtype,
        compile=config.compile,
        eval_interval=config.eval_interval,
        checkpoint_interval=0 if config.always_save_checkpoint else config.max_iters + 1,
        log_interval=config.log_interval,
        units_per_step=per_step,
        unit="tokens",
        tracker=config.tracker,
        tracker_project=config.wandb_project,
        tracker_name=config.wandb_run_name,
        agree_interval=config.lte_merge_steps or config.log_interval,
        agree_offset=config.lte_merge_delay % (config.lte_merge_steps or 1),  # when merges arrive, not as they are sent
        patience_s=min(config.peer_timeout, HEARTBEAT_S),
    )
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in {*MAY_CHANGE, *config.PLACES}}
    key = {**kept, "text_sha256": corpus.sha256}
    label = "full" if full else "lte"
    begun = bool(config.nanogpt_run) and run is not None
    if begun and run is not None and not run.checkpoints.steps():
        begin_at_nanogpts_step(config, task, run, key, session.console)
    outcome = session.fit(task, fit_config, resume_key=key, label=label, select=config.select, resume=begun)
    trainable = heads.trained() if heads is not None else sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = heads.plain() if heads is not None else dict(model.state_dict())
    facts = sent_facts(heads, run, outcome.result.step * per_step, full_parameters) if heads and run else {}
    total = trainable + sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Trained(session, outcome, (trainable, total), plain, facts)


def _plain_adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Over all that is trained; matrices decay, vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.full_learning_rate, betas=(config.beta1, config.beta2))


def _one_after_the_other(*calls: Callable[[], Any] | None) -> Callable[[], Any] | None:
    there = [call for call in calls if call is not None]
    return (lambda: [call() for call in there]) if there else None


def _report(corpus: Corpus, main: Trained, full: Trained | None) -> None:
    """Say what came out, and draw it."""
    session, config = main.session, main.session.config
    name = "LTE" if config.method == "lte" else "full"
    entropies = _entropies(corpus) if session.place.is_main else {}
    unit = {"bytes": "byte", "chars": "character", "gpt2": "token"}[corpus.tokenizer.name]
    losses: list[tuple[str, ...]] = [(name, f"{main.loss:.4f}")]
    ledgers = {name: main.outcome.result.ledger}
    curves = {name: session.folder}
    if full is not None:
        beside = f"LTE {100 * (main.loss / full.loss - 1):+.1f} %" if full.loss > 0 else ""
        losses.append(("full training, same batches", f"{full.loss:.4f}", beside))
        ledgers["full"], curves["full"] = full.outcome.result.ledger, full.session.folder
        full.session.finish(full.outcome, scores={"val": full.outcome.evaluation}, numbers=full.numbers, say=False)
    losses += [(n, f"{value:.4f}") for n, value in entropies.items()]
    if corpus.tokenizer.name != "bytes" and corpus.n_bytes:
        losses.append((f"{name}, nats per byte", f"{main.loss / corpus.bytes_per_token:.4f}"))
    session.finish(
        main.outcome,
        scores={"val": main.outcome.evaluation},
        numbers=main.numbers,
        table=f"validation loss, nats per {unit}\n{format_table(losses)}",
        memory=ledger_table({n: ledger for n, ledger in ledgers.items() if ledger is not None}, times=False),
        facts=main.facts,
        curves=curves,
        levels={n: value for n, value in entropies.items() if n.startswith("bigram")},
        ylabel=f"loss, nats per {unit}",
        closing=_sample(config, corpus, main.plain, unit) if config.sample_tokens and session.place.is_main else "",
    )


def _entropies(corpus: Corpus) -> dict[str, float]:
    """Losses to compare with, by name; none where the tokens are so many that counting them would take minutes."""
    if len(corpus.train) + len(corpus.val) > 2**26:
        return {}
    unigram, bigram = ngram_entropies(np.concatenate([corpus.train, corpus.val]))
    return {"unigram entropy": unigram, "bigram entropy": bigram}


def _sample(config: TrainConfig, corpus: Corpus, weights: dict[str, Tensor], unit: str) -> str:
    """Text from the merged model: a plain GPT with the weights that evaluation used."""
    plain = GPT(gpt_config(config))
    plain.load_state_dict({name: value.cpu() for name, value in weights.items()})
    coder = corpus.tokenizer
    try:
        prompt = torch.from_numpy(default_prompt(coder).astype(np.int64))[None]  # (1, 1)
        tokens = plain.generate(prompt, config.sample_tokens, seed=config.seed, vocab_size=coder.vocab_size)
        text = printable(coder.decode(tokens[0, prompt.shape[1] :].numpy()))
    except UserError as error:  # bins without the vocabulary that would turn tokens to text
        return f"no sample: {error}"
    return "\n".join([f"{config.sample_tokens} generated {unit}s", *("  | " + line for line in text.splitlines())])
