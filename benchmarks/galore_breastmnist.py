"""Does GaLore reach AdamW's AUC on BreastMNIST with a fraction of its optimizer state?

    MEMTRAIN_DATA=FOLDER python benchmarks/galore_breastmnist.py

FOLDER/medmnist/breastmnist.npz is the official file. A small ViT is trained from scratch; each optimizer's learning
rate is the one of its grid with the best mean validation AUC over the seeds, and only then is the test set looked at.
Writes benchmarks/results/galore_breastmnist.json.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from galore_vit.tasks.flags import Optim, TrainConfig
from galore_vit.tasks.models import describe
from galore_vit.tasks.train import Trial, train_one
from memtrain_common.commands.cli import run_command
from memtrain_common.commands.session import Session
from memtrain_common.data.images.image_set import ImageSet
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.runs.run_folder import RunFolder
from real_data import data

SEEDS = (0, 1, 2)
CONFIG = TrainConfig(data="breastmnist", epochs=40, galore_rank=16, gap=50, galore_scale=1.0, batch_size=64)
GRIDS: dict[Optim, tuple[float, ...]] = {
    "adamw": (3e-4, 1e-3, 3e-3),
    "galore-adamw": (1e-3, 3e-3, 1e-2),
}
# AUC, ACC as published: ResNets by MedMNIST v2 (Yang et al., 2023, Table 3), from scratch; ViT-B/16 by the
# MedMNIST+ benchmark (Doerrich et al.), ImageNet weights at 224 pixels, trained whole and as a linear probe.
PUBLISHED = {
    "ResNet-18, 28 px": (0.901, 0.863),
    "ResNet-50, 28 px": (0.857, 0.812),
    "ResNet-18, 224 px": (0.891, 0.833),
    "ResNet-50, 224 px": (0.866, 0.842),
    "ViT-B/16, ImageNet weights, 224 px": (0.862, 0.838),
    "ViT-B/16, ImageNet weights, linear probe": (0.912, 0.844),
}


def arm(images: ImageSet, optim: Optim, lr: float) -> dict[str, Any]:
    """One learning rate of one optimizer, every seed."""
    config = replace(CONFIG, optim=optim, lr=lr)
    found: dict[str, Any] = {"lr": lr, "val_AUC": [], "test_AUC": [], "test_ACC": [], "test_ECE": []}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder.create(Path(folder) / "run")
            done = train_one(Session.alone(config, run=run), Trial(seed, None), images)
        found["val_AUC"].append(round(done.val.auc, 4))
        for key, value in done.test.numbers.items():
            found[f"test_{key}"].append(round(value, 4))
        assert done.outcome.result.ledger is not None
        found["optimizer_bytes"] = done.outcome.result.ledger.total("optimizer")
    print(optim, found, flush=True)
    return found


def best(arms: list[dict[str, Any]]) -> dict[str, Any]:
    """The arm with the best mean validation AUC, its test numbers as mean and half a 95 % interval."""
    chosen = max(arms, key=lambda a: mean_and_ci(a["val_AUC"])[0])
    out = {"lr": chosen["lr"], "optimizer_bytes": chosen["optimizer_bytes"]}
    for key in ("val_AUC", "test_AUC", "test_ACC", "test_ECE"):
        mean, ci = mean_and_ci(chosen[key])
        out[key] = {"mean": round(mean, 4), "ci95": round(ci, 4)}
    return out


def main(argv: Sequence[str]) -> None:
    if argv:
        raise UserError("this takes no arguments")
    torch.set_num_threads(1)
    images = load_images("breastmnist", str(data() / "medmnist"))
    write(images, {optim: [arm(images, optim, lr) for lr in lrs] for optim, lrs in GRIDS.items()})


def write(images: ImageSet, arms: dict[Optim, list[dict[str, Any]]]) -> None:
    """The committed JSON."""
    write_results(
        Path(__file__).parent / "results" / "galore_breastmnist.json",
        argv=["python", "benchmarks/galore_breastmnist.py"],
        device=torch.device("cpu"),
        seeds=SEEDS,
        model="ViT, 96 wide, 4 blocks, patches of 7 in 28 pixels, from scratch; no augmentation, no weight decay",
        training={k: getattr(CONFIG, k) for k in ("epochs", "batch_size", "rank", "gap", "scale", "schedule")},
        data=describe(images),
        results={optim: best(found) for optim, found in arms.items()},
        arms=arms,
        published={name: {"AUC": a, "ACC": c} for name, (a, c) in PUBLISHED.items()},
    )


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/galore_breastmnist.py"))
