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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from memtrain_common.measuring.intervals import mean_and_ci

from ..compose.axes import Axes, read_settings
from .config import PlanConfig

FILE = Path(__file__).with_name("known_results.json")
COMBINATION = re.compile(
    r"(?P<train>[a-z-]+?)(-rank(?P<rank>\d+))?(-lte-rest(?P<lte_rest>[a-z]+))?\+(?P<save>[a-z]+)(-keep(?P<keep>[\d.]+))?"
    r"\+(?P<optim>[a-z0-9-]+?)(-galore-rank(?P<galore_rank>\d+))?"
)
"""A combination as ablate names it: lora-rank8+backrazor-keep0.1+adamw."""


@dataclass(frozen=True)
class Known:
    """A combination's score in a study."""

    train: str
    save: str
    optim: str
    settings: dict[str, Any]
    """Those that the three choices read, as the study had them."""
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
    """1 where the quartiles of the measured pairs hold it: nobody is to be called faster by what is no difference."""
    study: str
    source: str


@dataclass(frozen=True)
class Timing:
    """A step's measured time over that of full training with everything saved, all else equal."""

    train: str
    save: str
    optim: str
    """Empty where the comparison had another optimizer, the same on both sides."""
    settings: dict[str, Any]
    """Those that these choices read, as they were timed."""
    task: str
    """pictures, text or language."""
    factor: float
    study: str
    source: str


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


ASKED = {f.name for f in fields(PlanConfig)} & {f.name for f in fields(Axes)}
"""Settings that plan has flags for."""
RANKS = ("rank", "galore_rank")
"""Settings of which the nearest will do for a score; table.py says which one that is."""


def differing(settings: dict[str, Any], axes: Axes) -> dict[str, Any]:
    """What was measured otherwise than it is planned."""
    return {n: value for n, value in settings.items() if value != getattr(axes, n)}


def timing_of(axes: Axes, task: str, timings: list[Timing]) -> Timing | None:
    """The first measurement of a combination for a task, with the very settings that are planned."""
    mine = (t for t in timings if (t.train, t.save, t.task) == (axes.train, axes.save, task))
    mine = (t for t in mine if t.optim == axes.optim or (not t.optim and axes.optim in ("adamw", "sgd")))
    return next((t for t in mine if not differing(t.settings, axes)), None)


def scores_of(axes: Axes, scores: list[Known], task: str = "") -> list[Known]:
    """What is known of a combination with the settings that are planned, one a study; of several ranks the nearest.
    Real pretrained models for the same kind of task come first, and those for another are left out. Some checkpointed
    blocks end where all do."""
    must = ASKED - {*RANKS, "checkpoint_blocks"}
    named = [k for k in scores if (k.train, k.save, k.optim) == (axes.train, axes.save, axes.optim)]
    mine = [k for k in named if k.task in ("", task) and not must & differing(k.settings, axes).keys()]
    mine.sort(key=lambda k: sum(abs(k.settings[n] - getattr(axes, n)) for n in RANKS if n in k.settings))
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
                axes.train, axes.save, axes.optim, read_settings(axes), arm["metric"], round(mean, 4),
                round(half, 4), round(same, 4), f"{arm['about']}, {len(arm['runs'])} seeds",
                f"real_{name}.json", task,
            )  # fmt: skip


def _ablation(results: Path) -> Iterator[Known]:
    content = _read(results / "ablation_digits.json")
    study = f"ablate without arguments: a small ViT from digits 0-4 to 5-9, {len(content['seeds'])} seeds"
    plain = next(arm["mean"] for arm in content["arms"] if arm["combination"] == "full+all+adamw")
    for arm in content["arms"]:
        axes = _named(arm["combination"], content)
        yield Known(
            axes.train, axes.save, axes.optim, read_settings(axes), "test accuracy", arm["mean"], arm["ci95"], plain,
            study, "ablation_digits.json",
        )  # fmt: skip


def _named(combination: str, content: dict[str, Any]) -> Axes:
    """A combination of ablate with its settings; what the name does not say had its default. Results that do not say
    Back Razor's mode are of pruned, which was the only one."""
    name = COMBINATION.fullmatch(combination)
    assert name is not None, combination
    said: dict[str, Any] = {n: name[n] for n in ("train", "save", "optim")}
    said |= {n: type(getattr(Axes, n))(name[n]) for n in ("rank", "keep", "galore_rank", "lte_rest") if name[n]}
    return Axes(**said, razor_mode=content.get("razor_mode", "pruned"))


def _razor(results: Path) -> Iterator[Known]:
    for source in (f"backrazor_accuracy_{study}.json" for study in ("resnet20", "breastmnist", "vit")):
        content = _read(results / source)
        study = f"{content['about']}, {len(content['seeds'])} seeds"
        found, training = content["results"], content["training"]
        settings = {n: training[n] for n in ("keep", "razor_mode", "recompute")}
        dense = Axes(optim=training["optim"], **settings)
        for arm, axes in (("dense", dense), ("keep 0.1", replace(dense, save="backrazor"))):
            accuracy = found[arm]["test_accuracy"]
            yield Known(
                axes.train, axes.save, axes.optim, read_settings(axes), "test accuracy, %", accuracy["mean"],
                accuracy["ci95"], found["dense"]["test_accuracy"]["mean"], f"{study}; Back Razor keeps 0.1", source,
            )  # fmt: skip


def _breastmnist(results: Path) -> Iterator[Known]:
    content = _read(results / "galore_breastmnist.json")
    study = f"ViT of 4 blocks from scratch on BreastMNIST, {len(content['seeds'])} seeds"
    found = content["results"]
    for optim, numbers in found.items():
        auc = numbers["test_AUC"]
        plain = found["adamw"]["test_AUC"]["mean"]
        had = content["training"]
        axes = Axes(optim=optim, galore_rank=had["rank"], gap=had["gap"], galore_scale=had["scale"])
        yield Known(
            axes.train, axes.save, axes.optim, read_settings(axes), "test AUC", auc["mean"], auc["ci95"], plain, study,
            "galore_breastmnist.json",
        )  # fmt: skip


def _digits(results: Path) -> Iterator[Known]:
    content = _read(results / "lora_xs_demo.json")
    study = f"small ViT from digits 0-4 to 5-9, {len(content['seeds'])} seeds"
    plain = next(statistics.fmean(a["accuracy"]) for a in content["arms"] if a["name"] == "full")
    for arm in content["arms"]:
        word, _, rank = arm["name"].partition(" r=")
        train: Any = {"head alone": "head", "LoRA-XS": "lora-xs", "LoRA": "lora", "full": "full"}[word]
        r = int(rank or 8)
        axes = Axes(train, rank=r, alpha=2.0 * r if train == "lora" else 0.0)  # the demo's LoRA has α = 2r
        mean, half = mean_and_ci(arm["accuracy"])
        yield Known(
            axes.train, axes.save, axes.optim, read_settings(axes), "accuracy", round(mean, 4), round(half, 4),
            round(plain, 4), study, "lora_xs_demo.json",
        )  # fmt: skip


def _stdlib(results: Path) -> Iterator[Known]:
    content = _read(results / "lte_default_run.json")
    study = f"byte-level GPT pre-trained on Python's standard library, {len(content['seeds'])} seeds"
    plain = statistics.fmean(run["full"] for run in content["runs"])
    mean, half = mean_and_ci([run["lte"] for run in content["runs"]])
    had = content["config"]
    axes = Axes(
        "lte", rank=had["lora_r"], alpha=had["lora_alpha"], heads=had["lte_heads"], merge_steps=had["lte_merge_steps"],
        lte_rest="trained",
    )  # fmt: skip
    yield Known(
        axes.train, axes.save, axes.optim, read_settings(axes), "loss, nats per byte", round(mean, 4), round(half, 4),
        round(plain, 4), study, "lte_default_run.json",
    )  # fmt: skip


def _overheads(results: Path) -> Iterator[Overhead]:
    found = _read(results / "galore_train.json")["result"]
    over = found["time_over_adamw"]
    study = (
        f"{found['model']}, rank {found['rank']}, {over['pairs']} pairs on a CPU, median {over['median']:.3f}, "
        f"quartiles {over['low']:.3f} to {over['high']:.3f}"
    )
    factor = 1.0 if over["low"] <= 1 <= over["high"] else round(over["median"], 3)
    yield Overhead("galore-adamw", factor, study, "galore_train.json")


def _step_timings(results: Path) -> Iterator[Timing]:
    content = _read(results / "backrazor_step.json")
    tasks = {"vit-b-16": "pictures", "bert-base": "text", "gpt2": "language"}
    for run in content["runs"]:
        razor = Axes(save="backrazor", keep=run["keep"], razor_mode=content.get("mode", "pruned"))
        others = replace(razor, save="checkpoint")
        for axes, name in ((razor, "razor_over_dense"), (others, "checkpoint_over_dense")):
            study = f"{run['model']}, {run['batch']}, {run[name]['pairs']} pairs on a CPU"
            yield Timing(
                axes.train, axes.save, "", read_settings(axes), tasks[run["model"]], round(run[name]["median"], 3),
                study, "backrazor_step.json",
            )  # fmt: skip


def _arm_timings(results: Path) -> Iterator[Timing]:
    content = _read(results / "ablation_digits.json")
    plain = next(a["seconds"] for a in content["arms"] if a["combination"] == "full+all+adamw")
    study = "whole runs of a ViT of 451,013 parameters, two at a time on a CPU"
    for arm in content["arms"]:
        axes = _named(arm["combination"], content)
        yield Timing(
            axes.train, axes.save, axes.optim, read_settings(axes), "pictures", round(arm["seconds"] / plain, 3), study,
            "ablation_digits.json",
        )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    FILE.write_text(json.dumps(collect(Path(sys.argv[1])), indent=1, ensure_ascii=False) + "\n")
