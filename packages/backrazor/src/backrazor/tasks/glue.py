"""The composition behind ``backrazor-glue``: task, encoder, what is trained and saved, the shared loop, the metrics."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from memtrain_common.commands.configure import MAY_CHANGE
from memtrain_common.commands.session import open_run
from memtrain_common.commands.summary import run_facts
from memtrain_common.console import Console, format_table
from memtrain_common.data.order import epoch_batch, rank_share
from memtrain_common.data.text.glue import TASKS
from memtrain_common.data.text.glue_batches import Prepared, evaluation, model_loss, prepare_glue
from memtrain_common.files import write_json
from memtrain_common.measuring.memory import Ledger
from memtrain_common.measuring.plots import plot_loss, plot_memory
from memtrain_common.models.encoders import load_classifier, load_tokenizer
from memtrain_common.runs.checkpoint import load as load_checkpoint
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.runs.trackers import check_tracker
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import World, launch, parallelize, unwrap
from memtrain_common.training.loop import FitConfig, FitResult, fit
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import linear_with_warmup
from torch import Tensor, nn

from .glue_flags import PROG, GlueConfig
from .saving import NAMES, dense_activations, saving_of, side_by_side, train_only


def run_glue(config: GlueConfig, argv: Sequence[str]) -> dict[str, float]:
    """Everything that ``backrazor-glue`` does once its flags are checked; -> the task's metrics."""
    place, device = launch(config.device)
    if device.type == "cpu" and config.dtype == "bfloat16":
        avoid_broken_amx()
    check_tracker(config.tracker)
    tokenizer = load_tokenizer(config.model)
    prepared = prepare_glue(
        config.task, config.data_dir, tokenizer, max_length=config.max_seq_length,
        max_train_samples=config.max_train_samples, max_eval_samples=config.max_eval_samples,
    )  # fmt: skip
    seed_all(config.seed)
    model, head = load_classifier(config.model, TASKS[config.task].num_labels, pad_id=tokenizer.pad_token_id)
    train_only(model.to(device), head, config.mode)
    data = {"name": config.task, "sha256": prepared.sha256}
    run, config = open_run(config, argv, prog=PROG, world=place, device=device, data=data)
    console = Console(run.path / "log.txt" if place.is_main else None, quiet=not place.is_main)
    n = {split: len(rows) for split, rows in prepared.ids.items()}
    console.say(f"{run.path}: {config.task}, {n['train']:,} training rows, {n['dev']:,} development rows")
    batches = partial(_batch, config, prepared, place)
    dense = dense_activations(model, model_loss, batches(0), config.dtype)
    seed_all(config.seed + place.rank)  # dropout differs between processes; the weights above must not
    result = _train(config, prepared, model, batches, run, console, device, place)
    metrics = TASKS[config.task].metrics
    scores = result.evaluation
    if config.select == "best" and result.best is not None and 0 < result.best[0] < result.step:
        model.load_state_dict(load_checkpoint(run.checkpoints.path(result.best[0]))["model"])
        model.eval()
        with torch.no_grad():
            scores = evaluation(config.task, prepared, model, config.per_device_eval_batch_size)
        console.say(f"reporting the weights of step {result.best[0]}, the best evaluation on the reported rows")
    found = {name: scores[name] for name in metrics}
    if place.is_main:
        _report(config, run, console, model, result, dense, found)
    return found


def _batch(config: GlueConfig, prepared: Prepared, place: World, number: int) -> dict[str, Tensor]:
    """Micro-batch ``number``, this process's share."""
    size = config.per_device_train_batch_size * place.size
    order = epoch_batch(config.seed, number, batch=size, size=len(prepared.ids["train"]))
    rows = rank_share(order, place.rank, place.size).tolist()
    return prepared.batch("train", rows, config.max_seq_length if config.pad_to_max_length else 0)


def _train(
    config: GlueConfig,
    prepared: Prepared,
    model: nn.Module,
    batches: Any,
    run: RunFolder,
    console: Console,
    device: torch.device,
    place: World,
) -> FitResult:
    per_step = config.per_device_train_batch_size * place.size * config.gradient_accumulation_steps
    rows = len(prepared.ids["train"])
    steps = max(1, math.ceil(config.num_train_epochs * rows / per_step))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    result = fit(
        parallelize(model, "ddp", device),
        batches,
        model_loss,
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate),
        FitConfig(
            max_iters=steps,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            grad_clip=config.max_grad_norm,
            dtype=config.dtype,
            eval_interval=config.eval_steps or math.ceil(rows / per_step),
            log_interval=config.log_interval,
            best_metric=TASKS[config.task].metrics[0],
            higher_is_better=True,
            units_per_step=per_step,
            tracker=config.tracker,
        ),
        evaluate=lambda m: evaluation(config.task, prepared, m, config.per_device_eval_batch_size),
        lr_factor=partial(linear_with_warmup, warmup_iters=math.ceil(config.warmup_ratio * steps), decay_iters=steps),
        saving=saving_of(config),
        run=run,
        resume=bool(config.resume),
        identity={
            **{k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE},
            "data_sha256": prepared.sha256,
        },
        console=console,
        label=config.task,
    )
    if result.ledger is None and (run.path / "memory.json").exists():
        result.ledger = Ledger.read(run.path / "memory.json")  # an earlier process took all the steps
    return result


def _report(
    config: GlueConfig,
    run: RunFolder,
    console: Console,
    model: nn.Module,
    result: FitResult,
    dense: dict[str, int],
    found: dict[str, float],
) -> None:
    """Say what came out, write result.json, and draw it."""
    content: dict[str, Any] = {"task": config.task, "mode": config.mode, **found, "best": result.best}
    content["dense_activation_bytes"] = sum(dense.values())
    rows = [(name, f"{100 * value:.2f}") for name, value in found.items()]
    console.say()
    console.say(f"{config.task}, development rows, in hundredths")
    console.say(format_table(rows))
    if result.ledger is not None:
        content["measured_bytes"] = result.ledger.totals
        console.say(f"memory of a training step, {config.per_device_train_batch_size} rows")
        console.say(side_by_side(config, dense, result.ledger))
        plot_memory(result.ledger, run.path / "memory.png")
    console.say("run")
    console.say(run_facts(unwrap(model), result))
    write_json(run.path / "result.json", content)
    plot_loss({NAMES[config.mode]: run.metrics()}, run.path / "loss.png", ylabel="loss")
    console.say(f"run folder {run.path}")
