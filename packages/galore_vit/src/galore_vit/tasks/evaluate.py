"""``galore-vit eval``: a run's best checkpoints, or a file of predictions, against the labels."""

import json
from pathlib import Path

from memtrain_common.console import Console, format_table
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.training.distributed import launch
from memtrain_common.training.rng import seed_all

from ..cli import PROG, saved_config
from .flags import EvalConfig
from .models import check_classes, image_size, make_model
from .scoring import Score, predict, read_predictions, score, write_all
from .train import load_checkpoint, trial_folder, trial_images, trials

HEADING = ("", "AUC", "ACC", "calibration error")


def run_evaluation(config: EvalConfig) -> None:
    """Everything that ``galore-vit eval`` does once its flags are checked."""
    console = Console()
    if config.predictions:
        images = load_images(config.data, config.data_dir, size=config.size, fit=True, verify=config.verify)
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
    trained = saved_config(run)
    _, device = launch(config.device)
    place = config.data_dir or trained.data_dir
    images = load_images(trained.data, place, size=trained.size, fit=True, verify=trained.verify)
    found: list[Score] = []
    rows: list[tuple[str, ...]] = [HEADING]
    for trial in trials(trained):
        folder = trial_folder(run, trained, trial)
        if not (folder / "best.json").is_file():
            raise UserError(f"{folder} is not finished: go on with {PROG} train --resume {run}")
        step = json.loads((folder / "best.json").read_text())["step"]
        own = trial_images(images, trained, trial)
        check_classes(own)
        seed_all(trial.seed)
        model = make_model(trained, own, lambda _: None).to(device)
        if step:
            load_checkpoint(model, folder / "checkpoints" / f"step-{step:08d}")
        scores = predict(model, own.splits[config.split], image_size(trained, own), multi_label=own.multi_label)
        out = Path(config.out) / (trial.name if folder != run else "") if config.out else folder
        found.append(write_all(out, own, config.split, scores, trial.name))
        rows.append((trial.name, *_numbers(found[-1])))
    if len(found) > 1:
        pairs = [mean_and_ci([f.numbers[k] for f in found]) for k in ("AUC", "ACC", "ECE")]
        rows.append(("mean ± 95 % CI", *(f"{mean:.3f} ± {ci:.3f}" for mean, ci in pairs)))
    console.say(f"{run}: {images.name}, {config.split}")
    console.say(format_table(rows))
    console.say(f"predictions, confusion matrices and ROC curves in {config.out or run}")


def _numbers(found: Score) -> tuple[str, ...]:
    return tuple(f"{n:.4f}" for n in (found.auc, found.acc, found.ece))
