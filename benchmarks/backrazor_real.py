"""Does training with Back Razor end where dense training ends? Real pretrained models, paired by seed, resumable.

    MEMTRAIN_DATA=FOLDER python benchmarks/backrazor_real.py stories minilm dino

stories: stories260K (Llama) to Tiny Shakespeare, 60 steps of 8 × 256 tokens; held-out loss in nats.
minilm: MiniLM-L6 to SST-2, 960 training rows, 60 steps of 16, dropout on; accuracy on the 872 dev rows.
dino: DINOv2-small to CIFAR-10 as JPEG files at 98 pixels, 1,000 pictures, 80 steps of 25; accuracy on 1,000 test
    pictures.

The learning rate is chosen densely, from the grid below, on held-out training rows by a seed of its own; it is then the
same for all arms. Every finished run is written to results/backrazor_real_STUDY.json at once, and is not run again.
"pruned" keeps the fraction whose bytes are nearest to those of low-bit 0.1; "paper" cannot be as small, and has 0.1.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from backrazor import Razor
from backrazor_real_models import Dino, batches, data, minilm, pictures, some, sst2, tokenizer
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.intervals import mean_and_ci
from memtrain_common.measuring.memory import SavedActivations
from memtrain_common.models.llama2c import Llama2cTokenizer, load_llama2c
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
PRUNED_KEEPS = (0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.2)
Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Study:
    about: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Callable[[int], Iterator[Batch]]
    """The batches of a seed."""
    steps: int
    score: Callable[[nn.Module, str], float]
    """Accuracy in points, or nats, on "held-out" training rows or on the "test" rows."""
    metric: str
    learning_rates: tuple[float, ...]
    head: str = ""
    """Parameters whose names begin so have a rate of 1e-3."""


def stories() -> Study:
    folder = data() / "weights" / "stories260K"
    words = Llama2cTokenizer(folder / "tok512.bin")
    tokens = torch.tensor(words.encode((data() / "text" / "tinyshakespeare.txt").read_text()[:150_000]))
    held, test, train = tokens[:8_000], tokens[8_000:16_000], tokens[16_000:]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def blocks(of: Tensor, starts: list[int]) -> Batch:
        return torch.stack([of[s : s + 256] for s in starts]), torch.stack([of[s + 1 : s + 257] for s in starts])

    def order(seed: int) -> Iterator[Batch]:
        for rows in batches(len(train) // 256 - 1, 8, 60, seed):
            yield blocks(train, [256 * r for r in rows])

    def score(model: nn.Module, split: str) -> float:
        of = held if split == "held-out" else test
        starts = list(range(0, len(of) - 257, 256))
        return sum(loss(model, blocks(of, [s])).item() for s in starts) / len(starts)

    return Study(
        "stories260K to Tiny Shakespeare", lambda: load_llama2c(folder / "stories260K.bin"), loss, order, 60, score,
        "nats", (3e-4, 1e-3, 3e-3),
    )  # fmt: skip


def minilm_study() -> Study:
    rows, words = sst2("train"), tokenizer()
    chosen = some(960 + 500, 7)(len(rows))
    train, held = [rows[i] for i in chosen[:960]], [rows[i] for i in chosen[960:]]

    def batch(some_rows: list[tuple[str, int]]) -> Batch:
        return words([t for t, _ in some_rows], padding=True, return_tensors="pt"), torch.tensor(
            [y for _, y in some_rows]
        )

    def score(model: nn.Module, split: str) -> float:
        among = sorted(held if split == "held-out" else sst2("dev"), key=lambda row: len(row[0]))
        right = 0
        for i in range(0, len(among), 64):
            x, y = batch(among[i : i + 64])
            right += int((model(**x).logits.argmax(-1) == y).sum())
        return 100 * right / len(among)

    return Study(
        "MiniLM-L6 to SST-2, 960 rows", minilm, lambda m, b: F.cross_entropy(m(**b[0]).logits, b[1]),
        lambda seed: (batch([train[r] for r in mine]) for mine in batches(960, 16, 60, seed)), 60, score, "accuracy",
        (5e-5, 1e-4, 2e-4),
    )  # fmt: skip


def dino() -> Study:
    chosen = some(1300, 7)(50_000)
    x, y = pictures("train", lambda _: chosen, 98)
    test = pictures("test", some(1000, 8), 98)

    def score(model: nn.Module, split: str) -> float:
        xs, ys = (x[1000:], y[1000:]) if split == "held-out" else test
        found = torch.cat([model(part).argmax(-1) for part in xs.split(50)])
        return 100 * float((found == ys).float().mean())

    return Study(
        "DINOv2-small to CIFAR-10 as JPEG files, 98 px, 1,000 pictures", Dino,
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        lambda seed: ((x[mine], y[mine]) for mine in batches(1000, 25, 80, seed)), 80, score, "accuracy",
        (3e-5, 1e-4), "head",
    )  # fmt: skip


STUDIES: dict[str, Callable[[], Study]] = {"stories": stories, "minilm": minilm_study, "dino": dino}


def train(study: Study, rate: float, seed: int, context: Callable[[], Any], split: str) -> dict[str, float]:
    """One run: the score after its last step, and the mean training loss of the last ten."""
    torch.manual_seed(seed)
    model = study.build().train()
    own: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (head if study.head and name.startswith(study.head) else own).append(p)
    groups = [{"params": own, "peak": rate}, *([{"params": head, "peak": 1e-3}] if head else [])]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
    losses = []
    torch.manual_seed(seed)  # the same dropout masks for all arms
    for step, batch in enumerate(study.train(seed)):
        for group in optimizer.param_groups:  # 6 steps up, then down linearly
            group["lr"] = group["peak"] * min((step + 1) / 6, (study.steps - step) / (study.steps - 6))
        with context():
            loss = study.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return {"score": round(study.score(model, split), 5), "last_losses": round(sum(losses[-10:]) / 10, 5)}


def saved_bytes(study: Study, context: Callable[[], Any]) -> int:
    """Of the first batch of seed 0."""
    torch.manual_seed(0)
    model = study.build().train()
    with SavedActivations(model) as saved, context():
        loss = study.loss(model, next(iter(study.train(0))))
    held = sum(saved.by_layer().values())  # of what lives
    del loss
    return held


def arms_of(study: Study) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """The arms, and the bytes that each saves."""
    arms: dict[str, Callable[[], Any]] = {
        "dense": nullcontext,
        "low-bit 0.1": lambda: Razor(0.1),
        "low-bit 0.05": lambda: Razor(0.05),
    }
    aim = saved_bytes(study, arms["low-bit 0.1"])
    pruned = {k: saved_bytes(study, lambda k=k: Razor(k, mode="pruned")) for k in PRUNED_KEEPS}  # type: ignore[misc]
    keep = min(pruned, key=lambda k: abs(pruned[k] - aim))
    arms[f"pruned {keep:g}"] = lambda: Razor(keep, mode="pruned")
    arms["paper 0.1"] = lambda: Razor(0.1, mode="paper")
    return arms, {name: saved_bytes(study, context) for name, context in arms.items()}


def summary(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means with half of a 95 % interval, over the seeds that an arm shares with dense."""
    found = {}
    for arm, runs in scores.items():
        seeds = [s for s in runs if s in scores["dense"]]
        if len(seeds) > 1:
            own = [runs[s]["score"] for s in seeds]
            less = [runs[s]["score"] - scores["dense"][s]["score"] for s in seeds]
            found[arm] = {
                "seeds": len(seeds),
                **{
                    key: dict(zip(("mean", "ci95"), (round(v, 4) for v in mean_and_ci(values)), strict=True))
                    for key, values in (("score", own), ("less_dense", less))
                },
            }
    return found


def run(name: str) -> None:
    study = STUDIES[name]()
    path = RESULTS / f"backrazor_real_{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    rates: dict[str, float] = before.get("learning_rates_held_out", {})
    runs: dict[str, dict[str, Any]] = before.get("runs", {})
    arms, n_bytes = arms_of(study)
    runs = {arm: runs[arm] for arm in [*arms, *runs] if arm in runs}

    def write() -> None:
        write_results(
            path,
            argv=["python", "benchmarks/backrazor_real.py", name],
            device=torch.device("cpu"),
            seeds=sorted({int(s) for found in runs.values() for s in found}),
            about=study.about,
            metric=study.metric,
            learning_rates_held_out=rates,
            saved_bytes_of_a_step=n_bytes,
            times_less_saved={arm: round(n_bytes["dense"] / n, 2) for arm, n in n_bytes.items()},
            results=summary(runs) if "dense" in runs else {},
            runs=runs,
        )

    for rate in study.learning_rates:
        if str(rate) not in rates:
            rates[str(rate)] = train(study, rate, TUNING_SEED, nullcontext, "held-out")["score"]
            print(name, rate, rates[str(rate)], flush=True)
            write()
    best = (min if study.metric == "nats" else max)(rates, key=lambda r: rates[r])
    # the default mode beside dense first, then the others
    order = sorted(((s, a) for s in SEEDS for a in arms), key=lambda run: run[1].startswith(("pruned", "paper")))
    for seed, arm in order:
        if str(seed) not in runs.setdefault(arm, {}):
            runs[arm][str(seed)] = train(study, float(best), seed, arms[arm], "test")
            print(name, arm, seed, runs[arm][str(seed)], flush=True)
            write()


def main() -> None:
    if "MEMTRAIN_DATA" not in os.environ:
        raise UserError("MEMTRAIN_DATA must name the folder of real data files")
    torch.set_num_threads(1)
    for name in sys.argv[1:] or list(STUDIES):
        run(name)


if __name__ == "__main__":
    main()
