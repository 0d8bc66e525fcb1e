"""The composition behind ``galore-vit train``: images, ViT, what is trained, optimizer, the shared loop, the test."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memtrain_common.console import Console, format_bytes, format_count, format_seconds, format_table
from memtrain_common.data.images.batches import ImageBatches
from memtrain_common.data.images.image_set import ImageSet, fold
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError
from memtrain_common.measuring.environment import device_name
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.measuring.memory import CATEGORIES, Ledger
from memtrain_common.measuring.plots import plot_loss, plot_memory
from memtrain_common.runs import checkpoint
from memtrain_common.runs.run_folder import RunFolder, default_run_path
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import launch, parallelize, unwrap, world
from memtrain_common.training.loop import FitConfig, FitResult, fit
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import cosine_with_warmup
from torch import nn

from ..cli import MAY_CHANGE, PROG
from .flags import TrainConfig
from .models import check_classes, describe, image_size, loss_of, make_model
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

    trial: Trial
    model: nn.Module
    """With the best checkpoint's weights."""
    result: FitResult
    val: Score
    test: Score


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
    place, device = launch(config.device)
    if device.type == "cpu" and config.dtype == "bfloat16":
        avoid_broken_amx()
    if config.batch_size % place.size:
        raise UserError(f"--batch-size {config.batch_size} must be divisible by the {place.size} processes")
    images = load_images(config.data, config.data_dir, size=config.size, fit=True, verify=config.verify)
    for trial in trials(config):
        check_classes(trial_images(images, config, trial))
    if config.resume:
        run = RunFolder.open(Path(config.resume), writes=place.is_main)
        before, now = run.read_config()["data"]["sha256"], images.arrays_sha256
        if before != now:
            raise UserError(
                f"{config.resume} was trained on other images (SHA-256 {before[:12]}…, not {now[:12]}…): "
                "give it the same --data-dir, or begin a new run"
            )
    else:
        path = Path(config.out) if config.out else default_run_path(f"{PROG}-train")
        run = RunFolder.create(path, writes=place.is_main)
    config = dataclasses.replace(config, out=str(run.path))
    about = {"data": describe(images), "device": device_name(device), "processes": place.size}
    run.write_config(config, prog=PROG, argv=argv, **about)
    console = Console(run.path / "log.txt" if place.is_main else None, quiet=not place.is_main)
    counts = ", ".join(f"{len(split)} {name}" for name, split in images.splits.items())
    console.say(f"{run.path}: {images.name}, {images.size} pixels, {len(images.classes)} classes, {counts} images")
    done = []
    for trial in trials(config):
        folder = trial_folder(run.path, config, trial)
        own = run
        if folder != run.path:
            again = config.resume and (folder / "config.json").exists()
            own = (RunFolder.open if again else RunFolder.create)(folder, writes=place.is_main)
            own.write_config(config, prog=PROG, argv=argv, trial=dataclasses.asdict(trial), **about)
            console.say(f"{trial.name} of {len(trials(config))} runs")
        done.append(train_one(config, trial, trial_images(images, config, trial), own, console, device, place.rank))
    if place.is_main:
        report(config, images, run, console, done)


def train_one(
    config: TrainConfig,
    trial: Trial,
    images: ImageSet,
    run: RunFolder,
    console: Console,
    device: torch.device,
    rank: int = 0,
) -> Trained:
    """Train one model, and test the checkpoint with the best validation AUC."""
    make = partial(_make, config, trial, images, device)
    model = make(console.say)
    optimizer = make_optimizer(model, config, console.say)
    seed_all(trial.seed + rank)  # dropout differs between processes; the weights above must not
    wrapped = parallelize(model, "ddp", device)
    batches = ImageBatches(
        images.splits["train"],
        config.batch_size,
        image_size(config, images),
        trial.seed,
        recipe=config.augment,
        resize="nearest",
        multi_label=images.multi_label,
        rank=rank,
        world_size=world().size,
    )
    steps = steps_per_epoch(config, images)
    result = fit(
        wrapped,
        batches,
        loss_of(images.multi_label),
        optimizer,
        FitConfig(
            max_iters=config.epochs * steps,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            grad_clip=config.grad_clip,
            dtype=config.dtype,
            compile=config.compile,
            eval_interval=config.eval_epochs * steps,
            log_interval=config.log_interval,
            best_metric="AUC",
            higher_is_better=True,
            workers=config.workers,
            units_per_step=config.batch_size * config.gradient_accumulation_steps,
            unit="samples",
            tracker=config.tracker,
        ),
        evaluate=partial(_evaluate, images, image_size(config, images)),
        lr_factor=lr_factor(config, config.epochs * steps),
        run=run,
        resume=bool(config.resume),
        identity=_identity(config, trial, images),
        console=console,
        label=trial.name,
    )
    best = make(lambda _: None)  # the weights of step 0, of which there is no checkpoint
    assert result.best is not None
    if result.best[0]:
        load_checkpoint(best, run.checkpoints.path(result.best[0]))
    found = {}
    for split in ("val", "test"):
        scores = predict(best, images.splits[split], image_size(config, images), multi_label=images.multi_label)
        if run.writes:
            found[split] = write_all(run.path, images, split, scores, trial.name, pictures=split == "test")
        else:
            found[split] = score(images.splits[split].labels, scores, images.task)
    if run.writes:
        (run.path / "best.json").write_text(json.dumps({"step": result.best[0], "steps_per_epoch": steps}) + "\n")
        if config.train == "melo":
            from ..melo_file import write_melo

            write_melo(best, run.path / "adapter.safetensors")
    return Trained(trial, unwrap(best), result, found["val"], found["test"])


def _make(
    config: TrainConfig, trial: Trial, images: ImageSet, device: torch.device, say: Callable[[str], None]
) -> nn.Module:
    seed_all(trial.seed)
    return make_model(config, images, say).to(device)


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


def _evaluate(images: ImageSet, size: int, model: nn.Module) -> dict[str, float]:
    scores = predict(model, images.splits["val"], size, multi_label=images.multi_label)
    labels = images.splits["val"].labels
    found = score(labels, scores, images.task)
    return {"loss": mean_loss(labels, scores, images.multi_label), "AUC": found.auc, "ACC": found.acc}


def _identity(config: TrainConfig, trial: Trial, images: ImageSet) -> dict[str, Any]:
    """What a checkpoint must agree in: all that the weights depend on."""
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    return {**kept, **dataclasses.asdict(trial), "images_sha256": images.arrays_sha256}


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """A checkpoint's weights into the model.

    Raises:
        UserError: if it is damaged.
    """
    wrong = checkpoint.verify(path)
    if wrong is not None:
        raise UserError(f"the best checkpoint {path} is damaged: {wrong}; resume the run, or train anew")
    model.load_state_dict(checkpoint.load(path)["model"])


def report(config: TrainConfig, images: ImageSet, run: RunFolder, console: Console, done: list[Trained]) -> None:
    """Say what came out, and write ``result.json``, ``loss.png`` and ``memory.png``."""
    first = done[0]
    folders = [trial_folder(run.path, config, d.trial) for d in done]
    ledger = first.result.ledger or Ledger.read(folders[0] / "memory.json")  # none where nothing was left to train
    console.say()
    console.say(f"{config.train}, {config.optim}: the checkpoints with the best validation AUC")
    heading = ("", "val AUC", "test AUC", "test ACC", "calibration error", "epoch")
    rows: list[tuple[str, ...]] = [heading]
    steps = steps_per_epoch(config, trial_images(images, config, first.trial))
    for d in done:
        assert d.result.best is not None
        numbers = (d.val.auc, d.test.auc, d.test.acc, d.test.ece)
        rows.append((d.trial.name, *(f"{n:.3f}" for n in numbers), f"{d.result.best[0] / steps:.0f}"))
    columns = {"val_AUC": [d.val.auc for d in done]}
    columns |= {f"test_{k}": [d.test.numbers[k] for d in done] for k in ("AUC", "ACC", "ECE")}
    summary = {name: mean_and_ci(values) for name, values in columns.items()}
    if len(done) > 1:
        rows.append(("mean ± 95 % CI", *(f"{mean:.3f} ± {ci:.3f}" for mean, ci in summary.values())))
    console.say(format_table(rows))
    console.say(f"memory of a training step ({format_bytes(sum(ledger.totals.values()))})")
    console.say(format_table([(c, format_bytes(ledger.total(c))) for c in CATEGORIES]))
    console.say("run")
    trained = sum(p.numel() for p in first.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in first.model.parameters())
    peaks = [
        f"{phase} {'unavailable' if n is None else format_bytes(n)}" for phase, n in first.result.peak_bytes.items()
    ]
    joules = [d.result.joules for d in done]
    energy = "unavailable"
    if all(j is not None for j in joules):
        energy = f"{sum(j for j in joules if j is not None):.0f} J ({first.result.energy_source})"
    seconds = sum(d.result.seconds for d in done)
    facts = [
        ("trained", f"{trained:,} of {total:,} parameters"),
        ("optimizer", f"{format_bytes(ledger.total('optimizer'))} of state"),
        ("peak memory", ", ".join(peaks)),
        ("speed", f"{format_count(first.result.units_per_second)} samples/s, {format_seconds(seconds)} of training"),
        ("energy", energy),
    ]
    console.say("\n".join(f"  {name:12} {value}" for name, value in facts))
    content = {
        "trials": [
            {
                **dataclasses.asdict(d.trial),
                "best_step": d.result.best and d.result.best[0],
                "val": d.val.numbers,
                "test": d.test.numbers,
                "seconds": d.result.seconds,
                "joules": d.result.joules,
            }
            for d in done
        ],
        "mean": {name: mean for name, (mean, _) in summary.items()},
        "ci95": {name: ci for name, (_, ci) in summary.items()} if len(done) > 1 else None,
        "optimizer_bytes": ledger.total("optimizer"),
        "trained_parameters": trained,
        "parameters": total,
    }
    (run.path / "result.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_memory(ledger, run.path / "memory.png")
    curves = {d.trial.name: RunFolder.open(f).metrics() for d, f in zip(done, folders, strict=True)}
    plot_loss(curves, run.path / "loss.png", ylabel="loss, nats")
    console.say(f"run folder {run.path}")
