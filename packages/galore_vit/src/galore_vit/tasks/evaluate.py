"""``galore-vit eval``: a run's best checkpoints, or a file of predictions, against the labels."""

from dataclasses import replace
from pathlib import Path

from memtrain_common.commands.configure import saved_config
from memtrain_common.commands.result import read_result
from memtrain_common.console import Console, format_table
from memtrain_common.data.fingerprint import changed_meaning, changed_part
from memtrain_common.data.images.image_set import ImageSet, check_classes
from memtrain_common.data.images.medmnist_results import read_predictions
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError
from memtrain_common.files import check_target_folder, read_json
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.runs import checkpoint
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.distributed import launch
from memtrain_common.training.rng import seed_all
from torch import nn

from .flags import PROG, EvalConfig, TrainConfig
from .models import describe, make_model
from .scoring import Score, predict, score, write_all
from .train import trial_folder, trial_images, trials

HEADING = ("", "AUC", "ACC", "calibration error")


def run_evaluation(config: EvalConfig) -> None:
    """Everything that ``galore-vit eval`` does once its flags are checked."""
    console = Console()
    if config.predictions:
        images = load_images(
            config.data, config.data_dir, size=config.size, fit=True, verify=config.verify, say=console.say
        )
        scores = read_predictions(Path(config.predictions))
        wanted = len(images.classes)
        if not (scores.shape[1] == wanted or (images.task == "binary-class" and scores.shape[1] == 1)):
            raise UserError(
                f"{config.predictions} has {scores.shape[1]} scores a line, and {images.name} has {wanted} classes"
            )
        labels = images.splits[config.split].labels
        console.say(format_table([HEADING, (config.split, *_numbers(score(labels, scores, images.task)))]))
    else:
        _evaluate_run(config, console)


def _evaluate_run(config: EvalConfig, console: Console) -> None:
    run = Path(config.run)
    if config.out:
        check_target_folder("--out", config.out)
    trained = saved_config(TrainConfig, run, f"{PROG} train")
    if config.weights and not trained.weights:
        raise UserError(f"{run} began with random weights: leave --weights out")
    trained = replace(trained, weights=config.weights or trained.weights)
    _, device = launch(config.device)
    place = config.data_dir or trained.data_dir
    images = load_images(trained.data, place, size=trained.size, fit=True, verify=trained.verify, say=console.say)
    _check_images(config, images, console)
    found: list[Score] = []
    rows: list[tuple[str, ...]] = [HEADING]
    for trial in trials(trained):
        folder = trial_folder(run, trained, trial)
        step = _chosen_step(folder)
        if step is None:
            raise UserError(f"{folder} is not finished: go on with {PROG} train --resume {run}")
        own = trial_images(images, trained, trial)
        check_classes(own)
        seed_all(trial.seed)
        made = make_model(trained, own, lambda _: None)
        model = made.model.to(device)
        if step:
            _load(model, folder / "checkpoints" / f"step-{step:08d}")
        scores = predict(model, own.splits[config.split], made, multi_label=own.multi_label)
        out = Path(config.out) / (trial.name if folder != run else "") if config.out else folder
        found.append(write_all(out, own, config.split, scores, trial.name))
        rows.append((trial.name, *_numbers(found[-1])))
    if len(found) > 1:
        pairs = [mean_and_ci([f.numbers[k] for f in found]) for k in ("AUC", "ACC", "ECE")]
        rows.append(("mean ± 95 % CI", *(f"{mean:.3f} ± {ci:.3f}" for mean, ci in pairs)))
    console.say(f"{run}: {images.name}, {config.split}")
    console.say(format_table(rows))
    console.say(f"predictions, confusion matrices and ROC curves in {config.out or run}")


def _check_images(config: EvalConfig, images: ImageSet, console: Console) -> None:
    """Whether the images are those of the run: a folder that grew is cut anew, and then tests what was trained on.

    Raises:
        UserError: if its classes are others, or its images, where that was not asked for.
    """
    run = Path(config.run)
    before = RunFolder.open(run, writes=False).read_config().get("data") or {}
    now = {**describe(images), "parts": images.parts()}
    wrong = changed_part(before, now)
    if wrong is None:
        return
    other = changed_meaning(before, now)
    if other is not None:
        raise UserError(f"{run} was trained on other data: {other}; its outputs mean nothing for these")
    if config.data_changed != "ok":
        raise UserError(
            f"{run} was trained on other data: {wrong}; give it the same files, or evaluate it on these by "
            "--data-changed ok --out FOLDER"
        )
    if not config.out or Path(config.out).resolve() == run.resolve():
        raise UserError(f"--data-changed ok needs --out, another folder than {run}, which keeps its own scores")
    console.say(f"other images than the run's, whose training may have seen some of them: {wrong}")


def _chosen_step(folder: Path) -> int | None:
    """The step whose weights a finished trial tested; older runs keep it in ``best.json``."""
    old = folder / "best.json"
    try:
        found = read_json(old) if old.is_file() else read_result(folder)
        return int(found["step"]) if found else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not say which step is its best ({error!r}): train anew") from None


def _load(model: nn.Module, path: Path) -> None:
    """A checkpoint's weights into the model.

    Raises:
        UserError: if it is damaged.
    """
    wrong = checkpoint.verify(path)
    if wrong is not None:
        raise UserError(f"the checkpoint {path} is damaged ({wrong}): resume the run, or train anew")
    model.load_state_dict(checkpoint.load(path)["model"])


def _numbers(found: Score) -> tuple[str, ...]:
    return tuple(f"{n:.4f}" for n in (found.auc, found.acc, found.ece))
