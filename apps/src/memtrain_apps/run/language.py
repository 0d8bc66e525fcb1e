"""Language to fine-tune on: GLUE with an encoder, instructions with a causal language model."""

import hashlib
import json
import math
from typing import Any

import torch
from memtrain_common.data.order import epoch_batch, rank_share
from memtrain_common.data.text.glue import TASKS
from memtrain_common.data.text.glue_batches import evaluation, model_loss, prepare_glue
from memtrain_common.data.text.instruct import examples
from memtrain_common.data.text.instruct_batches import IGNORED, collate, load_rows, with_response
from memtrain_common.data.text.instruct_batches import loss_of as instruct_loss
from memtrain_common.errors import UserError
from memtrain_common.models.encoders import check_length, load_causal_lm, load_classifier, load_tokenizer, model_parts
from memtrain_common.training.distributed import World
from memtrain_common.training.task import Task
from torch import Tensor, nn

from .config import FinetuneConfig
from .workload import Workload, name_classes

HELD_OUT = 64
"""Rows of an instruction file that validate where it has more than ten times as many; else a tenth."""


def glue_workload(config: FinetuneConfig, world: World) -> Workload:
    """``--data glue:TASK``: the task's rows and an encoder with a fresh head; reported is GLUE's development set."""
    task = config.data.removeprefix("glue:")
    if task not in TASKS:
        raise UserError(f"--data glue:{task} is no task of GLUE: choose one of {', '.join(f'glue:{t}' for t in TASKS)}")
    _need_model(config)
    tokenizer = load_tokenizer(config.model)
    prepared = prepare_glue(task, config.data_dir, tokenizer, max_length=config.max_length)
    model, whole = load_classifier(config.model, TASKS[task].num_labels, pad_id=tokenizer.pad_token_id)
    long = check_length(model, config.model, prepared.longest, config.max_length)
    if not all(text.isdigit() for text in TASKS[task].labels):
        name_classes(model, TASKS[task].labels)
    rows = len(prepared.ids["train"])
    parts = {**prepared.parts, **model_parts(config.model)}

    def batches(i: int) -> dict[str, Tensor]:
        order = epoch_batch(config.seed, i, batch=config.batch_size, size=rows)
        return prepared.batch("train", rank_share(order, world.rank, world.size).tolist())

    def evaluate(m: nn.Module, split: str) -> dict[str, float]:
        return evaluation(task, prepared, m, config.batch_size)

    return Workload(
        task=Task(model, batches, model_loss, fresh=whole),
        evaluate=evaluate,
        metric=TASKS[task].metrics[0],
        higher_is_better=True,
        about={"name": config.data, "train": rows, "sha256": prepared.sha256, "parts": parts},
        splits=("val",),
        notes=(long,) if long else (),
        extra={"tokenizer": tokenizer},
        **_lengths(config, rows),
    )


def instruct_workload(config: FinetuneConfig, world: World) -> Workload:
    """``--data metamathqa|commonsense|FILE``: prompts and responses, the prompt left out of the loss."""
    _need_model(config)
    tokenizer = load_tokenizer(config.model)
    found = examples(load_rows(config.data, config.data_dir))
    kept = with_response(found, tokenizer, data=config.data, max_length=config.max_length, needed=2)
    place = f"within --max-length {config.max_length} tokens"
    left_out = f"left out {len(found) - len(kept):,} of {len(found):,} rows, which have no response {place}"
    held = min(HELD_OUT, max(1, len(kept) // 10))
    places = {round((i + 0.5) * len(kept) / held) for i in range(held)}
    validation = [kept[i] for i in sorted(places) if i < len(kept)]
    train = [r for i, r in enumerate(kept) if i not in places]
    model = load_causal_lm(config.model)
    long = check_length(model, config.model, max(len(r.ids) for r in kept), config.max_length)
    pad = tokenizer.pad_token_id

    def batches(i: int) -> dict[str, Tensor]:
        order = rank_share(
            epoch_batch(config.seed, i, batch=config.batch_size, size=len(train)), world.rank, world.size
        )
        return collate([train[j] for j in order.tolist()], pad)

    @torch.no_grad()
    def evaluate(m: nn.Module, split: str) -> dict[str, float]:
        device = next(m.parameters()).device
        total = count = 0.0
        for start in range(0, len(validation), config.batch_size):
            batch = collate(validation[start : start + config.batch_size], pad)
            n = float((batch["labels"][:, 1:] != IGNORED).sum())  # a token's label is scored by the one before it
            total += float(instruct_loss(m, {k: v.to(device) for k, v in batch.items()})) * n
            count += n
        return {"loss": total / count}

    digest = hashlib.sha256(json.dumps([[r.ids, r.prompt] for r in kept]).encode()).hexdigest()
    return Workload(
        task=Task(model, batches, instruct_loss),
        evaluate=evaluate,
        metric="loss",
        higher_is_better=False,
        about={
            "name": config.data,
            "train": len(train),
            "val": len(validation),
            "sha256": digest,
            "parts": {"tokens": digest, **model_parts(config.model)},
        },
        splits=("val",),
        notes=tuple(filter(None, (left_out if len(kept) < len(found) else "", long))),
        extra={"tokenizer": tokenizer},
        **_lengths(config, len(train)),
    )


def _need_model(config: FinetuneConfig) -> None:
    if not config.model:
        raise UserError(f"--data {config.data} needs --model: a folder of transformers, or a model's name on the hub")
    for name in ("labels", "weights", "image_size"):  # of a preset; those on the command line are refused before
        if getattr(config, name) != getattr(FinetuneConfig(), name):
            raise UserError(
                f"--{name.replace('_', '-')} is for pictures, and --data {config.data} has none: leave it out"
            )


def _lengths(config: FinetuneConfig, rows: int) -> dict[str, Any]:
    per_step = config.batch_size * config.gradient_accumulation_steps
    return {
        "steps": config.total_steps(rows, per_step),
        "eval_interval": max(1, math.ceil(config.eval_epochs * rows / per_step)),
        "units_per_step": per_step,
    }
