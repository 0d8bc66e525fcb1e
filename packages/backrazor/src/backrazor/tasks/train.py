"""The composition behind ``backrazor-train``: pictures, classifier, what is trained and saved, the loop, the test."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memtrain_common.commands.session import open_run
from memtrain_common.commands.summary import run_facts
from memtrain_common.console import Console, format_table
from memtrain_common.data.images.batches import ImageBatches, evaluation_batches
from memtrain_common.data.images.image_set import ImageSet
from memtrain_common.data.images.sets import fetch, load_images
from memtrain_common.errors import UserError
from memtrain_common.files import write_json
from memtrain_common.measuring.memory import Ledger
from memtrain_common.measuring.plots import plot_loss, plot_memory
from memtrain_common.models.classifiers import Classifier, build_classifier, classification_loss, logits_of, usual_size
from memtrain_common.runs.checkpoint import load as load_checkpoint
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.runs.trackers import check_tracker
from memtrain_common.training.cpu_workarounds import avoid_broken_amx
from memtrain_common.training.distributed import gather_objects, launch, parallelize, unwrap, world
from memtrain_common.training.loop import FitConfig, FitResult, fit
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import cosine_with_warmup, linear_with_warmup
from torch import nn

from .saving import NAMES, dense_activations, fix_statistics, saving_of, side_by_side, train_only
from .train_flags import MAY_CHANGE, PROG, TrainConfig


@dataclass(frozen=True)
class Trained:
    """One trained model with what there is to say of it."""

    model: nn.Module
    """With the weights that were tested."""
    result: FitResult
    dense: dict[str, int]
    """Bytes by layer that a step would save without Back Razor, predicted."""
    test: dict[str, float]


def run_training(config: TrainConfig, argv: Sequence[str]) -> None:
    """Everything that ``backrazor-train`` does once its flags are checked."""
    place, device = launch(config.device)
    if device.type == "cpu" and config.dtype == "bfloat16":
        avoid_broken_amx()
    if config.batch_size % place.size:
        raise UserError(f"--batch-size {config.batch_size} must be divisible by the {place.size} processes")
    check_tracker(config.tracker)
    if config.download:
        if place.is_main:
            fetch(config.data, config.data_dir)
        gather_objects(None)  # the others wait
    left_out: list[str] = []
    pictures = load_images(
        config.data, config.data_dir, size=config.size, validate=config.validate, bad=config.bad_images,
        verify=config.verify, say=left_out.append,
    )  # fmt: skip
    made = make_model(config, pictures)  # before there is a folder: what is wrong with the weights is said first
    data = pictures.describe()
    run, config = open_run(config, argv, prog=PROG, world=place, device=device, data=data)
    console = Console(run.path / "log.txt" if place.is_main else None, quiet=not place.is_main)
    counts = ", ".join(f"{data[split]:,} {split}" for split in ("train", "val", "test") if split in data)
    console.say(f"{run.path}: {pictures.name}, {len(pictures.classes)} classes, pictures: {counts}")
    for line in left_out:
        console.say(line)
    if config.weights:
        console.say(f"weights from {config.weights}; the head is {'theirs' if made.head_kept else 'new'}")
    elif config.mode in ("bitfit", "head"):
        console.say(f"the backbone is random and stays so, since --mode {config.mode} has no --weights to tune")
    arms: dict[str, Trained] = {config.mode: train_one(config, pictures, run, console, device, made=made)}
    if config.compare_dense:
        other = dataclasses.replace(config, mode="full", compare_dense=False)
        folder = run.path / "dense"
        again = bool(config.resume) and (folder / "config.json").exists()
        beside = (RunFolder.open if again else RunFolder.create)(folder, writes=place.is_main)
        if not again:
            beside.write_config(other, prog=PROG, argv=argv, data=data)
        other = dataclasses.replace(other, resume=str(folder) if again else "")
        arms["full"] = train_one(other, pictures, beside, console, device, resume_path=run.path)
    if place.is_main:
        _report(config, run, console, arms)


def image_size(config: TrainConfig, pictures: ImageSet) -> int:
    """Pixels of the model's input: those asked for, those it was made for, or the pictures' own.

    Raises:
        UserError: if none of them is known.
    """
    size = config.image_size or usual_size(config.model, config.weights) or pictures.size
    if not size:
        raise UserError(f"--image-size is missing: the pictures have several sizes, and {config.model} takes any")
    return size


def train_one(
    config: TrainConfig,
    pictures: ImageSet,
    run: RunFolder | None,
    console: Console,
    device: torch.device,
    *,
    made: Classifier | None = None,
    resume_path: Path | None = None,
) -> Trained:
    """Train one model, and test it.

    Args:
        run: where it goes; None keeps no files.
        made: :func:`make_model` of the configuration, if it was made already.
        resume_path: the folder that a stopped user is told to resume, if not the run's own.
    """
    place = world()
    made = made or make_model(config, pictures)
    model = made.model.to(device)
    batches = ImageBatches(
        pictures.splits["train"],
        config.batch_size,
        made.image_size,
        config.seed,
        recipe=config.augment,
        jitter=config.color_jitter,
        normalize=made.normalize,
        multi_label=pictures.multi_label,
        rank=place.rank,
        world_size=place.size,
    )
    loss = partial(classification_loss, label_smoothing=config.label_smoothing)
    dense = dense_activations(model, loss, batches(0), config.dtype)
    seed_all(config.seed + place.rank)  # dropout differs between processes; the weights above must not
    steps = total_steps(config, pictures)
    per_step = config.batch_size * config.gradient_accumulation_steps
    score = partial(evaluate, config, pictures, made)
    result = fit(
        parallelize(model, "ddp", device),
        batches,
        loss,
        make_optimizer(model, made.head, config),
        FitConfig(
            max_iters=steps,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            grad_clip=config.grad_clip,
            dtype=config.dtype,
            eval_interval=config.eval_interval or math.ceil(len(pictures.splits["train"]) / per_step),
            log_interval=config.log_interval,
            best_metric="accuracy",
            higher_is_better=True,
            workers=config.workers,
            units_per_step=per_step,
            unit="samples",
            tracker=config.tracker,
        ),
        evaluate=partial(score, "val") if "val" in pictures.splits else None,
        lr_factor=lr_factor(config, steps),
        saving=saving_of(config),
        run=run,
        resume=bool(config.resume),
        resume_path=resume_path,
        identity=_identity(config, pictures),
        console=console,
        label=config.mode,
    )
    model = unwrap(model)
    if config.select == "best" and run is not None and result.best is not None and result.best[0]:
        model.load_state_dict(load_checkpoint(run.checkpoints.path(result.best[0]))["model"])
        console.say(f"testing the weights of step {result.best[0]}, the best evaluation")
    model.eval()
    with torch.no_grad():
        test = score("test", model)
    if result.ledger is None and run is not None and (run.path / "memory.json").exists():
        result.ledger = Ledger.read(run.path / "memory.json")  # an earlier process took all the steps
    return Trained(model, result, dense, test)


def make_model(config: TrainConfig, pictures: ImageSet) -> Classifier:
    """The model with ``requires_grad`` set on what is trained; its random numbers are the seed's."""
    seed_all(config.seed)
    made = build_classifier(
        config.model,
        len(pictures.classes),
        weights=config.weights,
        image_size=image_size(config, pictures),
        patch_size=config.patch_size,
    )
    train_only(made.model, (made.head,), config.mode, freeze_bn=config.freeze_bn)
    if config.fix_bn_stat:
        fix_statistics(made.model)
    return made


def make_optimizer(model: nn.Module, head: str, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam; the head's learning rate is a multiple of the others'."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith(f"{head}.")].append(parameter)
    rates = {False: config.learning_rate, True: config.learning_rate * config.head_lr_factor}
    params = [{"params": ps, "lr": rates[is_head]} for is_head, ps in groups.items() if ps]
    if config.optim == "adam":
        return torch.optim.Adam(params, weight_decay=config.weight_decay)
    return torch.optim.SGD(params, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)


def total_steps(config: TrainConfig, pictures: ImageSet) -> int:
    """Optimizer steps: those asked for, or those of the epochs."""
    per_step = config.batch_size * config.gradient_accumulation_steps
    return config.max_iters or max(1, math.ceil(config.epochs * len(pictures.splits["train"]) / per_step))


def lr_factor(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """step -> factor on the learning rate."""
    warmup = config.warmup_iters
    if config.schedule == "constant":
        return lambda step: min(1.0, (step + 1) / (warmup + 1))
    if config.schedule == "linear":
        return partial(linear_with_warmup, warmup_iters=warmup, decay_iters=steps)
    return partial(cosine_with_warmup, warmup_iters=warmup, decay_iters=max(steps, warmup + 1), min_ratio=0.0)


def evaluate(
    config: TrainConfig, pictures: ImageSet, made: Classifier, split: str, model: nn.Module
) -> dict[str, float]:
    """Mean loss and accuracy over a split; of a multi-label set the accuracy is the mean over labels."""
    device = next(model.parameters()).device
    batches = evaluation_batches(
        pictures.splits[split],
        made.image_size,
        recipe=config.augment,
        normalize=made.normalize,
        batch=config.eval_batch_size,
        multi_label=pictures.multi_label,
    )
    loss = right = 0.0
    n = len(pictures.splits[split])
    for pixels, labels in batches:
        pixels, labels = pixels.to(device), labels.to(device)
        logits = logits_of(model, pixels).float()
        if pictures.multi_label:
            loss += float(nn.functional.binary_cross_entropy_with_logits(logits, labels)) * len(labels) / n
            right += float(((logits > 0) == (labels > 0)).float().mean()) * len(labels)
        else:
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum")) / n
            right += int((logits.argmax(-1) == labels).sum())
    return {"loss": loss, "accuracy": right / n}


def _identity(config: TrainConfig, pictures: ImageSet) -> dict[str, Any]:
    """What a checkpoint must agree in."""
    free = MAY_CHANGE | {"workers", "download", "bad_images", "compare_dense"}
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    return {**kept, "data_sha256": pictures.sha256}


def _report(config: TrainConfig, run: RunFolder, console: Console, arms: dict[str, Trained]) -> None:
    """Say what came out, write result.json, and draw it."""
    main = arms[config.mode]
    rows: list[Sequence[str]] = [["", "test accuracy", "test loss", "val accuracy", "samples/s"]]
    for mode, arm in arms.items():
        val = arm.result.evaluation.get("accuracy")
        rate = f"{arm.result.units_per_second:.0f}"
        numbers = [f"{100 * arm.test['accuracy']:.2f} %", f"{arm.test['loss']:.4f}"]
        rows.append([NAMES[mode], *numbers, "–" if val is None else f"{100 * val:.2f} %", rate])
    console.say()
    console.say(format_table(rows))
    content: dict[str, Any] = {"mode": config.mode, "test": main.test, "val": main.result.evaluation}
    content |= {"best": main.result.best, "dense_activation_bytes": sum(main.dense.values())}
    if main.result.ledger is not None:
        console.say(f"memory of a training step, {config.batch_size} pictures")
        console.say(side_by_side(config, main.dense, main.result.ledger))
        content["measured_bytes"] = main.result.ledger.totals
        plot_memory(main.result.ledger, run.path / "memory.png")
    if "full" in arms and config.mode != "full":
        content["dense"] = {"test": arms["full"].test, "val": arms["full"].result.evaluation}
    console.say("run")
    console.say(run_facts(main.model, main.result))
    write_json(run.path / "result.json", content)
    curves = {NAMES[config.mode]: run.metrics()}
    if "full" in arms and config.mode != "full":
        curves["dense"] = RunFolder.open(run.path / "dense").metrics()
    plot_loss(curves, run.path / "loss.png", ylabel="loss, nats")
    console.say(f"run folder {run.path}")
