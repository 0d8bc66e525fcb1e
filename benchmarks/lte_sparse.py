"""What do sparse merges, layers in turn and outer momentum cost LTE in loss, and save it in bytes?

    python benchmarks/lte_sparse.py          # trains what benchmarks/results/lte_sparse.json does not hold yet
    python benchmarks/lte_sparse.py table    # the README's table
    python benchmarks/lte_sparse.py bytes    # what 4 processes send of lte-train's default model, by lengths alone

lte-train's default text, a GPT of 2 layers and width 64 (117,056 parameters), 8 × 32 bytes a step, 200 steps; 4 heads
of rank 32, merged every 10 steps, embeddings and norms in copies. The rates are lte-train's defaults, which
benchmarks/lte_defaults.py found on other steps of the same text before: nothing is chosen here. Three seeds. The four
heads are in one process, which gives the numbers of four processes (tests/lte/test_ranks.py); the bytes are those that
lte.Ranks counts of four.
"""

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lte import LTEConfig, Merger, clip_grad_norm_per_head, inject, param_groups
from lte.injection import headed, replicas
from lte.merging import sends_factors
from memtrain_common.data.text.corpus import Corpus, Crops, load_corpus
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.loop import FitConfig, Task, fit, mean_loss
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import cosine_with_warmup

RESULT = Path(__file__).parent / "results" / "lte_sparse.json"
STEPS, WARMUP, BATCH, BLOCK, T, N = 200, 20, 8, 32, 10, 4
SEEDS = (1, 2, 3)
FULL_LR, HEADS_LR, REST_LR = 3e-3, 1e-3, 4e-3
Options = dict[str, Any]
ARMS: dict[str, Options] = {
    "exact": {},
    "3 % in 4 bits": {"merge_density": 0.03},
    "8 % in 2 bits": {"merge_density": 0.08, "merge_bits": 2},
    "3 % in 4 bits, in turn": {"merge_density": 0.03, "in_turn": True},
    "3 % in 4 bits, μ = 0.3": {"merge_density": 0.03, "outer_momentum": 0.3},
    "exact, in turn": {"in_turn": True},
    "exact, μ = 0.3": {"outer_momentum": 0.3},
    "3 % in 4 bits, in turn, μ = 0.3": {"merge_density": 0.03, "in_turn": True, "outer_momentum": 0.3},
    "1 % in 2 bits": {"merge_density": 0.01, "merge_bits": 2},
    "3 % in 4 bits, 3 steps late": {"merge_density": 0.03, "merge_delay": 3},
    "3 % in 4 bits, 9 steps late": {"merge_density": 0.03, "merge_delay": 9},
}


def gpt() -> GPT:
    return GPT(GPTConfig(block_size=BLOCK, vocab_size=256, n_layer=2, n_head=4, n_embd=64))


def with_heads(options: Options) -> torch.nn.Module:
    options = {key: value for key, value in options.items() if key != "in_turn"}
    return inject(gpt(), LTEConfig(heads=N, rank=32, alpha=128.0, **COPIES, **options))


COPIES: Options = {"replicas": ("embeddings", "norms")}


def bytes_per_step(model: torch.nn.Module) -> float:
    """What four processes send each other in a step, on average over an interval, as lte.Ranks counts it."""
    total = 0
    for layer in headed(model).values():
        if layer.sparse is not None:
            total += N * (N - 1) * layer.sparse.size(layer.feedback[0].numel())
        elif sends_factors(layer):
            total += N * (N - 1) * 4 * sum(f[0].numel() for f in layer.factors())
        else:
            total += 2 * (N - 1) * 4 * layer.weight.numel()
    for copy in replicas(model).values():
        for name in copy.own_names():
            numbers = copy.get_parameter(name)[0].numel()
            sparse = copy.sparse
            total += 2 * (N - 1) * 4 * numbers if sparse is None else N * (N - 1) * sparse.size(numbers)
    return total / T


def train(arm: str, seed: int, corpus: Corpus) -> float:
    """-> loss in nats per byte on the corpus's validation text."""
    seed_all(seed)
    crops = Crops(corpus, batch_size=BATCH, block_size=BLOCK, seed=seed)
    more: Options = {}
    if arm == "full":
        model: torch.nn.Module = gpt()
        groups: list[Options] = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "lr": FULL_LR, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "lr": FULL_LR, "weight_decay": 0.0},
        ]
    else:
        model = with_heads(ARMS[arm])
        groups = param_groups(model, lr=HEADS_LR, rest_lr=REST_LR, weight_decay=0.1)
        merger = Merger(model, T, in_turn=ARMS[arm].get("in_turn", False))
        more = {"after_step": merger.step, "clip": partial(clip_grad_norm_per_head, model)}
    schedule = partial(cosine_with_warmup, warmup_iters=WARMUP, decay_iters=STEPS, min_ratio=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    task = Task(model, crops, next_token_loss, optimizer, lr_factor=schedule, **more)
    fit(task, FitConfig(max_iters=STEPS, grad_clip=1.0, eval_interval=STEPS))
    return mean_loss(model, next_token_loss, list(crops.validation(100)))["loss"]


def main() -> None:
    corpus = load_corpus(None)
    rows: list[Options] = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    for arm in ("full", *ARMS):
        for seed in SEEDS:
            if any((r["arm"], r["seed"]) == (arm, seed) for r in rows):
                continue
            rows.append({"arm": arm, "seed": seed, "loss": round(train(arm, seed, corpus), 5)})
            print(rows[-1], flush=True)
            write_results(
                RESULT,
                argv=["python", "benchmarks/lte_sparse.py"],
                device=torch.device("cpu"),
                seeds=SEEDS,
                unit="nats per byte, validation",
                steps=STEPS,
                bytes_per_step={name: round(bytes_per_step(with_heads(options))) for name, options in ARMS.items()},
                ddp_bytes_per_step=2 * (N - 1) * 4 * sum(p.numel() for p in gpt().parameters()),
                runs=rows,
            )


def lengths() -> None:
    """The default model's bytes; of exact merges beside those that lte_wire.py counted."""
    counted = {
        r["way"]: r["counted_bytes_per_step"] for r in json.loads((RESULT.parent / "lte_wire.json").read_text())["ways"]
    }
    whole = counted["DDP, full model"]
    rows = []
    for rank in (64, 8):
        for kept, options in {
            "exact": {},
            "3 % in 4 bits": THREE,
            "1 % in 4 bits": ONE,
            "1 % in 2 bits": TWO_BITS,
        }.items():
            for rest, policy in {"rest frozen": {"trainable": ()}, "rest averaged at merges": COPIES}.items():
                model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=128))
                inject(model, LTEConfig(heads=N, rank=rank, **policy, **options))
                sent = round(bytes_per_step(model))
                row = {
                    "rank": rank,
                    "merges": kept,
                    "rest": rest,
                    "bytes_per_step": sent,
                    "of_ddp": round(sent / whole, 5),
                }
                if kept == "exact":
                    row["counted_by_lte_wire"] = counted[f"heads r = {rank}, {rest}"]
                rows.append(row)
                print(row)
    write_results(
        RESULT.with_name("lte_sparse_bytes.json"),
        argv=["python", "benchmarks/lte_sparse.py", "bytes"],
        device=torch.device("cpu"),
        seeds=[],
        processes=N,
        T=T,
        ddp_bytes_per_step=whole,
        rows=rows,
    )


THREE: Options = {"merge_density": 0.03}
ONE: Options = {"merge_density": 0.01}
TWO_BITS: Options = {"merge_density": 0.01, "merge_bits": 2}


def table() -> None:
    content = json.loads(RESULT.read_text())
    rows = content["runs"]
    full = {r["seed"]: r["loss"] for r in rows if r["arm"] == "full"}
    print("| merges | bytes a step, of DDP's | loss | to full training, seed by seed |\n|---|--:|--:|--:|")
    for arm in ("full", *ARMS):
        mine = [r for r in rows if r["arm"] == arm]
        if len(mine) < len(SEEDS):
            continue
        gaps = [100 * (r["loss"] / full[r["seed"]] - 1) for r in mine]
        sent = content["ddp_bytes_per_step"] if arm == "full" else content["bytes_per_step"][arm]
        print(
            f"| {arm} | {sent:,} ({100 * sent / content['ddp_bytes_per_step']:.2f} %) | "
            f"{statistics.mean(r['loss'] for r in mine):.3f} | "
            f"{statistics.mean(gaps):+.1f} % ({min(gaps):+.1f} to {max(gaps):+.1f}) |"
        )


if __name__ == "__main__":
    {"table": table, "bytes": lengths}.get(sys.argv[-1], main)()
