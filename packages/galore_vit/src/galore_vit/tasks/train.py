"""The composition behind ``galore-vit train``: images, ViT, what is trained, optimizer, the shared loop, the test."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from memtrain_common.commands.result import Outcome
from memtrain_common.commands.session import Session
from memtrain_common.console import format_bytes, format_table
from memtrain_common.data.images.batches import ImageBatches
from memtrain_common.data.images.image_set import ImageSet, check_classes, fold
from memtrain_common.data.images.sets import load_images
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.models.classifier import Classifier
from memtrain_common.training.distributed import parallelize
from memtrain_common.training.fit_config import FitConfig
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import cosine_with_warmup
from memtrain_common.training.task import Task
from torch import nn

from .flags import MAY_CHANGE, PROG, TrainConfig
from .models import describe, loss_of, make_model
from .optimizers import make_optimizer
from .scoring import Score, mean_loss, predict, score, write_all


@dataclass(frozen=True)
class Trial:
    """One training: a seed, and the fold that validates."""

    seed: int
    fold: int | None

    @property
    def name(self) -> str:
        return f"seed-{self.seed}" + ("" if self.fold is None else f"-fold-{self.fold}")


@dataclass(frozen=True)
class Trained:
    """One finished trial."""

    session: Session
    trial: Trial
    outcome: Outcome
    val: Score
    test: Score
    epoch: float
    """Of the tested weights."""

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        return {"val": self.val.numbers, "test": self.test.numbers}


def trials(config: TrainConfig) -> list[Trial]:
    """Every seed with every fold."""
    folds = list(range(config.folds)) if config.folds else [None]
    return [Trial(seed, k) for seed in range(config.seed, config.seed + config.seeds) for k in folds]


def trial_folder(run: Path, config: TrainConfig, trial: Trial) -> Path:
    """Where a trial's files lie: the run's own folder where it is the only one."""
    return run if len(trials(config)) == 1 else run / trial.name


def trial_images(images: ImageSet, config: TrainConfig, trial: Trial) -> ImageSet:
    """The images with the trial's fold as val. The folds do not depend on the trial's seed."""
    return images if trial.fold is None else fold(images, trial.fold, config.folds)


def run_training(config: TrainConfig, argv: Sequence[str]) -> None:
    """Everything that ``galore-vit train`` does once its flags are checked."""
    session = Session.begin(config, argv, prog=f"{PROG} train")
    left_out: list[str] = []
    images = load_images(
        config.data, config.data_dir, size=config.size, fit=True, verify=config.verify, say=left_out.append
    )
    for trial in trials(config):
        check_classes(trial_images(images, config, trial))
    session.open({**describe(images), "parts": images.parts()})
    config, say = session.config, session.console.say
    counts = ", ".join(f"{len(split)} {name}" for name, split in images.splits.items())
    say(f"{session.folder.path}: {images.name}, {images.size} pixels, {len(images.classes)} classes, {counts} images")
    for line in left_out:
        say(line)
    done = []
    for trial in trials(config):
        own = session
        if len(trials(config)) > 1:
            own = session.beside(trial.name, config, trial=dataclasses.asdict(trial))
            say(f"{trial.name} of {len(trials(config))} runs")
        done.append(train_one(own, trial, trial_images(images, config, trial)))
    report(session, done)


def train_one(session: Session, trial: Trial, images: ImageSet) -> Trained:
    """Train one model, and test the chosen weights."""
    config: TrainConfig = session.config
    place, device = session.place, session.device
    seed_all(trial.seed)
    made = make_model(config, images, session.console.say)
    model = made.model.to(device)
    optimizer = make_optimizer(model, config, session.console.say)
    seed_all(trial.seed + place.rank)  # dropout differs between processes; the weights above must not
    batches = ImageBatches(
        images.splits["train"],
        config.batch_size,
        made.image_size,
        trial.seed,
        recipe=config.augment,
        normalize=made.normalize,
        resize="nearest",
        multi_label=images.multi_label,
        rank=place.rank,
        world_size=place.size,
    )
    per_epoch = steps_per_epoch(config, images)
    steps = config.max_iters or max(1, math.ceil(config.epochs * per_epoch))
    task = Task(
        parallelize(model, "ddp", device),
        batches,
        loss_of(images.multi_label),
        optimizer,
        evaluate=partial(_evaluate, images, made),
        lr_factor=lr_factor(config, steps),
    )
    fit_config = FitConfig(
        max_iters=steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        grad_clip=config.grad_clip,
        dtype=config.dtype,
        compile=config.compile,
        eval_interval=max(1, math.ceil(config.eval_epochs * per_epoch)),
        log_interval=config.log_interval,
        best_metric="AUC",
        higher_is_better=True,
        workers=config.workers,
        units_per_step=config.batch_size * config.gradient_accumulation_steps,
        tracker=config.tracker,
    )
    seen = [list(made.normalize.mean), list(made.normalize.std)]  # of weights that have moved, too
    more = {**dataclasses.asdict(trial), "images_sha256": images.arrays_sha256, "normalize": seen}
    key = session.resume_key(MAY_CHANGE, **more)
    outcome = session.fit(task, fit_config, resume_key=key, label=trial.name, select=config.select)
    found = {}
    for split in ("val", "test"):
        scores = predict(outcome.model, images.splits[split], made, multi_label=images.multi_label)
        if session.run is not None and session.run.writes:
            found[split] = write_all(session.run.path, images, split, scores, trial.name, pictures=split == "test")
        else:
            found[split] = score(images.splits[split].labels, scores, images.task)
    if session.run is not None and session.run.writes and config.train == "melo":
        from ..melo_file import write_melo

        write_melo(outcome.model, session.run.path / "adapter.safetensors")
    return Trained(session, trial, outcome, found["val"], found["test"], outcome.step / per_epoch)


def steps_per_epoch(config: TrainConfig, images: ImageSet) -> int:
    """Optimizer steps in which every training image is seen once."""
    return math.ceil(len(images.splits["train"]) / (config.batch_size * config.gradient_accumulation_steps))


def lr_factor(config: TrainConfig, steps: int) -> Callable[[int], float] | None:
    """step -> factor on the learning rate; None for a constant one."""
    if config.schedule == "constant":
        return None
    if config.schedule == "steps":
        return lambda step: 0.1 ** ((step >= steps / 2) + (step >= 3 * steps / 4))
    return partial(cosine_with_warmup, warmup_iters=steps // 20, decay_iters=max(steps, 1), min_ratio=0.0)


def _evaluate(images: ImageSet, made: Classifier, model: nn.Module) -> dict[str, float]:
    scores = predict(model, images.splits["val"], made, multi_label=images.multi_label)
    labels = images.splits["val"].labels
    found = score(labels, scores, images.task)
    return {"loss": mean_loss(labels, scores, images.multi_label), "AUC": found.auc, "ACC": found.acc}


def report(session: Session, done: list[Trained]) -> None:
    """Say what came out, and write ``result.json``, ``loss.png`` and ``memory.png``."""
    config: TrainConfig = session.config
    first = done[0]
    heading = ("", "val AUC", "test AUC", "test ACC", "calibration error", "epoch")
    rows: list[tuple[str, ...]] = [heading]
    for d in done:
        numbers = (d.val.auc, d.test.auc, d.test.acc, d.test.ece)
        rows.append((d.trial.name, *(f"{n:.3f}" for n in numbers), f"{d.epoch:.0f}"))
    columns = {"val_AUC": [d.val.auc for d in done]}
    columns |= {f"test_{k}": [d.test.numbers[k] for d in done] for k in ("AUC", "ACC", "ECE")}
    summary = {name: mean_and_ci(values) for name, values in columns.items()}
    if len(done) > 1:
        rows.append(("mean ± 95 % CI", *(f"{mean:.3f} ± {ci:.3f}" for mean, ci in summary.values())))
        for d in done:
            d.session.finish(d.outcome, scores=d.scores, own={"trial": dataclasses.asdict(d.trial)}, say=False)
    results = [d.outcome.result for d in done]
    joules = [r.joules for r in results if r.joules is not None]
    ledger = first.outcome.result.ledger
    facts = {"optimizer": f"{format_bytes(ledger.total('optimizer'))} of state"} if ledger is not None else {}
    if len(done) > 1 and len(joules) == len(done):
        facts["energy"] = f"{sum(joules):.0f} J ({results[0].energy_source})"
    which = "best" if config.select == "best" else "last"
    session.finish(
        first.outcome,
        scores=first.scores,
        own={
            "trials": [
                {
                    **dataclasses.asdict(d.trial), "step": d.outcome.step, "val": d.val.numbers, "test": d.test.numbers,
                    "seconds": r.seconds, "joules": r.joules,
                }
                for d, r in zip(done, results, strict=True)
            ],
            "mean": {name: mean for name, (mean, _) in summary.items()},
            "ci95": {name: ci for name, (_, ci) in summary.items()} if len(done) > 1 else None,
        },
        table=f"{config.train}, {config.optim}: the weights of the {which} validation AUC\n{format_table(rows)}"
        if which == "best"
        else f"{config.train}, {config.optim}: the last weights\n{format_table(rows)}",
        facts=facts,
        curves={d.trial.name: d.session.folder for d in done},
    )  # fmt: skip
