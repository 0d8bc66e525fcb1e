"""How much optimizer state do a small GPT and a ViT need for AdamW's loss, and what becomes of moments at a refresh?

    python benchmarks/galore_less_state.py state      # AdamW, GaLore, Fira's residual, and scaled gradients (APOLLO)
    python benchmarks/galore_less_state.py moments    # GaLore's and scaled gradients' moments turned, kept, decayed
    MEMTRAIN_DATA=FOLDER python benchmarks/galore_less_state.py vit    # AdamW and the best of "state", on pictures
    python benchmarks/galore_less_state.py table      # the README's tables

state, moments: lte-train's default text, a GPT of 2 layers and width 64 (117,056 parameters), 8 × 32 bytes a step, 300
steps, gap 50. vit: CIFAR-10 as JPEG files, a ViT of 4 blocks and width 96 from scratch, 8,000 pictures in 8 × 8
patches of 4, 300 steps of 32, gap 50; loss on 2,000 pictures.
All matrices are projected, embeddings too: left plain, they alone would hold 16 % of AdamW's state. Learning rates of
the matrices are chosen by seed 1337 on the first half of the validation text or pictures, on a ladder of doublings that
goes on until its best has worse ones on both sides; what is reported are five other seeds on the second half. Vectors
learn by AdamW at 4e-3 everywhere (of the ViT 1e-3), and weight decay takes the same share of a weight a step in all
arms. Arms that the result file holds are not repeated. Writes benchmarks/results/galore_less_state.json,
galore_moments.json and galore_less_state_vit.json.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from galore_vit import GaLoreAdamW, GaLoreScaled, Refresh, state_bytes
from memtrain_common.commands.cli import run_command
from memtrain_common.data.text.corpus import Crops, load_corpus
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.classifiers import build_classifier, classification_loss
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.loop import FitConfig, Task, fit, mean_loss
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import cosine_with_warmup

RESULTS = Path(__file__).parent / "results"
FILES = {"state": "galore_less_state.json", "moments": "galore_moments.json", "vit": "galore_less_state_vit.json"}
WARMUP, BATCH, BLOCK, GAP = 20, 8, 32, 50
DECAY = 4e-4  # of a matrix's numbers a step, at the peak
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
    "vit": {
        "AdamW": (torch.optim.AdamW, {}, {}, 1e-3),
        "GaLoreScaled r = 2": scaled(2),
        "GaLoreScaled r = 2, bases from the gradient": scaled(2, Refresh()),
    },
}
Loss = Callable[[torch.nn.Module, Any], torch.Tensor]


class Text:
    """lte-train's default text, next byte by next byte."""

    steps, vectors_lr, unit = 300, 4e-3, "nats per byte"

    def __init__(self) -> None:
        self.corpus = load_corpus(None)

    def build(self) -> torch.nn.Module:
        return GPT(GPTConfig(block_size=BLOCK, vocab_size=256, n_layer=2, n_head=4, n_embd=64))

    loss: Loss = staticmethod(next_token_loss)

    def batches(self, seed: int, *, report: bool) -> tuple[Callable[[int], Any], list[Any]]:
        """Training batches by their number, and those of the half that chooses or reports."""
        half = len(self.corpus.val) // 2
        val = self.corpus.val[half:] if report else self.corpus.val[:half]
        crops = Crops(dataclasses.replace(self.corpus, val=val), batch_size=BATCH, block_size=BLOCK, seed=seed)
        return crops, list(crops.validation(100))


class Pictures:
    """CIFAR-10 as JPEG files, half of the pictures mirrored at each step."""

    steps, vectors_lr, unit = 300, 1e-3, "nats per picture"

    def __init__(self) -> None:
        from backrazor_real_models import pictures, some

        self.train, self.test = pictures("train", some(8000, 7), 32), pictures("test", some(4000, 8), 32)

    def build(self) -> torch.nn.Module:
        return build_classifier("vit-mini", 10, image_size=32, patch_size=4).model

    loss: Loss = staticmethod(classification_loss)

    def batches(self, seed: int, *, report: bool) -> tuple[Callable[[int], Any], list[Any]]:
        from backrazor_real_models import batches

        (x, y), (tx, ty) = self.train, self.test
        order, draw = [*batches(len(y), 32, self.steps, seed)], torch.Generator().manual_seed(seed)
        mirrored = torch.rand(self.steps, 32, generator=draw) < 0.5

        def batch(step: int) -> Any:
            chosen = x[order[step]]
            return torch.where(mirrored[step, :, None, None, None], chosen.flip(-1), chosen), y[order[step]]

        mine = slice(2000, 4000) if report else slice(0, 2000)
        return batch, [*zip(tx[mine].split(250), ty[mine].split(250), strict=True)]


Data = Text | Pictures


def train(way: Way, lr: float, seed: int, data: Data, *, report: bool) -> dict[str, Any]:
    """-> loss on one half of what is held out, bytes of state."""
    kind, options, keys, _ = way
    seed_all(seed)
    model = data.build()
    matrices = {"params": [p for p in model.parameters() if p.dim() >= 2], "lr": lr, "weight_decay": DECAY / lr, **keys}
    vectors = {"params": [p for p in model.parameters() if p.dim() < 2], "lr": data.vectors_lr, "weight_decay": 0.0}
    optimizer = kind([matrices, vectors], betas=(0.9, 0.95), **options)  # type: ignore[call-arg]
    batches, held_out = data.batches(seed, report=report)
    schedule = partial(cosine_with_warmup, warmup_iters=WARMUP, decay_iters=data.steps, min_ratio=0.1)
    task = Task(model, batches, data.loss, optimizer, lr_factor=schedule)
    fit(task, FitConfig(max_iters=data.steps, grad_clip=1.0, eval_interval=data.steps))
    with torch.no_grad():
        loss = mean_loss(model.eval(), data.loss, held_out)["loss"]
    return {
        "loss": round(loss, 5), "state_bytes": state_bytes(optimizer),
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


class Rows:
    """The result file's arms, written again after each."""

    def __init__(self, part: str) -> None:
        self.part, self.path = part, RESULTS / FILES[part]
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text())["arms"] if self.path.exists() else []

    def loss(self, data: Data, name: str, lr: float, seed: int, *, report: bool) -> float:
        key = {"use": "report" if report else "choose", "way": name, "lr": lr, "seed": seed}
        for row in self.rows:
            if all(row[k] == v for k, v in key.items()):
                return row["loss"]
        row = {**key, **train(WAYS[self.part][name], lr, seed, data, report=report)}
        print(row, flush=True)
        self.rows.append(row)
        write_results(
            self.path,
            argv=["python", "benchmarks/galore_less_state.py", self.part],
            device=torch.device("cpu"),
            seeds=[CHOOSE_SEED, *SEEDS],
            unit=f"{data.unit}; choose: first half of what is held out; report: second half",
            steps=data.steps,
            arms=self.rows,
        )
        return row["loss"]


def chosen_rate(rows: Rows, data: Data, name: str) -> float:
    """The best of a ladder of doublings, each of its neighbours tried."""
    start = WAYS[rows.part][name][3]
    tried: dict[int, float] = {}
    best = 0
    while not {best - 1, best, best + 1} <= tried.keys():
        for i in (best, best + 1, best - 1):
            if i not in tried:
                tried[i] = rows.loss(data, name, start * 2.0**i, CHOOSE_SEED, report=False)
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
        share = 100 * mine[0]["state_bytes"] / (8 * mine[0].get("parameters", 117_056))
        print(
            f"| {name} | {mine[0]['lr']:g} | {share:.1f} % | {statistics.mean(r['loss'] for r in mine):.3f} | "
            f"{statistics.mean(gaps):+.2f} % ({min(gaps):+.2f} to {max(gaps):+.2f}) |"
        )


def main(argv: Sequence[str]) -> None:
    if unknown := [word for word in argv if word not in FILES and argv != ["table"]]:
        raise UserError(f"no part {unknown[0]!r}: choose among {', '.join(FILES)}, or table alone")
    if argv == ["table"]:
        for part in FILES:
            table(part)
        return
    torch.set_num_threads(1)
    for part in argv or FILES:
        used: Data = Pictures() if part == "vit" else Text()
        rows = Rows(part)
        for name in WAYS[part]:
            lr = chosen_rate(rows, used, name)
            for seed in SEEDS:
                rows.loss(used, name, lr, seed, report=True)


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/galore_less_state.py"))
