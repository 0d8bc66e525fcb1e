"""How fast are GaLore's refresh, its optimizer step and a whole training step, and how large is its state?

    python benchmarks/galore_step.py refresh step train state

Each named part writes benchmarks/results/galore_<part>.json. Times are taken in one process, the compared
ones in turn, and reported as the median of the pairwise ratios with its quartiles. OMP_NUM_THREADS sets the
threads.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from galore_vit import GaLoreAdamW, GaLoreAdamW8bit, param_groups, state_bytes
from galore_vit.basis import captured_energy, exact_bases, iterated_bases
from galore_vit.projection import Layout
from galore_vit.settings import Refresh
from galore_vit.state_size import adamw_state_bytes_formula
from torch import Tensor, nn

SEED, RANK, GAP = 0, 64, 50
SIZES = {"Ti": (192, 3, 12), "S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24), "H": (1280, 16, 32)}
RESULTS = Path(__file__).parent / "results"


def vit(name: str, labels: int = 10) -> nn.Module:
    """A ViT for 224-pixel images, patches of 16 (14 for H), with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    width, heads, depth = SIZES[name]
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
            intermediate_size=4 * width, patch_size=14 if name == "H" else 16,
            num_labels=labels,  # type: ignore[call-arg]
        )
    )  # fmt: skip


def digits(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as (count, 3, 224, 224) in [−1, 1], with their classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x[start : start + count], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return nn.functional.interpolate(images, 224, mode="bilinear").repeat(1, 3, 1, 1), torch.tensor(
        y[start : start + count]
    )


def seconds(f: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3), "pairs": len(ratios)}


def refresh() -> dict[str, Any]:
    """A 2304×768 gradient (q, k, v of a ViT-B block): exact SVD against the iteration at r = 64."""
    model = vit("B")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    gradients = []
    for step in range(3):  # two steps apart the gradient of other images: what a warm start meets
        x, y = digits(16, 16 * step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).logits, y).backward()
        optimizer.step()
        attention = {n: p.grad for n, p in model.named_parameters() if ".6." in n and p.grad is not None}
        qkv = [g for n, g in attention.items() if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
        gradients.append(torch.cat(qkv).clone())
    layout = Layout(1, 2304, 768, RANK, left=False, right=True)
    G, before = gradients[2], exact_bases(gradients[0], layout)
    r = Refresh()
    first = dict(iterations=r.iterations + 1, oversample=r.oversample, seed=SEED)
    later = dict(iterations=r.iterations, oversample=r.oversample, seed=SEED)
    runs = {
        "svd": lambda: exact_bases(G, layout),
        "first": lambda: iterated_bases(G, layout, None, **first),
        "later": lambda: iterated_bases(G, layout, before, **later),
    }
    for f in runs.values():
        f()
    times = [{k: seconds(f) for k, f in runs.items()} for _ in range(15)]
    best = captured_energy(G, runs["svd"]())
    out: dict[str, Any] = {
        "shape": [2304, 768],
        "rank": RANK,
        "svd_ms": round(1e3 * statistics.median(t["svd"] for t in times), 2),
    }
    for k in ("first", "later"):
        out[k] = {
            "ms": round(1e3 * statistics.median(t[k] for t in times), 2),
            "times_faster_than_svd": spread([t["svd"] / t[k] for t in times]),
            "energy_of_optimum": round(float(captured_energy(G, runs[k]()) / best), 5),
        }
    out["stale_basis_energy_of_optimum"] = round(float(captured_energy(G, before) / best), 5)
    return out


def step() -> dict[str, Any]:
    """ViT-S, r = 64: a step averaged over a gap of 50, ours, the published package's, torch's AdamW."""
    import galore_torch

    model = vit("S")
    x, y = digits(8)
    nn.functional.cross_entropy(model(x).logits, y).backward()
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    for m in models[1:]:
        for p, q in zip(m.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizers: dict[str, torch.optim.Optimizer] = {
            "ours": GaLoreAdamW(param_groups(models[0], RANK, GAP), lr=1e-4),
            "galore_torch": galore_torch.GaLoreAdamW(param_groups(models[1], RANK, GAP), lr=1e-4),
            "adamw": torch.optim.AdamW(models[2].parameters(), lr=1e-4),
        }
    for o in optimizers.values():
        for _ in range(GAP):  # the first gap pays for the state
            o.step()
    gaps = [{k: [seconds(o.step) for _ in range(GAP)] for k, o in optimizers.items()} for _ in range(4)]
    mean = [{k: statistics.mean(v) for k, v in g.items()} for g in gaps]
    return {
        "model": "ViT-S", "rank": RANK, "gap": GAP,
        "ms_per_step": {k: round(1e3 * statistics.median(g[k] for g in mean), 1) for k in optimizers},
        "slowest_step_ms": {k: round(1e3 * max(max(g[k]) for g in gaps), 1) for k in optimizers},
        "median_step_ms": {
            k: round(1e3 * statistics.median(t for g in gaps for t in g[k]), 1) for k in optimizers
        },
        "times_faster_than_galore_torch": spread([g["galore_torch"] / g["ours"] for g in mean]),
        "times_adamw": spread([g["ours"] / g["adamw"] for g in mean]),
    }  # fmt: skip


def train() -> dict[str, Any]:
    """ViT-S, r = 64, batch 32: forward, backward and step, ours against AdamW in turn."""
    base = vit("S")
    x, y = digits(32)
    steps: dict[str, Callable[[], None]] = {}
    for name in ("ours", "adamw"):
        model = copy.deepcopy(base)
        o = (
            GaLoreAdamW(param_groups(model, RANK, GAP), lr=1e-4)
            if name == "ours"
            else torch.optim.AdamW(model.parameters(), lr=1e-4)
        )

        def one(model: nn.Module = model, o: torch.optim.Optimizer = o) -> None:
            o.zero_grad()
            nn.functional.cross_entropy(model(x).logits, y).backward()
            o.step()

        one()
        steps[name] = one
    times = [{k: seconds(f) for k, f in steps.items()} for _ in range(12)]
    return {
        "model": "ViT-S", "rank": RANK, "batch": 32,
        "seconds": {k: round(statistics.median(t[k] for t in times), 3) for k in steps},
        "times_adamw": spread([t["ours"] / t["adamw"] for t in times]),
    }  # fmt: skip


def state() -> dict[str, Any]:
    """Bytes of state on the meta device, fp32, by size of ViT and rank, with 1000 classes."""
    rows = {}
    for name in SIZES:
        with torch.device("meta"):
            model = vit(name, labels=1000)
        adam = 8 * sum(p.numel() for p in model.parameters())
        row: dict[str, Any] = {"adamw": adam}
        for rank in (16, 64, 128, 256):
            if rank >= SIZES[name][0]:
                continue
            sizes = {}
            for key, kind in (("galore", GaLoreAdamW), ("galore_8bit", GaLoreAdamW8bit)):
                groups = param_groups(model, rank)
                optimizer = kind(groups)
                optimizer.init_state()
                sizes[key] = state_bytes(optimizer)
            formula = adamw_state_bytes_formula(param_groups(model, rank))
            row[f"r{rank}"] = {
                **sizes,
                "formula": formula,
                "adamw_over_galore": round(adam / sizes["galore"], 2),
            }
        rows[name] = row
    return rows


PARTS = {"refresh": refresh, "step": step, "train": train, "state": state}


def main(names: list[str]) -> None:
    if unknown := [n for n in names if n not in PARTS]:
        raise SystemExit(f"no part {unknown[0]!r}: choose among {', '.join(PARTS)}")
    for name in names or list(PARTS):
        torch.manual_seed(SEED)
        import transformers

        result = {
            "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/galore_step.py {name}",
            "date": datetime.date.today().isoformat(),
            "device": f"CPU, {_cpu()}, {os.cpu_count()} cores, shared with other work",
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "seeds": [SEED],
            "result": PARTS[name](),
        }  # fmt: skip
        suffix = "" if torch.get_num_threads() == 1 or name == "state" else f"_{torch.get_num_threads()}threads"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"galore_{name}{suffix}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["result"], indent=1))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main(sys.argv[1:])
