"""How much optimizer state does a small GPT need for AdamW's loss, and what should become of moments at a refresh?

    python benchmarks/galore_less_state.py state      # AdamW, GaLore, Fira's residual, and scaled gradients (APOLLO)
    python benchmarks/galore_less_state.py moments    # GaLore's and scaled gradients' moments turned, kept, decayed
    python benchmarks/galore_less_state.py table      # the README's tables

lte-train's default text, a GPT of 2 layers and width 64 (117,056 parameters), 8 × 32 bytes a step, 300 steps, gap 50.
All matrices are projected, embeddings too: left plain, they alone would hold 16 % of AdamW's state. Learning rates of
the matrices are chosen by seed 1337 on the first half of the validation text, on a ladder of doublings that goes on
until its best has worse ones on both sides; what is reported are five other seeds on the second half. Norms learn by
AdamW at 4e-3 everywhere, and weight decay takes the same share of a weight a step in all arms. Arms that the result
file holds are not repeated. Writes benchmarks/results/galore_less_state.json and galore_moments.json.
"""

import dataclasses
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from galore_vit import GaLoreAdamW, GaLoreScaled, Refresh, state_bytes
from memtrain_common.data.text.corpus import Corpus, Crops, load_corpus
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.loop import FitConfig, Task, fit, mean_loss
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import cosine_with_warmup

RESULTS = Path(__file__).parent / "results"
FILES = {"state": "galore_less_state.json", "moments": "galore_moments.json"}
STEPS, WARMUP, BATCH, BLOCK, GAP = 300, 20, 8, 32, 50
NORMS_LR, DECAY = 4e-3, 4e-4  # of vectors; of a matrix's numbers a step, at the peak
CHOOSE_SEED, SEEDS = 1337, (1, 2, 3, 4, 5)
RANDOM, KEPT = Refresh("random"), Refresh(rotate=False)
Way = tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any], float]
"""(optimizer, its options, keys of the matrices' group, the rate where the ladder begins)"""


def galore(rank: int, refresh: Refresh | None = None, **options: Any) -> Way:
    return GaLoreAdamW, {"refresh": refresh, **options}, {"rank": rank, "update_proj_gap": GAP, "scale": 1.0}, 1.6e-2


def scaled(rank: int, refresh: Refresh = RANDOM, proj_type: str = "std", **options: Any) -> Way:
    keys = {"rank": rank, "update_proj_gap": GAP, "scale": 1.0, "proj_type": proj_type}
    return GaLoreScaled, {"refresh": refresh, **options}, keys, 4e-3


WAYS: dict[str, dict[str, Way]] = {
    "state": {
        "AdamW": (torch.optim.AdamW, {}, {}, 2e-3),
        "GaLoreScaled r = 8, reverse_std": scaled(8, proj_type="reverse_std"),
        "GaLoreScaled r = 1": scaled(1),
        "GaLoreAdamW r = 2": galore(2),
        "GaLoreScaled r = 2": scaled(2),
        "GaLoreScaled r = 2, bases from the gradient": scaled(2, Refresh()),
    },
    "moments": {
        "GaLoreAdamW r = 8, turned": galore(8, Refresh()),
        "GaLoreAdamW r = 8, turned, first × 0": galore(8, Refresh(decay=0.0)),
        "GaLoreAdamW r = 8, kept": galore(8, KEPT),
        "GaLoreAdamW r = 8, kept, first × 0.5": galore(8, Refresh(rotate=False, decay=0.5)),
        "GaLoreAdamW r = 8, kept, first × 0": galore(8, Refresh(rotate=False, decay=0.0)),
        "GaLoreScaled r = 8, turned": scaled(8, Refresh()),
        "GaLoreScaled r = 8, kept": scaled(8, KEPT),
    },
}


def train(way: Way, lr: float, seed: int, corpus: Corpus) -> dict[str, Any]:
    """-> loss in nats per byte on the corpus's validation text, bytes of state."""
    kind, options, keys, _ = way
    seed_all(seed)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=256, n_layer=2, n_head=4, n_embd=64))
    matrices = {"params": [p for p in model.parameters() if p.dim() >= 2], "lr": lr, "weight_decay": DECAY / lr, **keys}
    vectors = {"params": [p for p in model.parameters() if p.dim() < 2], "lr": NORMS_LR, "weight_decay": 0.0}
    optimizer = kind([matrices, vectors], betas=(0.9, 0.95), **options)  # type: ignore[call-arg]
    crops = Crops(corpus, batch_size=BATCH, block_size=BLOCK, seed=seed)
    validation = list(crops.validation(100))
    fit(
        Task(
            model,
            crops,
            next_token_loss,
            optimizer,
            lr_factor=partial(cosine_with_warmup, warmup_iters=WARMUP, decay_iters=STEPS, min_ratio=0.1),
        ),
        FitConfig(max_iters=STEPS, grad_clip=1.0, eval_interval=STEPS),
    )
    loss = mean_loss(model, next_token_loss, validation)["loss"]
    return {"loss": round(loss, 5), "state_bytes": state_bytes(optimizer)}


class Rows:
    """The result file's arms, written again after each."""

    def __init__(self, part: str) -> None:
        self.part, self.path = part, RESULTS / FILES[part]
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text())["arms"] if self.path.exists() else []

    def loss(self, corpus: Corpus, name: str, lr: float, seed: int, *, report: bool) -> float:
        key = {"use": "report" if report else "choose", "way": name, "lr": lr, "seed": seed}
        for row in self.rows:
            if all(row[k] == v for k, v in key.items()):
                return row["loss"]
        half = len(corpus.val) // 2
        part = dataclasses.replace(corpus, val=corpus.val[half:] if report else corpus.val[:half])
        row = {**key, **train(WAYS[self.part][name], lr, seed, part)}
        print(row, flush=True)
        self.rows.append(row)
        write_results(
            self.path,
            argv=["python", "benchmarks/galore_less_state.py", self.part],
            device=torch.device("cpu"),
            seeds=[CHOOSE_SEED, *SEEDS],
            unit="nats per byte; choose: first half of the validation text; report: second half",
            steps=STEPS,
            arms=self.rows,
        )
        return row["loss"]


def chosen_rate(rows: Rows, corpus: Corpus, name: str) -> float:
    """The best of a ladder of doublings, each of its neighbours tried."""
    start = WAYS[rows.part][name][3]
    tried: dict[int, float] = {}
    best = 0
    while not {best - 1, best, best + 1} <= tried.keys():
        for i in (best, best + 1, best - 1):
            if i not in tried:
                tried[i] = rows.loss(corpus, name, start * 2.0**i, CHOOSE_SEED, report=False)
        best = min(tried, key=lambda i: tried[i])
    return start * 2.0**best


def table(part: str) -> None:
    rows = [r for r in json.loads((RESULTS / FILES[part]).read_text())["arms"] if r["use"] == "report"]
    base = next(iter(WAYS[part]))
    first = {r["seed"]: r for r in rows if r["way"] == base}
    print(f"| way | rate | state | loss | to {base}, seed by seed |\n|---|--:|--:|--:|--:|")
    for name in WAYS[part]:
        mine = [r for r in rows if r["way"] == name]
        if not mine:
            continue
        gaps = [100 * (r["loss"] / first[r["seed"]]["loss"] - 1) for r in mine]
        share = 100 * mine[0]["state_bytes"] / (8 * PARAMETERS)
        print(
            f"| {name} | {mine[0]['lr']:g} | {share:.1f} % | {statistics.mean(r['loss'] for r in mine):.3f} | "
            f"{statistics.mean(gaps):+.2f} % ({min(gaps):+.2f} to {max(gaps):+.2f}) |"
        )


PARAMETERS = sum(
    p.numel() for p in GPT(GPTConfig(block_size=BLOCK, vocab_size=256, n_layer=2, n_head=4, n_embd=64)).parameters()
)


def main() -> None:
    if sys.argv[1:] == ["table"]:
        for part in FILES:
            table(part)
        return
    corpus = load_corpus(None)
    for part in sys.argv[1:] or FILES:
        rows = Rows(part)
        for name in WAYS[part]:
            lr = chosen_rate(rows, corpus, name)
            for seed in SEEDS:
                rows.loss(corpus, name, lr, seed, report=True)


if __name__ == "__main__":
    main()
