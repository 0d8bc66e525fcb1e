"""Bases from the gradient: how much of it they hold, and what making them costs beside a training step.

    MEMTRAIN_DATA=FOLDER python benchmarks/lora_xs_gradient.py

MiniLM-L6 with CoLA, batches of 32. 1. The share of ‖G‖² that B Bᵀ G Aᵀ A keeps, over all adapted weights together, for
bases of the SVD, random ones and those from the gradient of 1, 8 or 32 batches; G is the gradient of the batches that
the bases were made from, or of 8 others. "best" is the best subspace of that G itself.
2. Bytes at the peak and CPU seconds of ``inject`` beside those of a training step of LoRA-XS and of everything.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lora_xs
import torch
from lora_xs.layer import layers
from memtrain_apps.compose.families import matrices
from memtrain_common.commands.cli import run_command
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.prediction import LiveBytes
from real_tasks import RealTask, task
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "lora_xs_gradient.json"
RANKS = (4, 8, 16)
BATCHES = (1, 8, 32)
OTHERS = 8
REPEATS = 5


def config(model: nn.Module, rank: int, init: str) -> lora_xs.LoRAXSConfig:
    return lora_xs.LoRAXSConfig(
        rank, targets=tuple(matrices(model, "all")), init=init, head=("classifier",)  # type: ignore[arg-type]
    )  # fmt: skip


def first(of: RealTask, model: nn.Module, n: int, seed: int = 0) -> Callable[[], Iterator[Tensor]]:
    batches = [batch for batch, _ in zip(of.train(seed), range(n), strict=False)]
    return lambda: (of.loss(model, batch) for batch in batches)


def gradients(of: RealTask, plain: nn.Module, n: int, seed: int) -> dict[str, Tensor]:
    model = copy.deepcopy(plain).eval()  # without dropout, which is no part of the question
    for loss in first(of, model, n, seed)():
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def held(model: nn.Module, grads: dict[str, Tensor]) -> dict[str, float]:
    """The share of all gradients' energy in the bases, and in the best subspaces of the same rank."""
    total = inside = best = 0.0
    for _, layer in layers(model):
        G = grads[f"{layer.name}.weight"]
        B, A = torch.linalg.qr(layer.B).Q, torch.linalg.qr(layer.A.t()).Q
        total += float(G.pow(2).sum())
        inside += float((B.t() @ G @ A).pow(2).sum())
        best += float(torch.linalg.svdvals(G)[: layer.rank].pow(2).sum())
    return {"share": round(inside / total, 5), "best": round(best / total, 5)}


def shares(of: RealTask, plain: nn.Module) -> list[dict[str, Any]]:
    seen = {n: gradients(of, plain, n, 0) for n in BATCHES}
    others = gradients(of, plain, OTHERS, 1)
    rows = []
    for rank in RANKS:
        for init, n in (("svd", 0), ("random", 0), *(("gradient", n) for n in BATCHES)):
            model = copy.deepcopy(plain).eval()
            losses = first(of, model, n) if n else None
            lora_xs.inject(model, config(model, rank, init), losses=losses, cache=False)
            row: dict[str, Any] = {"rank": rank, "init": init, "batches": n, "of_other_batches": held(model, others)}
            if n:
                row["of_its_own_batches"] = held(model, seen[n])
            rows.append(row)
            print(row, flush=True)
    return rows


def step(of: RealTask, model: nn.Module, batch: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    of.loss(model, batch).backward()
    optimizer.step()


def measured(call: Callable[[], None]) -> tuple[int, float]:
    """The most bytes that live of what a call makes, and its CPU seconds without that count."""
    with LiveBytes() as live:
        call()
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return live.peak_bytes, statistics.median(seconds)


def costs(of: RealTask, plain: nn.Module, rank: int = 16, n: int = 8) -> dict[str, Any]:
    batch = next(of.train(0))

    def init() -> None:
        model = copy.deepcopy(plain).train()
        lora_xs.inject(model, config(model, rank, "gradient"), losses=first(of, model, n))

    def adapter_step() -> None:
        step(of, adapted, batch)
        adapted.zero_grad()

    def full_step() -> None:
        step(of, whole, batch)
        whole.zero_grad()

    def copying() -> None:
        copy.deepcopy(plain).train()

    whole, adapted = copy.deepcopy(plain).train(), copy.deepcopy(plain).train()
    lora_xs.inject(adapted, config(adapted, rank, "svd"))
    ways = {"init": init, "copy": copying, "step": adapter_step, "full_step": full_step}
    found = {name: measured(call) for name, call in ways.items()}
    model_bytes = sum(p.nbytes for p in plain.parameters())
    return {
        "rank": rank,
        "batches": n,
        "peak_bytes_of_init": found["init"][0] - model_bytes,
        "peak_bytes_of_a_step": found["step"][0],
        "peak_bytes_of_a_step_of_everything": found["full_step"][0],
        "cpu_seconds_of_init_over_a_step": round((found["init"][1] - found["copy"][1]) / found["step"][1], 2),
        "cpu_seconds_of_a_step_of_everything_over_a_step": round(found["full_step"][1] / found["step"][1], 2),
    }


def main(argv: Sequence[str]) -> None:
    if argv:
        raise UserError("this takes no arguments")
    torch.set_num_threads(1)
    of = task("minilm-cola")
    torch.manual_seed(0)
    plain = of.build()
    cost = costs(of, plain)
    print(cost, flush=True)
    write_results(
        RESULTS, argv=["python", "benchmarks/lora_xs_gradient.py"], device=torch.device("cpu"), seeds=[0, 1],
        about=of.about, costs=cost, shares_of_the_gradient=shares(of, plain),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/lora_xs_gradient.py"))
