"""The composition behind ``lora-xs instruct``: rows, tokens with the prompt masked, adapter, the shared loop."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memtrain_common.commands.configure import MAY_CHANGE
from memtrain_common.commands.session import Session
from memtrain_common.data.order import epoch_batch
from memtrain_common.data.text.instruct import Example, Row, examples, find_file, read_rows, rows_from_hub
from memtrain_common.errors import UserError
from memtrain_common.models.encoders import load_tokenizer
from memtrain_common.training.distributed import World
from memtrain_common.training.fit_config import FitConfig
from memtrain_common.training.rng import seed_all
from memtrain_common.training.task import Task
from torch import Tensor, nn

from ..config import LoRAXSConfig
from ..injection import inject
from .instruct_flags import PROG, InstructConfig
from .models import load_causal_lm
from .prompts import PROMPTS, training_prompt
from .schedules import schedule, warmup_steps
from .training import finish, train

IGNORED = -100  # the label that cross entropy passes over
# data: (file names, hub name, its split)
SETS = {
    "metamathqa": (("MetaMathQA-395K.json", "MetaMathQA.json", "metamathqa.jsonl"), "meta-math/MetaMathQA", "train"),
    "commonsense": (("commonsense_170k.json", "commonsense_170k.jsonl"), "zwhe99/commonsense_170k", "train"),
}


@dataclass(frozen=True)
class Tokens:
    """One row: the prompt's tokens, then the response's."""

    ids: list[int]
    prompt: int
    """Tokens of the prompt, which the loss passes over."""


def load_rows(config: InstructConfig) -> list[Row]:
    """The training rows that the flags ask for."""
    limit = config.limit or None
    if config.data in SETS:
        names, hub, split = SETS[config.data]
        if config.data_dir:
            return read_rows(find_file(Path(config.data_dir), names), limit)
        return rows_from_hub(hub, None, split, limit)
    if not Path(config.data).is_file():
        raise UserError(f"there is no file {config.data}: --data takes {', '.join(SETS)} or a JSON or JSON Lines file")
    return read_rows(Path(config.data), limit)


def tokenize(example: Example, tokenizer: Any, max_length: int) -> Tokens:
    """Prompt, response and the end token, cut to ``max_length``. A token across the border belongs to the response."""
    prompt = tokenizer(example.prompt)["input_ids"]
    ids = tokenizer(example.prompt + example.response)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return Tokens(ids[:max_length], same)


def collate(rows: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Rows padded on the right: input_ids, attention_mask and labels, each (rows×tokens)."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = 1
        labels[i, row.prompt : n] = ids[i, row.prompt : n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scored_tokens(labels: Tensor) -> int:
    """How many labels (rows×tokens) the loss looks at: each is scored by the token before it."""
    return int((labels[:, 1:] != IGNORED).sum())


def shared_batch(rows: Sequence[Tokens], pad_id: int, world: World) -> dict[str, Tensor]:
    """This process's rows of a micro-batch, and the "weight" that makes the processes' mean the micro-batch's own."""
    parts = [collate(rows[r :: world.size], pad_id) for r in range(world.size)]
    counts = [scored_tokens(part["labels"]) for part in parts]
    return {**parts[world.rank], "weight": torch.tensor(counts[world.rank] * world.size / sum(counts))}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy over the responses' tokens: those of a whole micro-batch weigh alike, on any number of
    processes."""
    inputs = {name: value for name, value in batch.items() if name != "weight"}
    loss = model(**inputs, use_cache=False).loss
    return loss * batch["weight"] if "weight" in batch else loss


def run_instruct(config: InstructConfig, argv: Sequence[str]) -> None:
    """Everything that ``lora-xs instruct`` does once its flags are checked."""
    session = Session.begin(config, argv, prog=PROG)
    world, device = session.place, session.device
    pair = (config.fields[0], config.fields[1]) if config.fields else None
    prompt = training_prompt(config.prompt, config.data)
    pairs = examples(load_rows(config), pair, PROMPTS[prompt])
    tokenizer = load_tokenizer(config.model)
    rows = [tokenize(e, tokenizer, config.max_length) for e in pairs]
    kept = [r for r in rows if len(r.ids) > r.prompt]
    if len(kept) <= config.val_samples:
        raise UserError(
            f"{config.data} has {len(kept)} rows with a response within --max-length {config.max_length} tokens: "
            f"too few, with {config.val_samples} of them held out"
        )
    held = {round((i + 0.5) * len(kept) / config.val_samples) for i in range(config.val_samples)}
    validation = [kept[i] for i in sorted(held)]
    rows_in = [r for i, r in enumerate(kept) if i not in held]

    seed_all(config.seed)
    model = load_causal_lm(config.model, config.base_dtype)
    xs = LoRAXSConfig(config.rank, config.alpha or None, config.targets, init=config.init, seed=config.seed, head=())
    model = inject(model.to(device), xs)
    sha = hashlib.sha256(json.dumps([[r.ids, r.prompt] for r in kept]).encode()).hexdigest()
    session.open({"name": config.data, "sha256": sha})
    say = session.console.say
    say(f"{session.folder.path}: {len(rows_in):,} training rows, {len(validation):,} held out")
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept):,} rows left out: their prompts alone fill {config.max_length} tokens")
    micro, size = config.gradient_accumulation_steps, len(rows_in)
    steps = config.total_steps(size, config.batch_size * micro)

    def batches(i: int) -> dict[str, Tensor]:
        order = epoch_batch(config.seed, i, batch=config.batch_size, size=size)
        return shared_batch([rows_in[j] for j in order.tolist()], tokenizer.pad_token_id, world)

    def evaluate(m: nn.Module) -> dict[str, float]:
        total = count = 0.0
        for start in range(0, len(validation), config.batch_size):
            batch = collate(validation[start : start + config.batch_size], tokenizer.pad_token_id)
            n = scored_tokens(batch["labels"])
            total += float(loss_of(m, {k: v.to(device) for k, v in batch.items()})) * n
            count += n
        return {"loss": total / count}

    seed_all(config.seed + world.rank)
    warm = config.warmup_iters or warmup_steps(config.warmup_ratio, steps)
    factor = schedule(config.schedule, min(warm, steps - 1), steps)
    task = Task(model, batches, loss_of, evaluate=evaluate if validation else None, lr_factor=factor)
    fit_config = FitConfig(
        max_iters=steps,
        gradient_accumulation_steps=micro,
        grad_clip=config.grad_clip,
        dtype=config.dtype,
        eval_interval=config.eval_interval,
        log_interval=config.log_interval,
        units_per_step=config.batch_size * micro,
        tracker=config.tracker,
    )
    key = session.resume_key(MAY_CHANGE, data_sha256=sha)
    rates = (config.learning_rate, config.learning_rate)
    outcome = train(session, task, fit_config, rates=rates, key=key, label="instruct")
    result = outcome.result
    lines = [("validation loss", f"{result.evaluation['loss']:.4f}")] if result.evaluation else []
    if result.best is not None:
        lines.append((f"lowest (step {result.best[0]})", f"{result.best[1]:.4f}"))
    finish(
        session,
        outcome,
        scores={"val": result.evaluation} if result.evaluation else {},
        lines=lines or [("steps", str(result.step))],
        about={"command": "instruct", "data": config.data, "prompt": prompt},
    )
