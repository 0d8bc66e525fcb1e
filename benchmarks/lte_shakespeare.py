"""How near does LTE come to full training on tinyshakespeare, and what closes the gap? nanoGPT's CPU preset.

    uv run python benchmarks/lte_shakespeare.py choose FOLDER   # one seed, 1,000 steps, 1st half of the validation text
    uv run python benchmarks/lte_shakespeare.py report FOLDER   # three other seeds, 2,000 steps, 2nd half
    uv run python benchmarks/lte_shakespeare.py table           # the README's tables and its picture

FOLDER holds tinyshakespeare as text. nanoGPT's split has one validation text; here its first half chooses and its
second half reports, so that nothing reported was chosen on. Every arm sees the same batches at the same seed. Arms
that the result file holds are not repeated; several processes may share it.
"""

import argparse
import dataclasses
import fcntl
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lte import LTEConfig, Merger, clip_grad_norm_per_head, inject, param_groups
from memtrain_common.data.text.corpus import Corpus, Crops, load_corpus
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.plots import plot_loss
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.loop import FitConfig, Task, fit, mean_loss
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import cosine_with_warmup

RESULT = Path(__file__).parent / "results" / "lte_shakespeare.json"
SCRATCH = Path(tempfile.gettempdir()) / "lte_shakespeare"  # who is at which arm
STEPS = {"choose": 1000, "report": 2000}
WARMUP, BATCH, BLOCK = 100, 12, 64  # nanoGPT's train_shakespeare_char.py with its README's flags for a CPU
EVERY = 250  # steps between evaluations
CHOOSE_SEED, REPORT_SEEDS = 1337, (1, 2, 3)


@dataclass(frozen=True)
class Arm:
    """One way of training; the defaults are the base that each arm changes in one thing."""

    full_lr: float = 0.0
    """Train all parameters at this peak rate; 0 trains heads."""
    heads: int = 4
    rank: int = 64
    scale: float = 4.0
    """α/r."""
    lr: float = 1e-3
    rest_lr: float = 4e-3
    T: int = 1
    outer_momentum: float = 0.0
    outer_lr: float = 1.0
    mode: str = "parallel"
    """sequential: each head sees the whole batch."""
    warm: int = 0
    """Steps of full training at the full arm's best rate before the heads begin; they count among all."""

    def name(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name):g}" if f.type is not str else f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return " ".join(changed) or "base"


CHOOSE = {
    "full": [Arm(full_lr=x) for x in (1e-3, 2e-3, 3e-3, 4e-3, 6e-3)],
    "base": [Arm()],
    "rank": [Arm(rank=r) for r in (16, 32, 128)],
    "heads": [Arm(heads=h) for h in (1, 2, 12)],
    "head rate": [Arm(lr=x) for x in (5e-4, 2e-3)],
    "rest's rate": [Arm(rest_lr=2e-3)],
    "outer rate": [Arm(outer_lr=2.0)],
    "warm start": [Arm(warm=100)],
    "outer momentum": [Arm(outer_momentum=0.5)],
    "scale": [Arm(scale=8.0)],
    "whole batch": [Arm(mode="sequential"), Arm(mode="sequential", scale=8.0)],
    "combined": [Arm(rank=128, outer_lr=2.0)],
    "scale by rank": [Arm(rank=128, scale=2.83)],  # α/√r kept from the base's rank of 64
    "merge interval": [Arm(T=10), Arm(T=10, outer_momentum=0.9, outer_lr=0.7)],
}
REPORT = {
    "full": [Arm(full_lr=4e-3)],  # the best of those tried
    "scale": [Arm(scale=8.0)],  # what came nearest with four heads
    "base": [Arm()],
    "whole batch": [Arm(mode="sequential")],
}


def train(arm: Arm, corpus: Corpus, seed: int, steps: int) -> dict[str, Any]:
    """-> the arm's row: its last loss, its curve, seconds."""
    crops = Crops(corpus, batch_size=BATCH, block_size=BLOCK, seed=seed)
    validation = list(crops.validation(10**6))
    curve: list[tuple[int, float]] = []
    done = 0

    def run(model: torch.nn.Module, groups: list[dict[str, Any]], until: int, **extra: Any) -> None:
        """Go on to step ``until`` of the one schedule and the one sequence of batches."""
        nonlocal done
        first, looked = done, len(curve)

        def evaluate(m: torch.nn.Module) -> dict[str, float]:
            row = mean_loss(m, next_token_loss, validation)
            curve.append((min(first + EVERY * (len(curve) - looked), until), row["loss"]))
            return row

        factor = partial(cosine_with_warmup, warmup_iters=WARMUP, decay_iters=steps, min_ratio=0.1)
        fit(
            Task(
                model,
                lambda i: crops(i + first),
                next_token_loss,
                torch.optim.AdamW(groups, betas=(0.9, 0.99)),
                evaluate=evaluate,
                lr_factor=lambda s: factor(s + first),
            ),
            FitConfig(max_iters=until - first, grad_clip=1.0, eval_interval=EVERY),
            **extra,
        )
        done = until

    seed_all(seed)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=corpus.tokenizer.vocab_size, n_layer=4, n_head=4, n_embd=128))
    began = time.perf_counter()
    full_lr, full_steps = (arm.full_lr, steps) if arm.full_lr else (FULL_LR, arm.warm)
    if full_steps:
        run(model, full_groups(model, full_lr), full_steps)
    if not arm.full_lr:
        inject(model, lte_config(arm))
        groups = param_groups(model, lr=arm.lr, rest_lr=arm.rest_lr, weight_decay=0.1)
        merger = Merger(model, arm.T)
        run(model, groups, steps, after_step=merger.step, clip=partial(clip_grad_norm_per_head, model))
    return {"loss": curve[-1][1], "curve": curve, "seconds": round(time.perf_counter() - began, 1)}


def lte_config(arm: Arm) -> LTEConfig:
    return LTEConfig(
        heads=arm.heads,
        rank=arm.rank,
        alpha=arm.scale * arm.rank,
        outer_momentum=arm.outer_momentum,
        outer_lr=arm.outer_lr,
        mode=arm.mode,  # type: ignore[arg-type]
    )


FULL_LR = 4e-3  # full training's best in "choose"


def full_groups(model: torch.nn.Module, lr: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "lr": lr, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
    ]


@contextmanager
def rows_locked() -> Iterator[list[dict[str, Any]]]:
    """The rows of the result file, written again on leaving, while no other process does."""
    with (SCRATCH / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["arms"] if RESULT.exists() else []
        before = len(rows)
        yield rows
        if len(rows) > before:
            write_results(
                RESULT,
                argv=["python", "benchmarks/lte_shakespeare.py", sys.argv[1], "FOLDER"],
                device=torch.device("cpu"),
                seeds=[CHOOSE_SEED, *REPORT_SEEDS],
                unit="nats per character; choose: first half of the validation text; report: second half",
                arms=rows,
            )


def tables() -> None:
    """Print the README's tables and draw its picture, from the result file."""
    rows = json.loads(RESULT.read_text())["arms"]
    chosen = [r for r in rows if r["part"] == "choose"]
    best = min(r["loss"] for r in chosen if r["group"] == "full")
    print("| tried | change | loss | to full training |\n|---|---|--:|--:|")
    for r in sorted(chosen, key=lambda r: list(CHOOSE).index(r["group"])):
        print(f"| {r['group']} | {r['arm']} | {r['loss']:.3f} | {100 * (r['loss'] / best - 1):+.1f} % |")
    print()
    reported = [r for r in rows if r["part"] == "report"]
    arms = list(dict.fromkeys(r["arm"] for r in reported))
    full = {r["seed"]: r["loss"] for r in reported if r["arm"] == Arm(full_lr=FULL_LR).name()}
    drawn = (
        Arm(full_lr=FULL_LR),
        Arm(mode="sequential"),
        Arm(heads=1),
        Arm(),
        Arm(T=10, outer_momentum=0.9, outer_lr=0.7),
    )
    curves = {
        arm.name(): [{"step": step, "split": "val", "loss": loss} for step, loss in r["curve"] if step]
        for arm in drawn
        for r in chosen
        if r["arm"] == arm.name()
    }
    plot_loss(curves, RESULT.with_suffix(".png"), ylabel="validation loss, nats per character")
    print("| way | loss | lowest and highest seed | to full training, seed by seed |\n|---|--:|---|--:|")
    for arm in arms:
        found = [r for r in reported if r["arm"] == arm]
        losses = [r["loss"] for r in found]
        gaps = [100 * (r["loss"] / full[r["seed"]] - 1) for r in found if r["seed"] in full]
        gap = f"{statistics.mean(gaps):+.1f} % ({min(gaps):+.1f} to {max(gaps):+.1f})"
        print(f"| {arm} | {statistics.mean(losses):.3f} | {min(losses):.3f}, {max(losses):.3f} | {gap} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("choose", "report", "table"))
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--only", default="", help="only groups with this in their name")
    options = parser.parse_args()
    SCRATCH.mkdir(exist_ok=True)
    if options.part == "table":
        tables()
        return
    corpus = load_corpus(options.folder, "chars")
    half = len(corpus.val) // 2
    corpus = dataclasses.replace(corpus, val=corpus.val[:half] if options.part == "choose" else corpus.val[half:])
    plan = [
        (group, arm, seed)
        for group, arms in (CHOOSE if options.part == "choose" else REPORT).items()
        for arm in arms
        for seed in ((CHOOSE_SEED,) if options.part == "choose" else REPORT_SEEDS)
        if options.only in group
    ]
    for group, arm, seed in plan:
        key = {"part": options.part, "group": group, "arm": arm.name(), "seed": seed}
        claim = SCRATCH / f"{options.part}-{group}-{arm.name()}-{seed}".replace(" ", "_")
        with rows_locked() as rows:
            if any(all(r[k] == v for k, v in key.items()) for r in rows) or claim.exists():
                continue
            claim.touch()
        try:
            row = train(arm, corpus, seed, STEPS[options.part])
        finally:
            claim.unlink()
        with rows_locked() as rows:
            rows.append({**key, **row})
        print(f"{group:16} {arm.name():24} {row['loss']:.4f} {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
