"""The composition behind ``lora-xs instruct``: rows, tokens with the prompt masked, adapter, the shared loop."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from memtrain_common.commands.configure import MAY_CHANGE
from memtrain_common.commands.session import Session
from memtrain_common.data.order import epoch_batch
from memtrain_common.data.text.instruct import examples
from memtrain_common.data.text.instruct_batches import (
    collate,
    load_rows,
    loss_of,
    scored_tokens,
    shared_batch,
    with_response,
)
from memtrain_common.data.text.prompts import PROMPTS, training_prompt
from memtrain_common.models.encoders import check_length, load_causal_lm, load_tokenizer, model_parts
from memtrain_common.training.fit_config import DTYPES, FitConfig
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import schedule, warmup_steps
from memtrain_common.training.task import Task
from torch import Tensor, nn

from .instruct_flags import PROG, InstructConfig
from .training import adapt, configured, finish, train


def run_instruct(config: InstructConfig, argv: Sequence[str]) -> None:
    """Everything that ``lora-xs instruct`` does once its flags are checked."""
    session = Session.begin(config, argv, prog=PROG)
    world, device = session.place, session.device
    pair = (config.fields[0], config.fields[1]) if config.fields else None
    prompt = training_prompt(config.prompt, config.data)
    pairs = examples(load_rows(config.data, config.data_dir, config.limit or None), pair, PROMPTS[prompt])
    tokenizer = load_tokenizer(config.model)
    kept = with_response(
        pairs, tokenizer, data=config.data, max_length=config.max_length, needed=config.val_samples + 1
    )
    held = {round((i + 0.5) * len(kept) / config.val_samples) for i in range(config.val_samples)}
    validation = [kept[i] for i in sorted(held)]
    rows_in = [r for i, r in enumerate(kept) if i not in held]

    seed_all(config.seed)
    model = load_causal_lm(config.model, DTYPES[config.base_dtype]).to(device)
    long = check_length(model, config.model, max(len(r.ids) for r in kept), config.max_length)
    micro, size = config.gradient_accumulation_steps, len(rows_in)

    def batches(i: int) -> dict[str, Tensor]:
        order = epoch_batch(config.seed, i, batch=config.batch_size, size=size)
        return shared_batch([rows_in[j] for j in order.tolist()], tokenizer.pad_token_id, world.rank, world.size)

    task = Task(model, batches, loss_of)
    model = adapt(task, configured(config, config.rank, config.alpha or None, ()), config.init_batches, session.console)
    sha = hashlib.sha256(json.dumps([[r.ids, r.prompt] for r in kept]).encode()).hexdigest()
    parts = {"tokens": sha, **model_parts(config.model)}
    session.open({"name": config.data, "sha256": sha, "parts": parts})
    say = session.console.say
    say(f"{session.folder.path}: {len(rows_in):,} training rows, {len(validation):,} held out")
    if long:
        say(long)
    if len(kept) < len(pairs):
        say(f"{len(pairs) - len(kept):,} rows left out: their prompts alone fill {config.max_length} tokens")
    steps = config.total_steps(size, config.batch_size * micro)

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
    task = replace(task, evaluate=evaluate if validation else None, lr_factor=factor)
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
    found = outcome.evaluation
    lines = [("validation loss", f"{found['loss']:.4f}")] if found else []
    if result.best is not None:
        lines.append((f"lowest (step {result.best[0]})", f"{result.best[1]:.4f}"))
    finish(
        session,
        outcome,
        scores={"val": found} if found else {},
        lines=lines or [("steps", str(result.step))],
        about={"command": "instruct", "data": config.data, "prompt": prompt},
    )
