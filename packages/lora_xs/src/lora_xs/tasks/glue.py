"""The composition behind ``lora-xs glue``: task, encoder, adapter, the shared loop, the benchmark's metrics."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from memtrain_common.commands.configure import MAY_CHANGE
from memtrain_common.commands.session import open_run
from memtrain_common.console import Console
from memtrain_common.data.order import epoch_batch, rank_share
from memtrain_common.data.text.glue import TASKS
from memtrain_common.data.text.glue_batches import Prepared, evaluation, model_loss, prepare_glue
from memtrain_common.errors import UserError
from memtrain_common.models.encoders import load_classifier, load_tokenizer
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import World, launch
from memtrain_common.training.loop import FitConfig
from memtrain_common.training.rng import seed_all
from torch import Tensor, nn

from ..adapter_file import describe_adapter, load_adapter
from ..config import LoRAXSConfig
from ..injection import inject
from .glue_flags import PROG, GlueConfig
from .models import write_task
from .schedules import schedule, warmup_steps
from .training import Job, save, summary, train

DEFAULT_RANK = 16


def prepare(config: GlueConfig) -> Prepared:
    """Read and tokenise the task."""
    return prepare_glue(
        config.task,
        config.data_dir,
        load_tokenizer(config.model),
        max_length=config.max_length,
        max_train_samples=config.max_train_samples,
        max_eval_samples=config.max_eval_samples,
    )


def run_glue(config: GlueConfig, argv: Sequence[str], prepared: Prepared | None = None) -> dict[str, float]:
    """Everything that ``lora-xs glue`` does for one run; -> the task's metrics at its end."""
    world, device = launch(config.device)
    if device.type == "cpu" and config.dtype == "bfloat16":
        avoid_broken_amx()
    if config.batch_size % world.size:
        raise UserError(f"--batch-size {config.batch_size} must be divisible by the {world.size} processes")
    prepared = prepared or prepare(config)
    seed_all(config.seed)
    model = adapted_model(config, prepared.tokenizer).to(device)
    run, config = open_run(
        config, argv, prog=PROG, world=world, device=device, data={"name": config.task, "sha256": prepared.sha256}
    )
    console = Console(run.path / "log.txt" if world.is_main else None, quiet=not world.is_main)
    n = {split: len(rows) for split, rows in prepared.ids.items()}
    console.say(f"{run.path}: {config.task}, {n['train']:,} training rows, {n['dev']:,} development rows")
    seed_all(config.seed + world.rank)  # dropout differs between processes; the weights above must not
    job = make_job(config, prepared, model, world)
    result = train(job, run, console, device, resume=bool(config.resume))
    scores = result.evaluation
    if job.keep == "best" and job.evaluate is not None:
        model.eval()
        with torch.no_grad():
            scores = job.evaluate(model)
    if world.is_main:
        _finish(config, model, run, console, result, scores)
    return {name: scores[name] for name in TASKS[config.task].metrics}


def adapted_model(config: GlueConfig, tokenizer: Any) -> nn.Module:
    """The encoder with R and a fresh head."""
    model, head = load_classifier(config.model, TASKS[config.task].num_labels, pad_id=tokenizer.pad_token_id)
    if config.from_adapter:
        info = describe_adapter(config.from_adapter)
        if config.rank not in (0, info.config.rank):
            raise UserError(
                f"--rank {config.rank} is not the rank of {config.from_adapter}, which is {info.config.rank}: leave "
                "the flag out"
            )
        return load_adapter(model, config.from_adapter, head=False)
    rank = config.rank or DEFAULT_RANK
    xs = LoRAXSConfig(rank, config.alpha, config.targets, init=config.init, seed=config.seed, head=head)
    return inject(model, xs)


def make_job(config: GlueConfig, prepared: Prepared, model: nn.Module, world: World) -> Job:
    """Batches, loss, schedule and evaluation of the task, for a model whatever is trained of it."""
    rows = len(prepared.ids["train"])
    per_epoch = math.ceil(rows / config.batch_size)
    steps = max(1, math.ceil(config.epochs * rows / config.batch_size))

    def batches(i: int) -> dict[str, Tensor]:
        order = epoch_batch(config.seed, i, batch=config.batch_size, size=rows)
        return prepared.batch("train", rank_share(order, world.rank, world.size).tolist())

    def evaluate(m: nn.Module) -> dict[str, float]:
        return evaluation(config.task, prepared, m, config.batch_size)

    best = TASKS[config.task].metrics[0]
    return Job(
        model=model,
        batches=batches,
        loss=model_loss,
        learning_rate=config.learning_rate,
        head_learning_rate=config.head_learning_rate,
        weight_decay=config.weight_decay,
        lr_factor=schedule("linear", warmup_steps(config.warmup_ratio, steps), steps),
        fit=FitConfig(
            max_iters=steps,
            grad_clip=config.grad_clip,
            dtype=config.dtype,
            eval_interval=config.eval_interval or per_epoch,
            log_interval=config.log_interval,
            best_metric=best,
            higher_is_better=True,
            units_per_step=config.batch_size,
            tracker=config.tracker,
        ),
        evaluate=evaluate,
        identity={
            **{k: v for k, v in asdict(config).items() if k not in MAY_CHANGE and not k.startswith("grid")},
            "data_sha256": prepared.sha256,
        },
        keep=config.keep,
        label=config.task,
    )


def _finish(
    config: GlueConfig, model: nn.Module, run: RunFolder, console: Console, result: Any, scores: dict[str, float]
) -> None:
    folder = run.path / "adapter"
    sizes = save(model, folder)
    source = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
    write_task(folder, command="glue", task=config.task, model=source, num_labels=TASKS[config.task].num_labels)
    metrics = {name: scores[name] for name in TASKS[config.task].metrics}
    (run.path / "result.json").write_text(json.dumps({"task": config.task, **metrics}, indent=2) + "\n")
    lines = [(name, f"{100 * value:.2f}") for name, value in metrics.items()]
    main = TASKS[config.task].metrics[0]
    if result.best is not None and config.keep == "last":
        lines.append((f"best {main} (step {result.best[0]})", f"{100 * result.best[1]:.2f}"))
    console.say()
    console.say(f"{config.task}, development rows, in hundredths")
    console.say(summary(model, result, run, sizes, lines))
