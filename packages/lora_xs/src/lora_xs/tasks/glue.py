"""The composition behind ``lora-xs glue``: task, encoder, adapter, the shared loop, the benchmark's metrics."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memtrain_common.console import Console
from memtrain_common.data_order import epoch_batch, rank_share
from memtrain_common.distributed import World, launch
from memtrain_common.errors import UserError
from memtrain_common.glue import TASKS, GlueSplit, glue_metrics, load_glue
from memtrain_common.loop import FitConfig
from memtrain_common.processor import avoid_broken_amx
from memtrain_common.rng import seed_all
from memtrain_common.run_folder import RunFolder
from torch import Tensor, nn

from ..adapter_file import describe_adapter, load_adapter
from ..config import LoRAXSConfig
from ..injection import inject
from .configure import MAY_CHANGE
from .glue_flags import PROG, GlueConfig
from .models import load_classifier, load_tokenizer, write_task
from .schedules import schedule, warmup_steps
from .training import Job, open_run, save, summary, train

DEFAULT_RANK = 16


@dataclass(frozen=True)
class Prepared:
    """A task's rows as tokens; made once for all cells of a grid."""

    ids: dict[str, list[dict[str, list[int]]]]
    """What the tokenizer gives for each row (input_ids, token_type_ids where it has them), by split."""
    labels: dict[str, Any]
    tokenizer: Any
    sha256: str
    """Of texts and labels."""

    def batch(self, split: str, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows, padded to the longest of them: every tensor (rows×tokens), labels (rows,)."""
        picked = [self.ids[split][i] for i in rows]
        padded = self.tokenizer.pad(picked, return_tensors="pt")
        return {**padded, "labels": torch.from_numpy(self.labels[split][np.asarray(rows)])}


def prepare(config: GlueConfig) -> Prepared:
    """Read and tokenise the task."""
    data = load_glue(config.task, config.data_dir or None)
    tokenizer = load_tokenizer(config.model)
    sha = hashlib.sha256()
    ids, labels = {}, {}
    for split, rows in data.items():
        rows = _first(rows, config.max_train_samples if split == "train" else config.max_eval_samples)
        sha.update(json.dumps([split, rows.texts, rows.labels.tolist()]).encode())
        columns = [list(column) for column in zip(*rows.texts, strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=config.max_length)
        names = [name for name in encoded if name != "attention_mask"]
        ids[split] = [{name: encoded[name][i] for name in names} for i in range(len(rows))]
        labels[split] = rows.labels
    return Prepared(ids, labels, tokenizer, sha.hexdigest())


def _first(rows: GlueSplit, n: int) -> GlueSplit:
    return GlueSplit(rows.texts[:n], rows.labels[:n]) if n else rows


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


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy, or the squared error of a score: the mean over rows, as the model's class has it."""
    return model(**batch).loss


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
        loss=loss_of,
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


def evaluation(task: str, prepared: Prepared, model: nn.Module, batch_size: int) -> dict[str, float]:
    """The task's metrics and the mean loss over the development rows, in their order."""
    device = next(model.parameters()).device
    outputs: dict[str, Any] = {}
    loss = 0.0
    for split in (s for s in prepared.ids if s != "train"):
        n = len(prepared.ids[split])
        logits = []
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            batch = {k: v.to(device) for k, v in prepared.batch(split, rows).items()}
            out = model(**batch)
            logits.append(out.logits.float().cpu())
            if split == "dev":
                loss += float(out.loss) * len(rows) / n
        outputs[split] = torch.cat(logits).numpy()
    labels = {split: prepared.labels[split] for split in outputs}
    return {**glue_metrics(task, outputs, labels), "loss": loss}


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
