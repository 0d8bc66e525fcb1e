"""The composition behind ``backrazor-glue``: task, encoder, what is trained and saved, the metrics."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from memtrain_common.commands.configure import MAY_CHANGE
from memtrain_common.commands.session import Session
from memtrain_common.console import format_table
from memtrain_common.data.order import epoch_batch, rank_share
from memtrain_common.data.text.glue import TASKS
from memtrain_common.data.text.glue_batches import Prepared, evaluation, model_loss, prepare_glue
from memtrain_common.measuring.prediction import dense_activations
from memtrain_common.models.encoders import check_length, load_classifier, load_tokenizer, model_parts
from memtrain_common.training.distributed import World, parallelize
from memtrain_common.training.fit_config import DTYPES, FitConfig
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import linear_with_warmup
from memtrain_common.training.task import Task
from torch import Tensor, nn

from .glue_flags import PROG, GlueConfig
from .saving import NAMES, saving_of, side_by_side, train_only


def run_glue(config: GlueConfig, argv: Sequence[str]) -> dict[str, float]:
    """Everything that ``backrazor-glue`` does once its flags are checked; -> the task's metrics."""
    session = Session.begin(config, argv, prog=PROG, shared="")
    place, device = session.place, session.device
    tokenizer = load_tokenizer(config.model)
    prepared = prepare_glue(
        config.task, config.data_dir, tokenizer, max_length=config.max_length,
        max_train_samples=config.max_train_samples, max_eval_samples=config.max_eval_samples,
    )  # fmt: skip
    seed_all(config.seed)
    model, head = load_classifier(config.model, TASKS[config.task].num_labels, pad_id=tokenizer.pad_token_id)
    longest = config.max_length if config.pad_to_max_length else prepared.longest
    if long := check_length(model, config.model, longest, config.max_length):
        session.console.say(long)
    train_only(model.to(device), head, config.mode)
    parts = {**prepared.parts, **model_parts(config.model)}
    session.open({"name": config.task, "sha256": prepared.sha256, "parts": parts})
    n = {split: len(rows) for split, rows in prepared.ids.items()}
    session.console.say(
        f"{session.folder.path}: {config.task}, {n['train']:,} training rows, {n['dev']:,} development rows"
    )
    batches = partial(_batch, config, prepared, place)
    dense = dense_activations(model, model_loss, batches(0), DTYPES[config.dtype])
    seed_all(config.seed + place.rank)  # dropout differs between processes; the weights above must not

    def score(m: nn.Module) -> dict[str, float]:
        return evaluation(config.task, prepared, m, config.per_device_eval_batch_size)

    per_step = config.per_device_train_batch_size * place.size * config.gradient_accumulation_steps
    steps = config.total_steps(n["train"], per_step)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    task = Task(
        parallelize(model, "ddp", device),
        batches,
        model_loss,
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate),
        evaluate=score,
        lr_factor=partial(
            linear_with_warmup,
            warmup_iters=config.warmup_iters or math.ceil(config.warmup_ratio * steps),
            decay_iters=steps,
        ),
        saving=saving_of(config),
    )
    fit_config = FitConfig(
        max_iters=steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        grad_clip=config.grad_clip,
        dtype=config.dtype,
        eval_interval=config.eval_interval or math.ceil(n["train"] / per_step),
        log_interval=config.log_interval,
        best_metric=TASKS[config.task].metrics[0],
        higher_is_better=True,
        units_per_step=per_step,
        tracker=config.tracker,
    )
    key = session.resume_key(MAY_CHANGE, data_sha256=prepared.sha256)
    outcome = session.fit(task, fit_config, resume_key=key, label=config.task, select=config.select)
    scores = outcome.result.evaluation
    if outcome.step != outcome.result.step:
        with session.judging(outcome) as chosen:
            scores = score(chosen)
    found = {name: scores[name] for name in TASKS[config.task].metrics}
    rows = [(name, f"{100 * value:.2f}") for name, value in found.items()]
    ledger = outcome.result.ledger
    session.finish(
        outcome,
        scores={"dev": found},
        own={"task": config.task, "mode": config.mode, "dense_activation_bytes": sum(dense.values())},
        table=f"{config.task}, development rows, in hundredths\n{format_table(rows)}",
        memory=side_by_side(config, dense, ledger) if ledger is not None else "",
        curves={NAMES[config.mode]: session.folder},
        ylabel="loss",
    )
    return found


def _batch(config: GlueConfig, prepared: Prepared, place: World, number: int) -> dict[str, Tensor]:
    """Micro-batch ``number``, this process's share."""
    size = config.per_device_train_batch_size * place.size
    order = epoch_batch(config.seed, number, batch=size, size=len(prepared.ids["train"]))
    rows = rank_share(order, place.rank, place.size).tolist()
    return prepared.batch("train", rows, config.max_length if config.pad_to_max_length else 0)
