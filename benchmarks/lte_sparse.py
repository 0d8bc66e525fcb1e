"""What do sparse merges, layers in turn and outer momentum cost LTE in loss, and save it in bytes?

    python benchmarks/lte_sparse.py          # trains what benchmarks/results/lte_sparse.json does not hold yet
    python benchmarks/lte_sparse.py table    # the README's table
    python benchmarks/lte_sparse.py bytes    # what 4 processes send of lte-train's default model, by lengths alone

lte-train's default text, a GPT of 2 layers and width 64 (117,056 parameters), 8 × 32 bytes a step, 200 steps; 4 heads
of rank 32, merged every 10 steps, embeddings and norms in copies. Two rates: of the heads, and of embeddings and norms.
They are chosen for exact merges by a seed of its own on the first half of the validation text, and are then the same
for every kind of merge; full training has one rate, or two, chosen in the same way. What is reported are five other
seeds on the second half. The four heads are in one process, which gives the numbers of four processes
(tests/lte/test_ranks.py); the bytes are those that lte.Ranks counts of four.

results/lte_sparse_hidden.json is of commit 10832d8, with whose package this script was run: there a head did not
compute with what it owed, as SparseLoCo does it.
"""

import dataclasses
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
SEEDS, CHOOSE_SEED = (1, 2, 3, 4, 5), 1337
Options = dict[str, Any]
WIDE: Options = {"rank": 64, "alpha": 256.0, "every": 4, "outer_momentum": 0.3}  # as wide as the model


def signs(density: float, copies: float | None = None) -> Options:
    return {**WIDE, "merge_bits": 1, "merge_density": density, "merge_density_replicas": copies}


ARMS: dict[str, Options] = {
    "exact": {},
    "exact, in turn": {"in_turn": True},
    "exact, μ = 0.3": {"outer_momentum": 0.3},
    "8 % in 2 bits": {"merge_density": 0.08, "merge_bits": 2},
    "4 % in 2 bits, T = 5": {"merge_density": 0.04, "merge_bits": 2, "every": 5},
    "4 % in 2 bits, T = 5, μ = 0.3": {"merge_density": 0.04, "merge_bits": 2, "every": 5, "outer_momentum": 0.3},
    "3 % in 4 bits": {"merge_density": 0.03},
    "3 % in 4 bits, in turn": {"merge_density": 0.03, "in_turn": True},
    "3 % in 4 bits, μ = 0.3": {"merge_density": 0.03, "outer_momentum": 0.3},
    "3 % in 4 bits, in turn, μ = 0.3": {"merge_density": 0.03, "in_turn": True, "outer_momentum": 0.3},
    "3 % in 4 bits, 3 steps late": {"merge_density": 0.03, "merge_delay": 3},
    "3 % in 4 bits, 9 steps late": {"merge_density": 0.03, "merge_delay": 9},
    "1 % in 2 bits": {"merge_density": 0.01, "merge_bits": 2},
    "exact, r = 64, T = 5": {"rank": 64, "alpha": 256.0, "every": 5},
    "r = 64, T = 4, μ = 0.3, 4 % in 2 bits": {**WIDE, "merge_density": 0.04, "merge_bits": 2},
    "r = 64, T = 4, μ = 0.3, 4 % in 1 bit": signs(0.04),
    "r = 64, T = 4, μ = 0.3, 4 % in 1 bit, of copies 8 %": signs(0.04, 0.08),
    "r = 64, T = 4, μ = 0.3, 3 % in 1 bit, of copies 16 %": signs(0.03, 0.16),
    "r = 64, T = 4, μ = 0.3, 8 % in 1 bit, of copies 16 %": signs(0.08, 0.16),
    "r = 64, T = 4, μ = 0.3, 16 % in 1 bit, of copies 32 %": signs(0.16, 0.32),
}
HIDDEN = ("8 % in 2 bits", "3 % in 4 bits", "1 % in 2 bits")
Rates = tuple[float, float]  # of the heads, or of full training's matrices; of embeddings and norms
REST_RATES = (1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256, 0.512)
RATES: dict[str, list[Rates]] = {
    "full, one rate": [(r, r) for r in (1e-3, 2e-3, 3e-3, 4e-3)],
    "full, two rates": [(r, rest) for r in (1e-3, 2e-3, 3e-3, 4e-3, 6e-3) for rest in REST_RATES],
    "exact": [(r, rest) for r in (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3) for rest in REST_RATES],
}


def gpt() -> GPT:
    return GPT(GPTConfig(block_size=BLOCK, vocab_size=256, n_layer=2, n_head=4, n_embd=64))


def with_heads(options: Options) -> torch.nn.Module:
    options = {key: value for key, value in options.items() if key not in ("in_turn", "every")}
    return inject(gpt(), LTEConfig(heads=N, **{"rank": 32, "alpha": 128.0, **COPIES, **options}))


COPIES: Options = {"replicas": ("embeddings", "norms")}


def bytes_per_step(model: torch.nn.Module, every: int = T) -> float:
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
    return total / every


def train(arm: str, rates: Rates, seed: int, corpus: Corpus) -> dict[str, float]:
    """-> loss in nats per byte on the validation text; of signs also that of the last merge's weights alone."""
    seed_all(seed)
    crops = Crops(corpus, batch_size=BATCH, block_size=BLOCK, seed=seed)
    more: Options = {}
    lr, rest_lr = rates
    if arm.startswith("full"):
        model: torch.nn.Module = gpt()
        tables = {p for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        matrices = {p for p in model.parameters() if p.dim() >= 2}
        groups: list[Options] = [
            {"params": [p for p in model.parameters() if p in matrices - tables], "lr": lr, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p in tables], "lr": rest_lr, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p not in matrices], "lr": rest_lr, "weight_decay": 0.0},
        ]
    else:
        options = ARMS[arm]
        model = with_heads(options)
        groups = param_groups(model, lr=lr, rest_lr=rest_lr, weight_decay=0.1)
        merger = Merger(model, options.get("every", T), in_turn=options.get("in_turn", False))
        more = {"after_step": merger.step, "clip": partial(clip_grad_norm_per_head, model)}
    schedule = partial(cosine_with_warmup, warmup_iters=WARMUP, decay_iters=STEPS, min_ratio=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    task = Task(model, crops, next_token_loss, optimizer, lr_factor=schedule, **more)
    fit(task, FitConfig(max_iters=STEPS, grad_clip=1.0, eval_interval=STEPS))
    model.eval()
    validation = list(crops.validation(100))
    with torch.no_grad():
        found = {"loss": round(mean_loss(model, next_token_loss, validation)["loss"], 5)}
        if ARMS.get(arm, {}).get("merge_bits") == 1:
            for layer in headed(model).values():
                layer.evaluated = layer.in_own_shape(layer.master())
            copies = replicas(model).values()
            merged = {c.get_parameter(n): c.get_buffer(f"anchor_{n}") for c in copies for n in c.own_names()}
            for copy in copies:  # of which tied ones have no anchor of their own
                copy.evaluated = {name: merged[copy.get_parameter(name)] for name in copy.names()}
            found["loss_of_the_last_merge"] = round(mean_loss(model, next_token_loss, validation)["loss"], 5)
    return found


class Rows:
    """The result file's runs, written again after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.corpus = path, load_corpus(None)
        self.rows: list[Options] = json.loads(path.read_text())["runs"] if path.exists() else []

    def loss(self, arm: str, rates: Rates, seed: int, *, report: bool) -> float:
        key = {"use": "report" if report else "choose", "arm": arm, "rates": [*rates], "seed": seed}
        for row in self.rows:
            if all(row[k] == v for k, v in key.items()):
                return row["loss"]
        half = len(self.corpus.val) // 2
        part = dataclasses.replace(self.corpus, val=self.corpus.val[half:] if report else self.corpus.val[:half])
        self.rows.append(key | train(arm, rates, seed, part))
        print(self.rows[-1], flush=True)
        write_results(
            self.path,
            argv=["python", "benchmarks/lte_sparse.py", *sys.argv[1:]],
            device=torch.device("cpu"),
            seeds=[CHOOSE_SEED, *SEEDS],
            unit="nats per byte; choose: first half of the validation text; report: second half",
            steps=STEPS,
            bytes_per_step={name: round(bytes_per_step(with_heads(o), o.get("every", T))) for name, o in ARMS.items()},
            ddp_bytes_per_step=2 * (N - 1) * 4 * sum(p.numel() for p in gpt().parameters()),
            runs=self.rows,
        )
        return self.rows[-1]["loss"]

    def chosen(self, arm: str) -> Rates:
        return min(RATES[arm], key=lambda rates: self.loss(arm, rates, CHOOSE_SEED, report=False))


def main() -> None:
    rows = Rows(RESULT)
    for arm in ("full, one rate", "full, two rates", *ARMS):
        rates = rows.chosen(arm if arm in RATES else "exact")
        for seed in SEEDS:
            rows.loss(arm, rates, seed, report=True)


def hidden() -> None:
    """With the package of the commit that the description names: a few arms at the rates that were chosen."""
    if not any("feedback_" in name for name, _ in with_heads(ARMS[HIDDEN[0]]).named_buffers()):  # of copies, until then
        raise SystemExit("hidden needs the package of commit 10832d8 on PYTHONPATH: in this one heads compute with e")
    rates = Rows(RESULT).chosen("exact")
    for arm in set(ARMS) - set(HIDDEN):  # that package does not know the options of all
        del ARMS[arm]
    rows = Rows(RESULT.with_name("lte_sparse_hidden.json"))
    for arm in HIDDEN:
        for seed in SEEDS:
            rows.loss(arm, rates, seed, report=True)


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
    rows = [r for r in content["runs"] if r["use"] == "report"]
    full = {r["seed"]: r["loss"] for r in rows if r["arm"] == "full, two rates"}
    whole = content["ddp_bytes_per_step"]
    print("| merges | bytes a step | of DDP's | loss | to full training, seed by seed |\n|---|--:|--:|--:|--:|")
    for arm in ("full, two rates", "full, one rate", *ARMS):
        mine = [r for r in rows if r["arm"] == arm]
        gaps = [100 * (r["loss"] / full[r["seed"]] - 1) for r in mine]
        sent = whole if arm in RATES and arm != "exact" else content["bytes_per_step"][arm]
        part = 100 * sent / whole
        of = f"{part:.0f}" if part > 5 else f"{part:.2f}"
        end = (
            "" if arm == "full, two rates" else f"{statistics.mean(gaps):+.1f} % ({min(gaps):+.1f} to {max(gaps):+.1f})"
        )
        name, loss = arm.replace("full,", "full training,"), statistics.mean(r["loss"] for r in mine)
        print(f"| {name} | {sent:,} | {of} % | {loss:.3f} | {end.replace('-', '−')} |")


if __name__ == "__main__":
    {"table": table, "bytes": lengths, "hidden": hidden}.get(sys.argv[-1], main)()
