"""What does each method do to accuracy on real pretrained models? Paired by seed, resumable, one JSON per arm.

    MEMTRAIN_DATA=FOLDER python benchmarks/real_study.py TASK:ARMS[:SEEDS] …

TASK is one of ``real_tasks.py``; ARMS is a study ("saving", "adapters", "optimizers", …, below) or names of arms with
semicolons between them; SEEDS is how many, 5 if left out. Every finished run is written to results/real/TASK/ARM.json
at once, and is not run again at the same rate; results/real_TASK.json has every arm's mean and its difference from
dense training, paired by seed.

The learning rates of each way of training are chosen on held-out training rows, by a seed of its own, with everything
kept for the backward pass (``real_rates.py``); they are then the same whatever is kept. A fresh head beside something
else that is trained has 1e-3; on MiniLM, beside an adapter, a rate of its own that the same search finds. Rates rise
over 6 steps and fall linearly to 0; gradients are clipped at a norm of 1; weight decay is 0.01.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lora_xs
import torch
from memtrain_apps.compose.adamw8bit import AdamW8bit
from memtrain_apps.compose.axes import Axes
from memtrain_apps.compose.compose import compose
from memtrain_apps.compose.families import head_name
from memtrain_common.commands.cli import run_command
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.measuring.memory import SavedActivations, measure
from memtrain_common.training.task import Task
from real_data import data
from real_rates import FINALISTS, HEAD_RATE, Rates, confirmed, search
from real_tasks import TASKS, RealTask, task

RESULTS = Path(__file__).parent / "results" / "real"
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
WARMUP = 6
RATES: dict[str, tuple[float, ...]] = {
    "head": (1e-3, 3e-3, 1e-2),
    "bitfit": (1e-3, 3e-3),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
    "melo": (5e-4, 1e-3, 3e-3),
    "lora-xs": (1e-2, 3e-2, 1e-1),
    "lte": (5e-4, 1e-3, 3e-3),
    "galore": (3e-5, 1e-4, 2e-4, 5e-4, 1e-3),
}
"""The first grid of each way of training; training everything by AdamW has the task's own."""
ADAPTED = frozenset({"bitfit", "lora", "melo", "lora-xs", "lte"})
"""Ways whose head is trained beside an adapter, at a rate that is searched with the adapter's."""


@dataclass(frozen=True)
class Arm:
    axes: Axes
    way: str
    """The arms that share a learning rate: they differ in what is kept, or in GaLore's rank."""
    grid: str = ""
    """Of ``RATES``; empty: the task's own."""
    narrowed: int = 0
    """LoRA-XS: from the rank of the axes to this one after a third of the steps, which have a third of the rate."""

    def rates(self, of: RealTask) -> tuple[float, ...]:
        return RATES[self.grid] if self.grid else of.rates


def _saving(**settings: Any) -> Arm:
    return Arm(Axes(**settings), "full")


def _xs(way: str, rank: int, **settings: Any) -> Arm:
    return Arm(Axes("lora-xs", rank=rank, **settings), f"lora-xs {way} {rank}", "lora-xs")


SAVING = {
    "dense": _saving(),
    "checkpoint": _saving(save="checkpoint"),
    **{f"low-bit {k:g}": _saving(save="backrazor", keep=k) for k in (0.1, 0.05)},
    **{f"pruned {k:g}": _saving(save="backrazor", keep=k, razor_mode="pruned") for k in (0.06, 0.08, 0.1, 0.12)},
    **{f"paper {k:g}": _saving(save="backrazor", keep=k, razor_mode="paper") for k in (0.2, 0.1, 0.03)},
}
XS_WAYS: dict[str, dict[str, Any]] = {
    "svd": {},
    "random": {"init": "random"},
    "gradient": {"init": "gradient"},
    "gradient-step": {"init": "gradient", "first_step": 1e-4},
}
"""Bases of LoRA-XS, by name; "gradient-step" starts at a step down the gradient."""
ADAPTERS = {
    "head": Arm(Axes("head"), "head", "head"),
    "bitfit": Arm(Axes("bitfit"), "bitfit", "bitfit"),
    "lora 8": Arm(Axes("lora", rank=8), "lora", "lora"),
    "melo 8": Arm(Axes("melo", rank=8), "melo", "melo"),
    "lte 4x8": Arm(Axes("lte", rank=8, heads=4), "lte", "lte"),
    **{f"lora-xs {way} {r}": _xs(way, r, **settings) for r in (4, 8, 16, 25) for way, settings in XS_WAYS.items()},
    **{
        f"lora-xs narrowed {r}": Arm(
            Axes("lora-xs", rank=32, init="gradient"), f"lora-xs narrowed {r}", "lora-xs", narrowed=r
        )
        for r in (4, 8, 16)
    },
    "bitfit, low-bit 0.1": Arm(Axes("bitfit", save="backrazor"), "bitfit", "bitfit"),
    "lora 8, low-bit 0.1": Arm(Axes("lora", rank=8, save="backrazor"), "lora", "lora"),
    **{
        f"lora-xs {way} {r}, low-bit 0.1": _xs(way, r, save="backrazor", **XS_WAYS[way])
        for r in (4, 8, 16, 25)
        for way in ("svd", "random", "gradient")
    },
    "melo 8, low-bit 0.1": Arm(Axes("melo", rank=8, save="backrazor"), "melo", "melo"),
}
OPTIMIZERS = {
    "adamw8bit": Arm(Axes(optim="adamw8bit"), "full"),  # in AdamW's place: with its rate
    **{
        f"{optim} {r}": Arm(Axes(optim=optim, galore_rank=r), optim, "galore")
        for optim in ("galore-adamw", "galore-adamw8bit", "galore-scaled")
        for r in (16, 64, 128)
    },
    "galore-scaled 1": Arm(Axes(optim="galore-scaled", galore_rank=1), "galore-scaled", "galore"),
    "galore-scaled 4": Arm(Axes(optim="galore-scaled", galore_rank=4), "galore-scaled", "galore"),
}
ARMS = {**SAVING, **ADAPTERS, **OPTIMIZERS}
XS_ARMS = tuple(a for a in ADAPTERS if a.startswith("lora-xs"))
STUDIES = {
    "default": ("dense", "low-bit 0.1", "low-bit 0.05"),
    "saving": ("dense", "low-bit 0.1", "low-bit 0.05", "pruned 0.12", "paper 0.2", "paper 0.1", "paper 0.03"),
    "bases": ("dense", "lora 8", *(a for a in XS_ARMS if "," not in a and not a.endswith(" 25"))),
    "adapters": (
        "dense",
        "head",
        "bitfit",
        "lora 8",
        *(a for a in XS_ARMS if "step" not in a and "," not in a),
        *(a for a in ADAPTERS if a.endswith(", low-bit 0.1") and "melo" not in a),
    ),
    "optimizers": ("dense", "adamw8bit", *(a for a in OPTIMIZERS if not a.startswith("galore-adamw8bit"))),
}


def composed(of: RealTask, arm: Arm, seed: int, rates: Rates) -> Task:
    """The pretrained model as the arm trains it; the seed draws the fresh head and the adapters."""
    torch.manual_seed(seed)
    model = of.build().train()
    first = list(of.train(seed))
    if arm.axes.train == "lte":  # equal chunks, one a head: the last rows of a batch are left out
        first = [(x[: len(y) // arm.axes.heads * arm.axes.heads], y[: len(y) // arm.axes.heads * arm.axes.heads])
                 for x, y in first]  # fmt: skip
    plain = Task(model, lambda i: first[i], of.loss)
    head_rate = rates.rate if arm.axes.train == "head" or head_name(model) is None else rates.head
    return compose(plain, arm.axes, lr=rates.rate, head_lr=head_rate, weight_decay=0.01)


def one_run(of: RealTask, arm: Arm, seed: int, rates: Rates, split: str) -> dict[str, float]:
    """The score after the last step, the mean training loss of the last ten, CPU seconds of the training."""
    made = composed(of, arm, seed, rates)
    model, optimizer = made.model, made.needed_optimizer()
    peaks = [group["lr"] for group in optimizer.param_groups]
    after = made.called_after_steps()
    losses = []
    torch.manual_seed(seed)  # the same dropout masks for all arms
    began = time.process_time()
    for step in range(of.steps):
        begun, share = 0, 1.0
        if arm.narrowed:
            wide = of.steps // 3
            begun, share = (0, 1 / 3) if step < wide else (wide, 1.0)
            if step == wide:
                groups = lora_xs.param_groups(lora_xs.narrow(model, arm.narrowed), lr=rates.rate, head_lr=rates.head)
                optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
                peaks = [group["lr"] for group in optimizer.param_groups]
        factor = share * min((step - begun + 1) / WARMUP, (of.steps - step) / (of.steps - WARMUP))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        with made.saving():
            loss = of.loss(model, made.batches(step))
        loss.backward()
        if made.clip is not None:
            made.clip(1.0)
        else:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after()
        losses.append(loss.item())
    seconds = time.process_time() - began
    model.eval()
    with torch.no_grad():
        score = of.score(model, split)
    last = sum(losses[-10:]) / 10
    return {"score": round(score, 5), "last_losses": round(last, 5), "cpu_seconds": round(seconds, 1)}


def cost(of: RealTask, arm: Arm) -> dict[str, int]:
    """Of the first step of seed 0: bytes saved for the backward pass, bytes of optimizer state, numbers trained."""
    made = composed(of, arm, 0, Rates(1e-9))
    with SavedActivations(made.model) as saved, made.saving():
        loss = of.loss(made.model, made.batches(0))
    kept = saved.by_layer()
    loss.backward()
    made.needed_optimizer().step()
    ledger = measure(made.model, made.optimizer, kept)
    found = {
        "saved_bytes": sum(kept.values()),
        "optimizer_bytes": ledger.total("optimizer"),
        "trained_numbers": _trained(made.model),
    }
    if arm.narrowed:
        found["trained_numbers_once_narrowed"] = _trained(lora_xs.narrow(made.model, arm.narrowed))
    return found


def _trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def chosen_rates(name: str, of: RealTask, arm: Arm) -> Rates:
    """The best rates of the arm's way on held-out rows. All that were tried are kept, and not tried again."""
    path = RESULTS / name / f"rates {arm.way}.json".replace(" ", "_")
    before = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, float] = before.get("held_out", {})
    by_more_seeds: dict[str, list[float]] = before.get("held_out_of_further_seeds", {})
    dense = replace(arm, axes=replace(arm.axes, save="all"))
    heads, least = of.head_rates and arm.grid in ADAPTED, of.metric == "nats"

    def score(rates: Rates, further: int = 0) -> float:
        seed = TUNING_SEED + further
        points = one_run(of, dense, seed, rates, "held-out")["score"]
        print(name, arm.way, rates, f"by seed {seed}:", points, flush=True)
        if further:
            by_more_seeds.setdefault(str(rates), []).append(points)
        else:
            found[str(rates)] = points
        parts = {"held_out_of_further_seeds": by_more_seeds} if by_more_seeds else {}
        write_results(
            path, argv=["python", "benchmarks/real_study.py", name], device=torch.device("cpu"),
            seeds=[TUNING_SEED + i for i in range(FINALISTS if parts else 1)], about=of.about, metric=of.metric,
            way=arm.way, axes=asdict(dense.axes), held_out=found, **parts,
        )  # fmt: skip
        return points

    tried = {Rates.read(key): points for key, points in found.items()}
    best = search(arm.rates(of), tried, score, heads, least)
    if not heads:
        return best
    return confirmed(tried, {Rates.read(key): [*scores] for key, scores in by_more_seeds.items()}, score, least)


def arm_path(name: str, arm: str) -> Path:
    return RESULTS / name / (arm.replace(" ", "_") + ".json")


def run(name: str, arms: list[str], seeds: tuple[int, ...] = SEEDS) -> None:
    """All arms of one task, a seed at a time, so that the pairs are whole wherever it is stopped."""
    of = task(name)
    for seed in seeds:
        for label in arms:
            path, arm = arm_path(name, label), ARMS[label]
            before = json.loads(path.read_text()) if path.exists() else {}
            rates = chosen_rates(name, of, arm)
            had = Rates(before["learning_rate"], before.get("head_learning_rate", HEAD_RATE)) if before else None
            runs: dict[str, dict[str, float]] = before["runs"] if had == rates else {}
            if str(seed) in runs:
                continue
            spent = before.get("cost") or cost(of, arm)
            runs[str(seed)] = one_run(of, arm, seed, rates, "test")
            print(name, label, seed, runs[str(seed)], flush=True)
            write_results(
                path, argv=["python", "benchmarks/real_study.py", f"{name}:{label}"], device=torch.device("cpu"),
                seeds=sorted(map(int, runs)), about=of.about, metric=of.metric, arm=label, way=arm.way,
                axes=asdict(arm.axes), **({"narrowed": arm.narrowed} if arm.narrowed else {}),
                **rates.written(), cost=spent, runs=runs,
            )  # fmt: skip
            summarise(name)


def summarise(name: str) -> None:
    """All arms of a task as one table: means with half of a 95 % interval, and differences from dense by seed."""
    found = [json.loads(p.read_text()) for p in sorted((RESULTS / name).glob("*.json"))]
    tried = ("held_out", "held_out_of_further_seeds", "seeds")
    rates = {r["way"]: {key: r[key] for key in tried if key in r} for r in found if "held_out" in r}
    arms = {a["arm"]: a for a in found if "runs" in a}
    dense = arms.get("dense", {"runs": {}, "cost": {"saved_bytes": 0}})
    table = {label: _row(arms[label], dense) for label in ARMS if label in arms}
    write_results(
        RESULTS.parent / f"real_{name}.json", argv=["python", "benchmarks/real_study.py", f"{name}:ARMS"],
        device=torch.device("cpu"), seeds=sorted({int(s) for a in arms.values() for s in a["runs"]}),
        about=next(a["about"] for a in arms.values()), metric=next(a["metric"] for a in arms.values()), arms=table,
        learning_rates=rates,
    )  # fmt: skip


def _row(arm: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    runs, beside = arm["runs"], dense["runs"]
    pairs = [runs[s]["score"] - beside[s]["score"] for s in runs if s in beside]
    mean, ci = mean_and_ci([r["score"] for r in runs.values()])
    row = {"seeds": len(runs), "score": round(mean, 4), "score_ci95": round(ci, 4)}
    if arm["arm"] != "dense" and len(pairs) > 1:
        mean, ci = mean_and_ci(pairs)
        row |= {"less_dense": round(mean, 4), "less_dense_ci95": round(ci, 4)}
    if dense["cost"]["saved_bytes"]:
        row["times_less_saved"] = round(dense["cost"]["saved_bytes"] / arm["cost"]["saved_bytes"], 2)
    seconds = sorted(r["cpu_seconds"] for r in runs.values())[len(runs) // 2]
    rates = {key: arm[key] for key in ("learning_rate", "head_learning_rate") if key in arm}
    return {**row, **arm["cost"], **rates, "cpu_seconds": seconds}


def main(argv: Sequence[str]) -> None:
    data()  # before anything is trained
    torch.set_num_threads(1)
    AdamW8bit.compiled_on_cpu = True  # 60 of its steps on MiniLM take eleven minutes otherwise
    for asked in argv:
        name, chosen, seeds, *_ = [*asked.split(":"), "", ""]
        arms = list(STUDIES.get(chosen, chosen.split(";")))
        unknown = [arm for arm in arms if arm not in ARMS]
        if name not in TASKS or unknown or not (seeds or "5").isdigit():
            raise UserError(
                f"{asked!r} is not TASK:ARMS[:SEEDS]; tasks: {', '.join(TASKS)}; studies: {', '.join(STUDIES)}"
            )
        run(name, arms, tuple(range(int(seeds or len(SEEDS)))))


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/real_study.py"))
