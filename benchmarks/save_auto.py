"""Is ``--save auto`` the best choice that fits? Against every one of the 256 choices of blocks of 8-block models.

    python benchmarks/save_auto.py          # exact choices: checkpointed blocks
    python benchmarks/save_auto.py razor    # below the least of them: Back Razor or checkpointed

Each choice's peak is the whole step's, predicted; its time is the operations of a step, with those that run again. With
24 of the distinct peaks as budgets, least and most included, what ``--budget`` chooses is compared with the best
of all choices that fit: the fastest; and below the least exact peak the one with the smallest part of the blocks'
operations under Back Razor.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from memtrain_apps.compose.axes import Axes
from memtrain_apps.compose.partial import words_of
from memtrain_apps.run.choosing import Chosen, choose_saving
from memtrain_apps.run.config import PretrainConfig
from memtrain_apps.run.predicting import predict_moments, predict_run
from memtrain_apps.run.text import language_model
from memtrain_apps.run.workload import Workload
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.gpt import next_token_loss
from memtrain_common.training.task import Task
from torch import Tensor, nn
from tqdm import tqdm

CPU = torch.device("cpu")
BLOCKS, BUDGETS = 8, 24


class Mixer(nn.Module):
    """Blocks of different widths and kinds: each saves and costs something else."""

    def __init__(self, widths: tuple[int, ...] = (64, 512, 32, 256, 128, 768, 96, 384)) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 48)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Linear(48, w), nn.GELU() if i % 2 else nn.ReLU(), nn.Linear(w, 48))
            for i, w in enumerate(widths)
        )
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x.mean(1))
        return out


def workloads() -> dict[str, tuple[PretrainConfig, Workload]]:
    torch.manual_seed(0)
    gpt = PretrainConfig(n_layer=BLOCKS, n_head=2, n_embd=32, block_size=64, batch_size=4)
    tokens = (torch.zeros(4, 64, dtype=torch.long), torch.zeros(4, 64, dtype=torch.long))
    pixels = (torch.zeros(32, 20, 16), torch.zeros(32, dtype=torch.long))
    tasks = {
        "GPT, 8 equal blocks": Task(language_model(gpt, 64), lambda _: tokens, next_token_loss),
        "8 blocks of different widths": Task(
            Mixer(), lambda _: pixels, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
        ),
    }
    return {n: (gpt, Workload(t, lambda *_: {}, "loss", False, 1, 1, {})) for n, t in tasks.items()}


Peaks = dict[tuple[int, ...], int]


def peaks_of(config: PretrainConfig, work: Workload, label: str, axes_of: Callable[[tuple[int, ...]], Axes]) -> Peaks:
    """The predicted peak of every choice of blocks."""
    subsets = [s for size in range(BLOCKS + 1) for s in combinations(range(BLOCKS), size)]
    return {s: predict_run(work, config, axes_of(s), device=CPU).peak_bytes for s in tqdm(subsets, desc=label)}


def spread(found: Iterable[int]) -> list[int]:
    """At most 24 of the distinct peaks, from the least to the most."""
    ordered = sorted(set(found))
    return sorted({ordered[i * (len(ordered) - 1) // (BUDGETS - 1)] for i in range(BUDGETS)})


def checkpointed(blocks: tuple[int, ...]) -> Axes:
    words = "" if len(blocks) == BLOCKS else words_of(blocks)
    return Axes(save="checkpoint", checkpoint_blocks=words) if blocks else Axes()


def razored(blocks: tuple[int, ...]) -> Axes:
    return Axes(save="backrazor", razor_blocks="" if len(blocks) == BLOCKS else words_of(blocks))


def compared(config: PretrainConfig, work: Workload, label: str) -> dict[str, Any]:
    moments = predict_moments(work, config, Axes(), device=CPU)
    costs, forward = moments.blocks, moments.flops
    exact = peaks_of(config, work, f"{label}, checkpointed or not", checkpointed)
    flops = {s: sum(costs[i].flops for i in s) for s in exact}
    slower, above, refused = [], 0, 0
    budgets = spread(exact.values())
    for budget in tqdm(budgets, desc="budgets"):
        best = min(flops[s] for s in exact if exact[s] <= budget)
        chosen = chosen_for(config, work, budget)
        if chosen is None or chosen.axes.save == "backrazor":
            refused += 1  # an exact choice would have fitted
            continue
        above += chosen.predicted.peak_bytes > budget
        slower.append((3 * forward + chosen.flops * forward) / (3 * forward + best) - 1)
    return {
        "choices": len(exact), "distinct_peaks": len(set(exact.values())), "budgets": len(budgets),
        "above_the_budget": above, "no_exact_choice_found": refused,
        "worst_more_time": round(max(slower), 4), "mean_more_time": round(sum(slower) / len(slower), 5),
        "as_fast_as_the_best": sum(s < 1e-9 for s in slower),
    }  # fmt: skip


def approximate(config: PretrainConfig, work: Workload, label: str) -> dict[str, Any]:
    """Of budgets below what checkpointing every block takes, where no exact choice fits."""
    least = predict_run(work, config, checkpointed(tuple(range(BLOCKS))), device=CPU).peak_bytes
    moments = predict_moments(work, config, Axes(), device=CPU)
    mixed = peaks_of(config, work, f"{label}, Back Razor or checkpointed", razored)
    below = spread(p for p in mixed.values() if p < least)
    more, above, refused = [], 0, 0
    for budget in tqdm(below, desc="budgets"):
        best = min(sum(moments.blocks[i].flops for i in s) for s in mixed if mixed[s] <= budget)
        chosen = chosen_for(config, work, budget)
        if chosen is None:
            refused += 1
            continue
        above += chosen.predicted.peak_bytes > budget
        part = 1 - chosen.flops if chosen.axes.razor_blocks else 1.0
        more.append(part - best / moments.flops)
    return {
        "choices": len(mixed), "distinct_peaks_below": len({p for p in mixed.values() if p < least}),
        "budgets": len(below),
        "above_the_budget": above, "none_found": refused, "least_part_found": sum(m < 1e-9 for m in more),
        "worst_more_part": round(max(more), 4), "mean_more_part": round(sum(more) / len(more), 4),
    }  # fmt: skip


def chosen_for(config: PretrainConfig, work: Workload, budget: int) -> Chosen | None:
    try:
        return choose_saving(work, replace(config, budget=f"{budget}B"), CPU)
    except UserError:
        return None


def main() -> None:
    """Writes results/save_auto.json, or results/save_auto_razor.json."""
    razor = sys.argv[1:] == ["razor"]
    ask = approximate if razor else compared
    found = {name: ask(config, work, name) for name, (config, work) in workloads().items()}
    write_results(
        Path(__file__).parent / "results" / ("save_auto_razor.json" if razor else "save_auto.json"),
        argv=["python", "benchmarks/save_auto.py", *sys.argv[1:]], device=CPU, seeds=[0], models=found,
    )  # fmt: skip


if __name__ == "__main__":
    main()
