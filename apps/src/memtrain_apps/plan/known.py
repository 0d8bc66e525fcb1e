"""What committed results know of a combination's accuracy and time. No torch here.

``known_results.json`` is made from ``benchmarks/results`` (``python -m memtrain_apps.plan.known benchmarks/results``),
so that an installed package has it too; a test holds the two together. Studies differ in model and data: a number is
shown with its study and beside that study's plain arm, and numbers of two studies are not compared.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memtrain_common.measuring.intervals import mean_and_ci

from ..compose.axes import ADAPTERS, Axes, save_words

FILE = Path(__file__).with_name("known_results.json")
COMBINATION = re.compile(
    r"(?P<train>[a-z-]+?)(-rank(?P<rank>\d+))?\+(?P<save>[a-z]+)(-keep[\d.]+)?\+(?P<optim>[a-z0-9-]+?)(-galore-rank\d+)?"
)
"""A combination as ablate names it: lora-rank8+backrazor-keep0.1+adamw."""


@dataclass(frozen=True)
class Known:
    """A combination's score in a study."""

    train: str
    save: str
    optim: str
    rank: int
    """Of adapters; 0 where there are none, or the study's is not known."""
    metric: str
    value: float
    ci95: float
    """Half of the 95 % confidence interval over seeds; 0 where there is one seed."""
    plain: float
    """The same study's score of full training with everything saved, by AdamW; of Back Razor's studies by SGD."""
    study: str
    source: str
    """File of ``benchmarks/results``."""
    task: str = ""
    """Of a real pretrained model: pictures, text or language. Empty of the small models that were made here."""


@dataclass(frozen=True)
class Overhead:
    """How much longer a step took with an optimizer than with AdamW, all else equal."""

    optim: str
    factor: float
    study: str
    source: str


@dataclass(frozen=True)
class Timing:
    """A step's measured time over that of full training with everything saved, all else equal."""

    train: str
    save: str
    optim: str
    """Empty where the comparison had another optimizer, the same on both sides."""
    task: str
    """pictures, text or language."""
    factor: float
    study: str
    source: str
    razor_mode: str = ""
    """Of Back Razor; results that do not say it are of the mode pruned, which was the only one."""


def collect(results: Path) -> dict[str, list[dict[str, Any]]]:
    """What ``known_results.json`` holds, from a folder of committed results."""
    return {
        "scores": [
            asdict(k) for reader in (_real, _ablation, _breastmnist, _digits, _stdlib, _razor) for k in reader(results)
        ],
        "overheads": [asdict(o) for o in _overheads(results)],
        "timings": [asdict(t) for reader in (_step_timings, _arm_timings) for t in reader(results)],
    }


def read() -> tuple[list[Known], list[Overhead], list[Timing]]:
    """The packaged file."""
    content = json.loads(FILE.read_text())
    found: Any = [[kind(**row) for row in content[n]] for n, kind in KINDS.items()]
    return found[0], found[1], found[2]


KINDS: dict[str, type] = {"scores": Known, "overheads": Overhead, "timings": Timing}


def timing_of(axes: Axes, task: str, timings: list[Timing]) -> Timing | None:
    """The first measurement of a combination for a task; none of a choice of some blocks."""
    wanted = (axes.train, save_words(axes), task)
    mine = (t for t in timings if (t.train, t.save, t.task) == wanted and t.optim in ("", axes.optim))
    if axes.save == "backrazor":
        mine = (t for t in mine if t.razor_mode == axes.razor_mode)
    return next((t for t in mine if t.optim or axes.optim in ("adamw", "sgd")), None)


def scores_of(axes: Axes, scores: list[Known], task: str = "") -> list[Known]:
    """What is known of a combination, one a study; of several ranks the nearest. Real pretrained models for the same
    kind of task come first, and those for another are left out. Some checkpointed blocks end where all do."""
    save = axes.save if axes.save == "checkpoint" else save_words(axes)
    mine = [k for k in scores if (k.train, k.save, k.optim) == (axes.train, save, axes.optim) and k.task in ("", task)]
    mine.sort(key=lambda k: abs(k.rank - axes.rank) if k.rank else 0)
    nearest = {k.source: k for k in reversed(mine)}
    return [k for k in scores if nearest.get(k.source) is k]


REAL = {
    "minilm-sst2": "text",
    "minilm-sst2-lengths": "text",
    "minilm-sst2-5000": "text",
    "minilm-sst2-long": "text",
    "minilm-cola": "text",
    "dinov2-cifar10": "pictures",
    "dinov2-cifar10-5000": "pictures",
    "dinov2-cifar10-56": "pictures",
    "dinov2-cifar10-56-long": "pictures",
    "dinov2-breastmnist": "pictures",
    "efficientnet-cifar10": "pictures",
    "stories": "language",
}
"""Studies of real pretrained models -> the kind of their task."""
FEWEST_SEEDS = 3


def _real(results: Path) -> Iterator[Known]:
    """Arms with plan's default settings, but for the rank of adapters."""
    for name, task in REAL.items():
        found = [_read(path) for path in sorted((results / "real" / name).glob("*.json"))]
        arms = [a for a in found if len(a.get("runs", ())) >= FEWEST_SEEDS]
        plain = next(a for a in arms if a["arm"] == "dense")
        for arm in arms:
            axes = Axes(**arm["axes"])
            if axes != Axes(axes.train, axes.save, axes.optim, rank=axes.rank):
                continue
            mean, half = mean_and_ci([r["score"] for r in arm["runs"].values()])
            same = statistics.fmean(plain["runs"][s]["score"] for s in arm["runs"])
            yield Known(
                axes.train, axes.save, axes.optim, axes.rank if axes.train in ADAPTERS else 0, arm["metric"],
                round(mean, 4), round(half, 4), round(same, 4), f"{arm['about']}, {len(arm['runs'])} seeds",
                f"real_{name}.json", task,
            )  # fmt: skip


def _ablation(results: Path) -> Iterator[Known]:
    content = _read(results / "ablation_digits.json")
    study = f"ablate without arguments: a small ViT from digits 0-4 to 5-9, {len(content['seeds'])} seeds"
    plain = next(arm["mean"] for arm in content["arms"] if arm["combination"] == "full+all+adamw")
    for arm in content["arms"]:
        name = COMBINATION.fullmatch(arm["combination"])
        assert name is not None, arm["combination"]
        yield Known(
            name["train"], name["save"], name["optim"], int(name["rank"] or 0), "test accuracy", arm["mean"],
            arm["ci95"], plain, study, "ablation_digits.json",
        )  # fmt: skip


def _razor(results: Path) -> Iterator[Known]:
    for source in (f"backrazor_accuracy_{study}.json" for study in ("resnet20", "breastmnist", "vit")):
        content = _read(results / source)
        study = f"{content['about']}, {len(content['seeds'])} seeds"
        found = content["results"]
        for arm, save in (("dense", "all"), ("keep 0.1", "backrazor")):
            accuracy = found[arm]["test_accuracy"]
            yield Known(
                "full", save, content["training"]["optim"], 0, "test accuracy, %", accuracy["mean"], accuracy["ci95"],
                found["dense"]["test_accuracy"]["mean"], f"{study}; Back Razor keeps 0.1", source,
            )  # fmt: skip


def _breastmnist(results: Path) -> Iterator[Known]:
    content = _read(results / "galore_breastmnist.json")
    study = f"ViT of 4 blocks from scratch on BreastMNIST, {len(content['seeds'])} seeds"
    found = content["results"]
    for optim, numbers in found.items():
        auc = numbers["test_AUC"]
        plain = found["adamw"]["test_AUC"]["mean"]
        yield Known(
            "full", "all", optim, 0, "test AUC", auc["mean"], auc["ci95"], plain, study, "galore_breastmnist.json"
        )


def _digits(results: Path) -> Iterator[Known]:
    content = _read(results / "lora_xs_demo.json")
    study = f"small ViT from digits 0-4 to 5-9, {len(content['seeds'])} seeds"
    plain = next(statistics.fmean(a["accuracy"]) for a in content["arms"] if a["name"] == "full")
    for arm in content["arms"]:
        word, _, rank = arm["name"].partition(" r=")
        train = {"head alone": "head", "LoRA-XS": "lora-xs", "LoRA": "lora", "full": "full"}[word]
        mean, half = mean_and_ci(arm["accuracy"])
        yield Known(
            train, "all", "adamw", int(rank or 0), "accuracy", round(mean, 4), round(half, 4), round(plain, 4), study,
            "lora_xs_demo.json",
        )  # fmt: skip


def _stdlib(results: Path) -> Iterator[Known]:
    content = _read(results / "lte_default_run.json")
    study = f"byte-level GPT pre-trained on Python's standard library, {len(content['seeds'])} seeds"
    plain = statistics.fmean(run["full"] for run in content["runs"])
    mean, half = mean_and_ci([run["lte"] for run in content["runs"]])
    yield Known(
        "lte", "all", "adamw", int(content["config"].get("lora_r", 0)), "loss, nats per byte", round(mean, 4),
        round(half, 4), round(plain, 4), study, "lte_default_run.json",
    )  # fmt: skip


def _overheads(results: Path) -> Iterator[Overhead]:
    found = _read(results / "galore_train.json")["result"]
    study = f"{found['model']}, rank {found['rank']}, {found['time_over_adamw']['pairs']} pairs on a CPU"
    yield Overhead("galore-adamw", round(found["time_over_adamw"]["median"], 3), study, "galore_train.json")


def _step_timings(results: Path) -> Iterator[Timing]:
    content = _read(results / "backrazor_step.json")
    tasks = {"vit-b-16": "pictures", "bert-base": "text", "gpt2": "language"}
    for run in content["runs"]:
        for save, name in (("backrazor", "razor_over_dense"), ("checkpoint", "checkpoint_over_dense")):
            study = f"{run['model']}, {run['batch']}, {run[name]['pairs']} pairs on a CPU"
            mode = content.get("mode", "pruned") if save == "backrazor" else ""
            yield Timing(
                "full", save, "", tasks[run["model"]], round(run[name]["median"], 3), study, "backrazor_step.json", mode
            )


def _arm_timings(results: Path) -> Iterator[Timing]:
    content = _read(results / "ablation_digits.json")
    plain = next(a["seconds"] for a in content["arms"] if a["combination"] == "full+all+adamw")
    study = "whole runs of a ViT of 451,013 parameters, two at a time on a CPU"
    for arm in content["arms"]:
        name = COMBINATION.fullmatch(arm["combination"])
        assert name is not None, arm["combination"]
        factor = round(arm["seconds"] / plain, 3)
        mode = content.get("razor_mode", "pruned") if name["save"] == "backrazor" else ""
        yield Timing(
            name["train"], name["save"], name["optim"], "pictures", factor, study, "ablation_digits.json", mode
        )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    FILE.write_text(json.dumps(collect(Path(sys.argv[1])), indent=1, ensure_ascii=False) + "\n")
