"""How fast are GaLore's refresh, its optimizer step and a whole training step, and how large is its state?

    python benchmarks/galore_step.py refresh step train state limit in_backward from_factors kept

Each named part writes benchmarks/results/galore_<part>.json. What is compared runs in one process, in turn; a ratio
is the median over such pairs, with its quartiles. Run it on a machine that has nothing else to do; OMP_NUM_THREADS
sets the threads.
"""

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from backrazor import Razor
from galore_vit import GaLoreAdamW, GaLoreAdamW8bit, GaLoreScaled, InBackward, Refresh, param_groups, state_bytes
from galore_vit.basis import captured_energy, exact_bases, iterated_bases
from galore_vit.projection import Bases, Layout, add_projected_back, project
from galore_vit.state_size import adamw_state_bytes_formula
from memtrain_common.measuring.bench import pairwise, ratio_of, write_results
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
            num_labels=labels,
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


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def milliseconds(times: list[float]) -> float:
    """The median of times in seconds."""
    return round(1e3 * statistics.median(times), 2)


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
    settings = Refresh()

    def svd() -> Bases:
        return exact_bases(G, layout)

    def first() -> Bases | None:
        return iterated_bases(
            G, layout, None, iterations=settings.iterations + 1, oversample=settings.oversample, seed=SEED
        )

    def later() -> Bases | None:
        return iterated_bases(
            G, layout, before, iterations=settings.iterations, oversample=settings.oversample, seed=SEED
        )

    best = captured_energy(G, svd())
    out: dict[str, Any] = {
        "shape": [2304, 768],
        "rank": RANK,
        "svd_ms": milliseconds([seconds(svd) for _ in range(3)]),
        "stale_basis_energy_of_optimum": round(float(captured_energy(G, before) / best), 5),
    }
    for name, way in {"first": first, "later": later}.items():
        bases = way()
        assert bases is not None
        out[name] = {
            "times_faster_than_svd": asdict(pairwise(svd, way, pairs=15)),
            "ms": milliseconds([seconds(way) for _ in range(15)]),
            "energy_of_optimum": round(float(captured_energy(G, bases) / best), 5),
        }
    return out


def step() -> dict[str, Any]:
    """ViT-S, r = 64: a step averaged over gaps of 50, ours, the published package's, torch's AdamW, in turn."""
    import galore_torch

    model = vit("S")
    x, y = digits(8)
    nn.functional.cross_entropy(model(x).logits, y).backward()
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    for m in models[1:]:
        for p, q in zip(m.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
    ours = GaLoreAdamW(param_groups(models[0], RANK, GAP), lr=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = galore_torch.GaLoreAdamW(param_groups(models[1], RANK, GAP), lr=1e-4)
    adamw = torch.optim.AdamW(models[2].parameters(), lr=1e-4)
    ways: dict[str, Callable[[], Any]] = {"ours": ours.step, "galore_torch": theirs.step, "adamw": adamw.step}
    first = {name: seconds(way) for name, way in ways.items()}  # pays for the state, and for all bases at once
    ways["two_products_alone"] = products(ours)
    gaps = []
    for _ in range(5):  # each holds one refresh of every weight, of either optimizer
        times: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(GAP):
            for name in ways if i % 2 else reversed(ways):
                times[name].append(seconds(ways[name]))
        gaps.append(times)
    mean = [{name: statistics.mean(t) for name, t in times.items()} for times in gaps]
    return {
        "model": "ViT-S", "rank": RANK, "gap": GAP,
        "mean_step_ms": {k: milliseconds([m[k] for m in mean]) for k in ways},
        "median_step_ms": {k: milliseconds([t for times in gaps for t in times[k]]) for k in ways},
        "slowest_step_ms": {k: milliseconds([max(max(times[k]) for times in gaps)]) for k in ways},
        "first_step_ms": {k: milliseconds([t]) for k, t in first.items()},
        "times_faster_than_galore_torch": asdict(ratio_of([m["galore_torch"] / m["ours"] for m in mean])),
        "bound_by_the_products": asdict(ratio_of([m["galore_torch"] / m["two_products_alone"] for m in mean])),
        "time_over_adamw": asdict(ratio_of([m["ours"] / m["adamw"] for m in mean])),
    }  # fmt: skip


def products(optimizer: GaLoreAdamW) -> Callable[[], None]:
    """What no implementation of a step can leave out: R = G Qᵀ and W ← W + c N Q of every projected weight."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if optimizer.layout(p) is not None]
    pairs = [(p.grad, torch.empty_like(p).copy_(p.detach()), optimizer.bases(p)) for p in weights]

    def run() -> None:
        with torch.no_grad():
            found = [project(G, bases) for G, _, bases in pairs if G is not None]
            for (_, W, bases), R in zip(pairs, found, strict=True):
                add_projected_back(W, R, bases, beta=1.0, alpha=-1e-9)

    return run


def train() -> dict[str, Any]:
    """ViT-S, r = 64, batch 32: forward, backward and step, ours against AdamW in turn."""
    base = vit("S")
    x, y = digits(32)

    def training(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def one() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).logits, y).backward()
            optimizer.step()

        return one

    projected = copy.deepcopy(base)
    ours = training(projected, GaLoreAdamW(param_groups(projected, RANK, GAP), lr=1e-4))
    adamw = training(base, torch.optim.AdamW(base.parameters(), lr=1e-4))
    ratio = pairwise(ours, adamw, pairs=8)
    return {
        "model": "ViT-S", "rank": RANK, "batch": 32,
        "seconds": {"ours": round(seconds(ours), 2), "adamw": round(seconds(adamw), 2)},
        "time_over_adamw": asdict(ratio),
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


def limit() -> dict[str, Any]:
    """What bounds a step of ViT-S's 72 matrices: in float32 and bfloat16, and where the backward pass projects."""
    return {
        "rank": RANK, "gap": GAP, "rows": ROWS,
        "float32": _limit(torch.float32, GAP),
        # a CPU without matrix units for bfloat16 takes many times as long; no refresh falls into so few steps
        "bfloat16": _limit(torch.bfloat16, 6),
    }  # fmt: skip


ROWS = 8 * 197
"""Tokens of a batch of 8."""


def _limit(dtype: torch.dtype, steps: int) -> dict[str, Any]:
    import galore_torch

    width, _, depth = SIZES["S"]
    shapes = depth * [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)]
    draw = torch.Generator().manual_seed(SEED)

    def fresh(seed: int) -> list[nn.Parameter]:
        draw.manual_seed(seed)
        weights = [nn.Parameter((0.02 * torch.randn(s, generator=draw)).to(dtype)) for s in shapes]
        for p in weights:
            p.grad = (1e-3 * torch.randn(p.shape, generator=draw)).to(dtype)
        return weights

    keys = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    ours = GaLoreAdamW([{"params": fresh(0), **keys}], lr=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = galore_torch.GaLoreAdamW([{"params": fresh(0), **keys}], lr=1e-4)
    ways: dict[str, Callable[[], Any]] = {
        "ours": ours.step,
        "galore_torch": theirs.step,
        "adamw": torch.optim.AdamW(fresh(0), lr=1e-4).step,
        "scaled_rank_4": GaLoreScaled([{"params": fresh(0), **keys, "rank": 4}], lr=1e-4, refresh=Refresh()).step,
        "scaled_rank_4_random": GaLoreScaled([{"params": fresh(0), **keys, "rank": 4}], lr=1e-4).step,
        "scaled_rank_1_random": GaLoreScaled([{"params": fresh(0), **keys, "rank": 1}], lr=1e-4).step,
    }
    for way in ways.values():
        way()
    ways["two_products_alone"] = products(ours)
    weights = [p for group in ours.param_groups for p in group["params"]]
    moments = [(p.detach().clone(), ours.state[p]["exp_avg"], ours.bases(p)) for p in weights]
    inputs = {s: tuple(torch.randn(ROWS, n, generator=draw).to(dtype) for n in s) for s in dict.fromkeys(shapes)}

    def back_alone() -> None:  # what is left of the step where R arrives: W ← W + c·P N Q
        for W, N, bases in moments:
            add_projected_back(W, N, bases, beta=1.0, alpha=-1e-9)

    def gradients() -> None:
        for s in shapes:
            torch.matmul(inputs[s][0].T, inputs[s][1])

    def thin() -> None:  # R = (PᵀYᵀ)X or Yᵀ(XQᵀ) for Y (rows, m), X (rows, n): G is never made
        for p, (_, _, (P, Q)) in zip(weights, moments, strict=True):
            Y, X = inputs[tuple(p.shape)]
            if Q is not None:
                torch.matmul(Y.T, X @ Q.T)
            else:
                assert P is not None
                torch.matmul((Y @ P).T, X)

    ways |= {"projecting_back_alone": back_alone, "gradients": gradients, "two_thin_products": thin}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for i in range(steps):  # GAP of them hold a refresh of every weight, of either optimizer
            for name in ways if i % 2 else reversed(ways):
                if name not in ("gradients", "two_thin_products") or i < 6:
                    times[name].append(seconds(ways[name]))
    mean = {name: statistics.mean(found) for name, found in times.items()}

    def over(a: str, b: str) -> dict[str, Any]:
        return asdict(ratio_of([x / y for x, y in zip(times[a], times[b], strict=False)]))

    return {
        "mean_ms": {name: round(1e3 * value, 2) for name, value in mean.items()},
        "mean_times_faster_than_galore_torch": round(mean["galore_torch"] / mean["ours"], 2),
        "mean_bound_by_two_products": round(mean["galore_torch"] / mean["two_products_alone"], 2),
        "mean_bound_by_projecting_back": round(mean["galore_torch"] / mean["projecting_back_alone"], 2),
        **{f"{n}_over_adamw": over(n, "adamw") for n in ways if n.startswith("scaled")},
        "ours_over_adamw": over("ours", "adamw"),
        "two_thin_products_over_gradients": over("two_thin_products", "gradients"),
    }


def in_backward() -> dict[str, Any]:
    """ViT-S, r = 64, batch 8: training steps that make every gradient, that free each, and that make none, in turn."""
    base = vit("S")
    x, y = digits(8)
    models = {name: copy.deepcopy(base) for name in ("adamw", "galore", "whole", "factored", "factored_sketch")}
    of = {name: GaLoreAdamW(param_groups(m, RANK, GAP), lr=1e-4) for name, m in models.items() if name != "adamw"}
    steppers: dict[str, Any] = {
        "adamw": torch.optim.AdamW(models["adamw"].parameters(), lr=1e-4),
        "galore": of["galore"],
        "whole": InBackward(of["whole"], norm="projected"),
        "factored": InBackward(of["factored"], norm="projected", model=models["factored"]),
        "factored_sketch": InBackward(of["factored_sketch"], norm="sketch", model=models["factored_sketch"]),
    }

    def training(name: str) -> tuple[float, float]:
        began = time.perf_counter()
        loss = nn.functional.cross_entropy(models[name](x).logits, y)
        loss.backward()
        if name == "factored_sketch":
            torch.nn.utils.clip_grad_norm_(steppers[name].parameters(), 1e9)
        steppers[name].step()
        steppers[name].zero_grad()
        return time.perf_counter() - began, loss.item()

    for name in steppers:
        training(name)  # pays for the state, and for all bases at once
    times: dict[str, list[float]] = {name: [] for name in steppers}
    losses: dict[str, list[float]] = {name: [] for name in steppers}
    for i in range(16):
        for name in steppers if i % 2 else reversed(steppers):
            took, loss = training(name)
            times[name].append(took)
            losses[name].append(loss)
    weights = {name: torch.cat([p.detach().flatten() for p in models[name].parameters()]) for name in models}
    moved = weights["whole"] - torch.cat([p.detach().flatten() for p in base.parameters()])
    return {
        "model": "ViT-S", "rank": RANK, "gap": GAP, "batch": 8, "rows": ROWS, "steps": 17,
        "factored_weights": len(steppers["factored"].factored),
        "median_ms": {name: milliseconds(found) for name, found in times.items()},
        **{f"{name}_over_{other}": asdict(ratio_of([a / b for a, b in zip(times[name], times[other], strict=True)]))
           for other in ("adamw", "galore") for name in times if name not in ("adamw", other)},
        "largest_difference_of_losses_factored_and_whole": max(
            abs(a - b) for a, b in zip(losses["factored"], losses["whole"], strict=True)
        ),
        "weights_apart_over_weights_moved": float((weights["factored"] - weights["whole"]).norm() / moved.norm()),
    }  # fmt: skip


def from_factors() -> dict[str, Any]:
    """ViT-S's 72 matrices, r = 64: from a layer's inputs and the gradient of its outputs to the moved weight.

    galore-torch takes the gradients, so they are made for it; ours makes them for a due basis alone. The mean of a gap
    holds one refresh of every weight, of either.
    """
    import galore_torch

    width, _, depth = SIZES["S"]
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    inputs = [(torch.randn(ROWS, m) / ROWS, torch.randn(ROWS, n)) for m, n in shapes]
    layers = nn.ModuleList(nn.Linear(n, m, bias=False) for _ in range(depth) for m, n in shapes)
    others = copy.deepcopy(layers)
    keys = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    ours = InBackward(
        GaLoreAdamW([{"params": list(layers.parameters()), **keys}], lr=1e-4), norm="projected", model=layers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = galore_torch.GaLoreAdamW([{"params": list(others.parameters()), **keys}], lr=1e-4)
    times: dict[str, list[float]] = {}

    def one(name: str, modules: nn.ModuleList, step: Callable[[], Any], zero_grad: Callable[[], Any]) -> None:
        outputs = [layer(inputs[i % len(inputs)][1]) for i, layer in enumerate(modules)]
        began = time.perf_counter()
        for i, out in enumerate(outputs):  # a backward pass through the weight alone: the inputs need no gradient
            out.backward(inputs[i % len(inputs)][0])
        made = time.perf_counter()
        step()
        done = time.perf_counter()
        zero_grad()
        times.setdefault(f"{name}_step", []).append(done - made)
        times.setdefault(name, []).append(done - began)

    for i in range(GAP + 1):
        todo = [("ours", layers, ours.step, ours.zero_grad), ("galore_torch", others, theirs.step, theirs.zero_grad)]
        for way in todo if i % 2 else reversed(todo):
            one(*way)
    first = {name: found.pop(0) for name, found in times.items()}  # pays for the state, and for all bases at once
    mean = {name: statistics.mean(found) for name, found in times.items()}
    return {
        "model": "ViT-S", "rank": RANK, "gap": GAP, "rows": ROWS,
        "first_ms": {name: round(1e3 * t, 1) for name, t in first.items()},
        "mean_ms": {name: round(1e3 * t, 1) for name, t in mean.items()},
        "median_ms": {name: milliseconds(t) for name, t in times.items()},
        "mean_times_faster_than_galore_torch": round(mean["galore_torch"] / mean["ours"], 2),
        "step_alone_mean_times_faster": round(mean["galore_torch_step"] / mean["ours_step"], 2),
    }  # fmt: skip


def kept() -> dict[str, Any]:
    """ViT-S, batch 8: bytes that a forward pass saves besides weights and state, where X Qᵀ stands for X."""
    base = vit("S")
    x, y = digits(8)

    def saved(rank: int | None, proj_type: str, save: AbstractContextManager[Any] | None = None) -> dict[str, int]:
        model = copy.deepcopy(base)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        state = 0
        if rank is not None:
            groups = param_groups(model, rank, GAP, proj_type=proj_type)
            stepper = InBackward(GaLoreAdamW(groups, lr=0.0), norm="projected", model=model)
            nn.functional.cross_entropy(model(x).logits, y).backward()  # makes the gradients, for the first bases
            stepper.step()
            stepper.zero_grad()
            tensors = [v for s in stepper.optimizer.state.values() for v in s.values()]
            known |= {t.untyped_storage().data_ptr() for t in tensors}
            state = state_bytes(stepper.optimizer)
        alive: list[Tensor] = []  # an address is given again once its tensor is gone

        def pack(t: Tensor) -> Tensor:
            alive.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), save or nullcontext():
            nn.functional.cross_entropy(model(x).logits, y)
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        return {"saved_bytes": sum(n for at, n in found.items() if at not in known), "state_bytes": state}

    return {
        "model": "ViT-S", "batch": 8, "every_gradient_made": saved(None, ""),
        **{f"{kind}_r{rank}": saved(rank, kind) for kind in ("std", "right") for rank in (16, 64)},
        "backrazor_0.1": saved(None, "", Razor(keep=0.1)),
        "backrazor_0.1_right_r16": saved(16, "right", Razor(keep=0.1)),
    }  # fmt: skip


PARTS = {
    "limit": limit,
    "kept": kept,
    "in_backward": in_backward,
    "from_factors": from_factors,
    "refresh": refresh,
    "step": step,
    "train": train,
    "state": state,
}


def main(names: list[str]) -> None:
    if unknown := [n for n in names if n not in PARTS]:
        raise SystemExit(f"no part {unknown[0]!r}: choose among {', '.join(PARTS)}")
    for name in names or list(PARTS):
        torch.manual_seed(SEED)
        result = PARTS[name]()
        write_results(
            RESULTS / f"galore_{name}.json",
            argv=["python", "benchmarks/galore_step.py", name],
            device=torch.device("cpu"),
            seeds=[SEED],
            threads=torch.get_num_threads(),
            result=result,
        )
        print(name, result, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
