"""Does fine-tuning by Back Razor end where dense fine-tuning ends? On real pictures, several seeds.

    MEMTRAIN_DATA=FOLDER python benchmarks/backrazor_accuracy.py resnet20 breastmnist vit

resnet20: CIFAR-10's ResNet-20 with its published weights (FOLDER/weights/resnet_cifar10), tuned to CIFAR-10 as JPEG
    files (FOLDER/cifar10), which it knows badly before: lossy pictures.
breastmnist: the same weights, with a new head, tuned to BreastMNIST (FOLDER/medmnist/breastmnist.npz).
vit: a small ViT pretrained here on CIFAR-10's classes 0 to 4, moved to classes 5 to 9.

The learning rate is chosen densely, by validation accuracy with a seed of its own, and is then the same for all arms;
the test split is looked at once, after the last step of each run. Writes results/backrazor_accuracy_STUDY.json, and
takes the learning rates that such a file holds already. The files that end in _pruned.json are of the time when
``pruned`` was the default mode.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from backrazor.tasks.train import Trained, make_model, train_one
from backrazor.tasks.train_flags import TrainConfig
from memtrain_common.commands.cli import run_command
from memtrain_common.commands.session import Session
from memtrain_common.data.images.batches import evaluation_batches
from memtrain_common.data.images.image_set import ImageSet
from memtrain_common.data.images.sets import load_images
from memtrain_common.data.order import stratified
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.models.classifiers import logits_of
from real_data import data

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
TUNING_SEED = 100
KEEPS = (0.1, 0.05)
MARGIN = 0.5  # points of accuracy


@dataclass(frozen=True)
class Study:
    """A model, pictures, and what is the same for all arms."""

    about: str
    pictures: ImageSet
    config: TrainConfig
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    auc: bool = False


def part(pictures: ImageSet, split: str, n: int) -> ImageSet:
    """The set with about n of a split's pictures, every class evenly."""
    found = pictures.splits[split]
    some = found.take(stratified(found.labels, len(found) // n, seed=1) == 0)
    return replace(pictures, splits={**pictures.splits, split: some})


def classes_of(pictures: ImageSet, first: int, last: int) -> ImageSet:
    """The set with the classes first to last alone, numbered from 0."""
    splits = {}
    for name, split in pictures.splits.items():
        some = split.take((split.labels >= first) & (split.labels <= last))
        splits[name] = replace(some, labels=some.labels - first)
    return replace(pictures, classes=pictures.classes[first : last + 1], splits=splits)


def cifar10(data: Path) -> ImageSet:
    return load_images("cifar10", str(data / "cifar10"))


def resnet_weights(data: Path) -> str:
    return str(next((data / "weights" / "resnet_cifar10").glob("resnet20*.th")))


BASE = TrainConfig(mode="full", grad_clip=1.0, eval_interval=10**9, eval_batch_size=250, tracker="none")


def resnet20(data: Path) -> Study:
    pictures = part(part(cifar10(data), "train", 4000), "val", 2000)
    config = replace(BASE, data="cifar10", model="resnet20", weights=resnet_weights(data), epochs=3.0, batch_size=50,
                     warmup_iters=20, augment="flip-shift")  # fmt: skip
    about = "ResNet-20 with CIFAR-10's weights, tuned to CIFAR-10 as JPEG files: about 4,000 to train"
    return Study(about, pictures, config, (0.003, 0.01, 0.03), (0, 1, 2, 3, 4))


def breastmnist(data: Path) -> Study:
    pictures = load_images("breastmnist", str(data / "medmnist"))
    config = replace(BASE, data="breastmnist", model="resnet20", weights=resnet_weights(data), image_size=28,
                     epochs=10.0, batch_size=32, warmup_iters=20, augment="flip-shift")  # fmt: skip
    return Study("ResNet-20 with CIFAR-10's weights, tuned to BreastMNIST (28 pixels)", pictures, config,
                 (0.003, 0.01, 0.03), (0, 1, 2, 3, 4), auc=True)  # fmt: skip


def vit(data: Path) -> Study:
    everything = cifar10(data)
    config = replace(BASE, data="cifar10", model="vit-mini", image_size=32, patch_size=4, optim="adam", batch_size=50,
                     warmup_iters=100, augment="flip-shift")  # fmt: skip
    before = part(classes_of(everything, 0, 4), "val", 1000)
    pretraining = replace(config, epochs=8.0, learning_rate=1e-3, seed=TUNING_SEED)
    trained = train_one(Session.alone(pretraining), before)
    say(f"pretrained on classes 0 to 4: test {trained.test}")
    folder = Path(tempfile.mkdtemp(prefix="vit-"))
    trained.outcome.model.save_pretrained(folder)  # type: ignore[operator]
    after = part(part(classes_of(everything, 5, 9), "train", 5000), "val", 1000)
    about = (
        "ViT, 96 wide, 4 blocks, patches of 4 in 32 pixels, pretrained densely on CIFAR-10's classes 0 to 4 for 8 "
        f"epochs (test accuracy there {100 * trained.test['accuracy']:.1f} %), moved to about 5,000 of classes 5-9"
    )
    moved = replace(config, weights=str(folder), patch_size=0, epochs=4.0, optim="sgd", warmup_iters=20)
    return Study(about, after, moved, (0.01, 0.03, 0.1), (0, 1, 2, 3, 4))


STUDIES: dict[str, Callable[[Path], Study]] = {"resnet20": resnet20, "breastmnist": breastmnist, "vit": vit}


def say(text: str) -> None:
    print(text, flush=True)


def choose(study: Study) -> dict[float, float]:
    """Validation accuracy of dense fine-tuning by learning rate."""
    found = {}
    for rate in study.learning_rates:
        config = replace(study.config, learning_rate=rate, seed=TUNING_SEED)
        trained = train_one(Session.alone(config), study.pictures)
        found[rate] = trained.outcome.result.evaluation["accuracy"]
        say(f"learning rate {rate}: validation accuracy {found[rate]:.4f}")
    return found


def area(study: Study, trained: Trained) -> float:
    """Area under the ROC curve on the test split."""
    from sklearn.metrics import roc_auc_score

    made = make_model(study.config, study.pictures)
    split = study.pictures.splits["test"]
    batches = evaluation_batches(
        split, made.image_size, recipe=study.config.augment, normalize=made.normalize, batch=250
    )
    with torch.no_grad():
        scores = [logits_of(trained.outcome.model, x).softmax(-1)[:, 1] for x, _ in batches]
    return float(roc_auc_score(split.labels, torch.cat(scores).numpy()))


def arm(study: Study, name: str, config: TrainConfig) -> dict[str, Any]:
    """One way of saving activations, every seed."""
    found: dict[str, Any] = {"test_accuracy": [], "test_loss": [], "val_accuracy": [], "seconds": []}
    for seed in study.seeds:
        trained = train_one(Session.alone(replace(config, seed=seed)), study.pictures)
        found["test_accuracy"].append(round(100 * trained.test["accuracy"], 3))
        found["test_loss"].append(round(trained.test["loss"], 5))
        found["val_accuracy"].append(round(100 * trained.outcome.result.evaluation["accuracy"], 3))
        found["seconds"].append(round(trained.outcome.result.seconds, 1))
        if study.auc:
            found.setdefault("test_AUC", []).append(round(area(study, trained), 4))
        assert trained.outcome.result.ledger is not None
        found["activation_bytes"] = trained.outcome.result.ledger.total("activations")
        say(f"{name}, seed {seed}: { ({k: v[-1] if isinstance(v, list) else v for k, v in found.items()}) }")
    return found


def summary(found: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Mean and half a 95 % interval over seeds, and of the difference from the dense run of the same seed."""
    out: dict[str, Any] = {"activations_times_less": round(dense["activation_bytes"] / found["activation_bytes"], 2)}
    for key in ("test_accuracy", "test_AUC"):
        if key in found:
            differences = [a - b for a, b in zip(found[key], dense[key], strict=True)]
            for name, values in ((key, found[key]), (f"{key}_less_dense", differences)):
                mean, ci = mean_and_ci(values)
                out[name] = {"mean": round(mean, 4), "ci95": round(ci, 4)}
    return out


def run(name: str, data: Path) -> None:
    """One study, from its learning rate to its file."""
    study = STUDIES[name](data)
    say(f"{name}: {study.about}")
    untuned = None
    if name == "resnet20":
        nothing = replace(study.config, learning_rate=1e-12, max_iters=1)
        untuned = 100 * train_one(Session.alone(nothing), study.pictures).test["accuracy"]
    path = RESULTS / f"backrazor_accuracy_{name}.json"
    before = json.loads(path.read_text())["learning_rate_chosen_by_validation"] if path.exists() else {}
    rates = {float(rate): accuracy for rate, accuracy in before.items()} or choose(study)
    rate = max(rates, key=lambda r: rates[r])
    config = replace(study.config, learning_rate=rate)
    configs = {"dense": config}
    configs |= {f"keep {keep:g}": replace(config, mode="backrazor", keep=keep) for keep in KEEPS}
    arms = {label: arm(study, label, one) for label, one in configs.items()}
    results = {label: summary(found, arms["dense"]) for label, found in arms.items()}
    write_results(
        path,
        argv=["python", "benchmarks/backrazor_accuracy.py", name],
        device=CPU,
        seeds=study.seeds,
        about=study.about,
        data={**study.pictures.describe(), "classes": list(study.pictures.classes)},
        training={**dataclasses.asdict(config), "weights": Path(config.weights).name},
        learning_rate_chosen_by_validation=rates,
        untuned_test_accuracy=untuned,
        results=results,
        within_margin={label: found["test_accuracy_less_dense"]["mean"] >= -MARGIN for label, found in results.items()},
        margin_points=MARGIN,
        arms=arms,
    )
    say(f"{name}: {results}")


def main(argv: Sequence[str]) -> None:
    names = argv or list(STUDIES)
    if unknown := [name for name in names if name not in STUDIES]:
        raise UserError(f"no study {unknown[0]!r}: choose among {', '.join(STUDIES)}")
    folder = data()
    torch.set_num_threads(1)
    for name in names:
        run(name, folder)


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/backrazor_accuracy.py"))
