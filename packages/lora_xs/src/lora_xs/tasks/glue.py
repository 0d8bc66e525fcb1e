"""The composition behind ``lora-xs glue``: task, encoder, adapter, the shared loop, the benchmark's metrics."""

import math
from collections.abc import Sequence

from memtrain_common.commands.configure import MAY_CHANGE
from memtrain_common.commands.session import Session
from memtrain_common.data.order import epoch_batch, rank_share
from memtrain_common.data.text.glue import TASKS
from memtrain_common.data.text.glue_batches import Prepared, evaluation, model_loss, prepare_glue
from memtrain_common.models.encoders import check_length, load_classifier, load_tokenizer, model_parts
from memtrain_common.training.distributed import World
from memtrain_common.training.fit_config import FitConfig
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import schedule
from memtrain_common.training.task import Task
from torch import Tensor, nn

from .glue_flags import PROG, GlueConfig
from .models import start_from
from .training import adapt, configured, finish, train

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


def run_glue(config: GlueConfig, argv: Sequence[str]) -> dict[str, float]:
    """Everything that ``lora-xs glue`` does for one run; -> the task's metrics at its end."""
    session = Session.begin(config, argv, prog=PROG)
    prepared = prepare(config)
    model = adapted_model(session, prepared)  # before there is a folder: what is wrong with it is said first
    parts = {**prepared.parts, **model_parts(config.model)}
    session.open({"name": config.task, "sha256": prepared.sha256, "parts": parts})
    return train_glue(session, prepared, model)


def train_glue(session: Session, prepared: Prepared, model: nn.Module | None = None) -> dict[str, float]:
    """One run in an open session; -> the task's metrics at its end.

    Args:
        model: :func:`adapted_model` of the session's configuration, if it was made already.
    """
    config: GlueConfig = session.config
    model = (model or adapted_model(session, prepared)).to(session.device)
    n = {split: len(rows) for split, rows in prepared.ids.items()}
    session.console.say(
        f"{session.folder.path}: {config.task}, {n['train']:,} training rows, {n['dev']:,} development rows"
    )
    seed_all(config.seed + session.place.rank)  # dropout differs between processes; the weights above must not
    task, fit_config = plain_task(config, prepared, model, session.place)
    grid = {name for name in vars(config) if name.startswith("grid")}
    key = session.resume_key(MAY_CHANGE | grid, data_sha256=prepared.sha256)
    rates = (config.learning_rate, config.head_learning_rate)
    outcome = train(session, task, fit_config, rates=rates, key=key, label=config.task)
    scores = outcome.result.evaluation
    if outcome.step != outcome.result.step and task.evaluate is not None:
        with session.judging(outcome) as chosen:
            scores = task.evaluate(chosen)
    metrics = {name: scores[name] for name in TASKS[config.task].metrics}
    lines = [(name, f"{100 * value:.2f}") for name, value in metrics.items()]
    best = outcome.result.best
    if best is not None and config.select == "last":
        lines.append((f"best {TASKS[config.task].metrics[0]} (step {best[0]})", f"{100 * best[1]:.2f}"))
    finish(
        session,
        outcome,
        scores={"dev": metrics},
        lines=lines,
        about={"command": "glue", "task": config.task, "num_labels": TASKS[config.task].num_labels},
        title=f"{config.task}, development rows, in hundredths",
    )
    return metrics


def adapted_model(session: Session, prepared: Prepared) -> nn.Module:
    """The encoder with R and a fresh head; its random numbers are the seed's."""
    config: GlueConfig = session.config
    seed_all(config.seed)
    pad_id = prepared.tokenizer.pad_token_id
    model, head = load_classifier(config.model, TASKS[config.task].num_labels, pad_id=pad_id)
    if long := check_length(model, config.model, prepared.longest, config.max_length):
        session.console.say(long)
    if config.from_adapter:
        return start_from(model, config.from_adapter, head, config.rank)
    rank = config.rank or DEFAULT_RANK
    xs = configured(config, rank, config.alpha, head)
    task, _ = plain_task(config, prepared, model.to(session.device), session.place)
    return adapt(task, xs, config.init_batches, session.console)


def warmup_steps(ratio: float, steps: int, rounding: str = "down") -> int:
    """Rounded down as in the official GLUE script, where transformers' Trainer (and `instruct`) rounds up."""
    return int(ratio * steps) if rounding == "down" else math.ceil(ratio * steps)


def plain_task(config: GlueConfig, prepared: Prepared, model: nn.Module, world: World) -> tuple[Task, FitConfig]:
    """Batches, loss, schedule and evaluation of the task, for a model whatever is trained of it; no optimizer yet."""
    rows = len(prepared.ids["train"])
    steps = config.total_steps(rows, config.batch_size * config.gradient_accumulation_steps)

    def batches(i: int) -> dict[str, Tensor]:
        order = epoch_batch(config.seed, i, batch=config.batch_size, size=rows)
        return prepared.batch("train", rank_share(order, world.rank, world.size).tolist())

    def evaluate(m: nn.Module) -> dict[str, float]:
        return evaluation(config.task, prepared, m, config.batch_size)

    factor = schedule("linear", warmup_steps(config.warmup_ratio, steps, config.warmup_rounding), steps)
    per_step = config.batch_size * config.gradient_accumulation_steps
    fit_config = FitConfig(
        max_iters=steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        grad_clip=config.grad_clip,
        dtype=config.dtype,
        eval_interval=config.eval_interval or math.ceil(rows / per_step),
        log_interval=config.log_interval,
        best_metric=TASKS[config.task].metrics[0],
        higher_is_better=True,
        units_per_step=per_step,
        tracker=config.tracker,
    )
    return Task(model, batches, model_loss, evaluate=evaluate, lr_factor=factor), fit_config
