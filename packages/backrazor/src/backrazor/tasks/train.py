"""The composition behind ``backrazor-train``: pictures, classifier, what is trained and saved, the test."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from memtrain_common.commands.result import Outcome
from memtrain_common.commands.session import Session
from memtrain_common.console import format_table
from memtrain_common.data.images.batches import ImageBatches, evaluation_batches
from memtrain_common.data.images.image_set import ImageSet
from memtrain_common.data.images.sets import fetch, load_images
from memtrain_common.errors import UserError
from memtrain_common.measuring.prediction import dense_activations
from memtrain_common.models.classifier import Classifier
from memtrain_common.models.classifiers import (
    build_classifier,
    classification_loss,
    logits_of,
    usual_size,
)
from memtrain_common.models.proxyless import ProxylessMobile, add_lite_residuals
from memtrain_common.training.distributed import gather_objects, parallelize
from memtrain_common.training.fit_config import DTYPES, FitConfig
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import schedule
from memtrain_common.training.task import Task
from torch import nn

from .saving import NAMES, first_and_last, fix_statistics, saving_of, side_by_side, train_only
from .train_flags import FREE, MODELS, PROG, TrainConfig


@dataclass(frozen=True)
class Trained:
    """One trained model with what there is to say of it."""

    session: Session
    outcome: Outcome
    dense: dict[str, int]
    """Bytes by layer that a step would save without Back Razor, predicted."""
    test: dict[str, float]


def run_training(config: TrainConfig, argv: Sequence[str]) -> None:
    """Everything that ``backrazor-train`` does once its flags are checked."""
    session = Session.begin(config, argv, prog=PROG)
    if config.download:
        if session.place.is_main:
            fetch(config.data, config.data_dir)
        gather_objects(None)  # the others wait
    left_out: list[str] = []
    pictures = load_images(
        config.data, config.data_dir, size=config.size, validate=config.validate, bad=config.bad_images,
        verify=config.verify, say=left_out.append,
    )  # fmt: skip
    made = make_model(config, pictures)  # before there is a folder: what is wrong with the weights is said first
    data = pictures.describe()
    session.open({**data, "parts": pictures.parts()})
    counts = ", ".join(f"{data[split]:,} {split}" for split in ("train", "val", "test") if split in data)
    say = session.console.say
    say(f"{session.folder.path}: {pictures.name}, {len(pictures.classes)} classes, pictures: {counts}")
    for line in left_out:
        say(line)
    if config.weights or config.model not in MODELS:
        say(f"weights from {config.weights or config.model}; the head is {'theirs' if made.head_kept else 'new'}")
    elif config.mode in ("bitfit", "head"):
        say(f"the backbone is random and stays so, since --mode {config.mode} has no --weights to tune")
    main = train_one(session, pictures, made)
    dense = None
    if config.compare_dense:
        beside = session.beside("dense", replace(session.config, mode="full", compare_dense=False))
        dense = train_one(beside, pictures)
    _report(main, dense)


def image_size(config: TrainConfig, pictures: ImageSet) -> int:
    """Pixels of the model's input: those asked for, those it was made for, or the pictures' own.

    Raises:
        UserError: if none of them is known.
    """
    size = config.image_size or usual_size(config.model, config.weights) or pictures.size
    if not size:
        raise UserError(f"--image-size is missing: the pictures have several sizes, and {config.model} takes any")
    return size


def train_one(session: Session, pictures: ImageSet, made: Classifier | None = None) -> Trained:
    """Train one model, and test it.

    Args:
        made: :func:`make_model` of the session's configuration, if it was made already.
    """
    config: TrainConfig = session.config
    place, device = session.place, session.device
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
    dense = dense_activations(model, loss, batches(0), DTYPES[config.dtype])
    seed_all(config.seed + place.rank)  # dropout differs between processes; the weights above must not
    rows, per_step = len(pictures.splits["train"]), config.batch_size * config.gradient_accumulation_steps
    steps = config.total_steps(rows, per_step)
    score = partial(evaluate, config, pictures, made)
    task = Task(
        parallelize(model, "ddp", device),
        batches,
        loss,
        make_optimizer(model, made.head, config),
        evaluate=partial(score, "val") if "val" in pictures.splits else None,
        lr_factor=lr_factor(config, steps),
        saving=saving_of(config, first_and_last(model, made.head) if config.dense_first_last else ()),
    )
    fit_config = FitConfig(
        max_iters=steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        grad_clip=config.grad_clip,
        dtype=config.dtype,
        eval_interval=config.eval_interval or math.ceil(rows / per_step),
        log_interval=config.log_interval,
        best_metric="accuracy",
        higher_is_better=True,
        workers=config.workers,
        units_per_step=per_step,
        tracker=config.tracker,
    )
    seen = [list(made.normalize.mean), list(made.normalize.std)]  # of weights that have moved, too
    key = session.resume_key(FREE | {"compare_dense"}, data_sha256=pictures.sha256, normalize=seen)
    outcome = session.fit(task, fit_config, resume_key=key, label=config.mode, select=config.select)
    with session.judging(outcome) as trained:
        test = score("test", trained)
    return Trained(session, outcome, dense, test)


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
    if config.mode.startswith("lite-residual"):
        assert isinstance(made.model, ProxylessMobile)
        add_lite_residuals(made.model)
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


def lr_factor(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """step -> factor on the learning rate."""
    decay = max(steps, config.warmup_iters + 1) if config.schedule == "cosine" else steps
    return schedule(config.schedule, config.warmup_iters, decay)


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


def _report(main: Trained, dense: Trained | None) -> None:
    """Say what came out, write result.json, and draw it."""
    session, config = main.session, main.session.config
    arms = {NAMES[config.mode]: main} | ({"dense": dense} if dense is not None else {})
    rows: list[Sequence[str]] = [["", "test accuracy", "test loss", "val accuracy", "samples/s"]]
    for name, arm in arms.items():
        result = arm.outcome.result
        val = arm.outcome.evaluation.get("accuracy")
        numbers = [f"{100 * arm.test['accuracy']:.2f} %", f"{arm.test['loss']:.4f}"]
        numbers += ["–" if val is None else f"{100 * val:.2f} %", f"{result.units_per_second:.0f}"]
        rows.append([name, *numbers])
    if dense is not None:
        dense.session.finish(dense.outcome, scores=_scores(dense), say=False)
    ledger = main.outcome.result.ledger
    session.finish(
        main.outcome,
        scores=_scores(main),
        own={"mode": config.mode, "dense_activation_bytes": sum(main.dense.values())}
        | ({"dense": _scores(dense)} if dense is not None else {}),
        table=format_table(rows),
        memory=side_by_side(config, main.dense, ledger) if ledger is not None else "",
        curves={name: arm.session.folder for name, arm in arms.items()},
    )


def _scores(arm: Trained) -> dict[str, dict[str, float]]:
    """Of the chosen weights."""
    val = arm.outcome.evaluation
    return {"test": arm.test} | ({"val": val} if val else {})
