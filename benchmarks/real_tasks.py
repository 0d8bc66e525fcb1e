"""Real pretrained models with real tasks, small enough for one core: what ``real_study.py`` trains.

MiniLM-L6 (BERT) with SST-2, CoLA and RTE, DINOv2-small (ViT-S/14) and EfficientNet-Lite0 with CIFAR-10 as JPEG files
and with BreastMNIST, stories260K (Llama) with Tiny Shakespeare. Training, held-out and test rows never meet: rates are
chosen on held-out training rows, and what is reported is counted on the public dev or test rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from backrazor_real_models import (
    Dino,
    batches,
    data,
    efficientnet,
    minilm,
    normalized,
    pictures,
    some,
    tokenizer,
)
from memtrain_common.data.text.glue import TASKS as GLUE
from memtrain_common.data.text.glue import glue_metrics, read_split
from memtrain_common.models.llama2c import Llama2cTokenizer, load_llama2c
from torch import Tensor, nn

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class RealTask:
    about: str
    build: Callable[[], nn.Module]
    """The pretrained model with a fresh head, drawn by torch's generator."""
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Callable[[int], Iterator[Batch]]
    """The batches of a seed."""
    steps: int
    score: Callable[[nn.Module, str], float]
    """On "held-out" training rows or on the "test" rows."""
    metric: str
    rates: tuple[float, ...]
    """Grid of learning rates for training everything."""
    head_rates: bool = False
    """Whether the rate of a fresh head beside an adapter is searched too; else it is 1e-3."""


# -- sentences -----------------------------------------------------------------------------------------------------

Row = tuple[tuple[str, ...], int]
"""One text or two, and the label."""


def glue_rows(task: str, split: str) -> list[Row]:
    found = read_split(task, data() / "glue", split)
    return list(zip(found.texts, found.labels.tolist(), strict=True))


def sentences(
    glue: str, *, n: int, batch_size: int, steps: int, length: int = 128, grouped: bool = False,
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 4e-4),
) -> RealTask:  # fmt: skip
    """MiniLM to a task of GLUE: ``n`` training rows, 500 held out, all dev rows.

    Args:
        grouped: batches of rows of about one length, so that less of a batch is padding.
    """
    words, among = tokenizer(), glue_rows(glue, "train")
    chosen = some(n + 500, 7)(len(among))
    train, held = [among[i] for i in chosen[:n]], [among[i] for i in chosen[n:]]
    metric = GLUE[glue].metrics[0]

    def batch(rows: list[Row]) -> Batch:
        texts = [list(column) for column in zip(*(texts for texts, _ in rows), strict=True)]
        x = words(*texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return x, torch.tensor([y for _, y in rows])

    def score(model: nn.Module, split: str) -> float:
        asked = held if split == "held-out" else glue_rows(glue, "dev")
        asked = sorted(asked, key=lambda row: sum(map(len, row[0])))  # less padding
        logits = [model(**batch(asked[i : i + 64])[0]).logits for i in range(0, len(asked), 64)]
        labels = np.array([y for _, y in asked])
        return 100 * glue_metrics(glue, {"dev": torch.cat(logits).numpy()}, {"dev": labels})[metric]

    def drawn(seed: int) -> Iterator[Batch]:
        rows = batches(n, batch_size, steps, seed)
        if grouped:
            rows = by_length(rows, lambda r: sum(map(len, train[r][0])), seed)
        return (batch([train[r] for r in mine]) for mine in rows)

    about = f"MiniLM-L6 to {GLUE[glue].folder}, {n:,} rows of at most {length} tokens, {steps} steps of {batch_size}"
    return RealTask(
        about + (" of about one length" if grouped else ""), minilm,
        lambda m, b: F.cross_entropy(m(**b[0]).logits, b[1]), drawn, steps, score, metric, rates, head_rates=True,
    )  # fmt: skip


def by_length(drawn: Iterator[list[int]], length: Callable[[int], int], seed: int) -> Iterator[list[int]]:
    """The rows of eight batches at a time, sorted by length and dealt out again, in an order that the seed draws."""
    order = torch.Generator().manual_seed(seed)
    while eight := list(islice(drawn, 8)):
        rows, size = sorted((r for mine in eight for r in mine), key=length), len(eight[0])
        for i in torch.randperm(len(eight), generator=order).tolist():
            yield rows[i * size : (i + 1) * size]


# -- pictures ------------------------------------------------------------------------------------------------------


def classes(
    about: str, build: Callable[[], nn.Module], train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor], *, batch_size: int, steps: int, rates: tuple[float, ...],
) -> RealTask:  # fmt: skip
    """A classifier of pictures."""

    def score(model: nn.Module, split: str) -> float:
        xs, ys = held if split == "held-out" else test
        found = torch.cat([model(part).argmax(-1) for part in xs.split(50)])
        return 100 * float((found == ys).float().mean())

    x, y = train
    return RealTask(
        about, build, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        lambda seed: ((x[mine], y[mine]) for mine in batches(len(y), batch_size, steps, seed)), steps, score,
        "accuracy", rates,
    )  # fmt: skip


def cifar10(
    about: str, build: Callable[[], nn.Module], size: int, *, n: int, held_out: int, tested: int, **settings: Any
) -> RealTask:
    chosen = some(n + held_out, 7)(50_000)
    x, y = pictures("train", lambda _: chosen, size)
    test = pictures("test", some(tested, 8), size)
    return classes(about, build, (x[:n], y[:n]), (x[n:], y[n:]), test, **settings)


def dino(size: int, *, n: int = 1000, steps: int = 40, tested: int = 500) -> RealTask:
    about = f"DINOv2-small to CIFAR-10 as JPEG files, {size} px, {n:,} pictures, {steps} steps of 25"
    return cifar10(
        about, Dino, size, n=n, held_out=300, tested=tested, batch_size=25, steps=steps, rates=(1e-5, 3e-5, 1e-4)
    )  # fmt: skip


def breast(size: int, *, steps: int) -> RealTask:
    """BreastMNIST as it is split: 546 pictures to train, 78 held out, 156 to test; all in three equal channels."""
    found = np.load(data() / "medmnist" / "breastmnist.npz")

    def part(name: str) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(found[f"{name}_images"]).float()[:, None] / 255
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return normalized(x.expand(-1, 3, -1, -1)), torch.from_numpy(found[f"{name}_labels"]).long().flatten()

    about = f"DINOv2-small to BreastMNIST, {size} px, 546 pictures, {steps} steps of 26"
    return classes(
        about, partial(Dino, classes=2), part("train"), part("val"), part("test"), batch_size=26, steps=steps,
        rates=(1e-5, 3e-5, 1e-4, 3e-4),
    )  # fmt: skip


def with_frozen_batch_norms(build: Callable[[], nn.Module]) -> nn.Module:
    """Its batch norms use their running statistics and are not trained."""
    model = build()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.requires_grad_(False)
    model.register_forward_pre_hook(lambda *_: [norm.eval() for norm in norms] and None)
    return model


def lite0(frozen: bool = False, *, steps: int = 80) -> RealTask:
    norms = f"{steps} steps of 25, batch norms {'frozen' if frozen else 'trained'}"
    about = f"EfficientNet-Lite0 to CIFAR-10 as JPEG files, 112 px, 1,000 pictures, {norms}"
    build = partial(with_frozen_batch_norms, efficientnet) if frozen else efficientnet
    return cifar10(
        about,
        build,
        112,
        n=1000,
        held_out=300,
        tested=1000,
        batch_size=25,
        steps=steps,
        rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3) if frozen else (3e-4, 1e-3, 3e-3),
    )


# -- language ------------------------------------------------------------------------------------------------------


def stories() -> RealTask:
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

    return RealTask(
        "stories260K to Tiny Shakespeare, 60 steps of 8 × 256 tokens", lambda: load_llama2c(folder / "stories260K.bin"),
        loss, order, 60, score, "nats", (3e-4, 1e-3, 3e-3),
    )  # fmt: skip


TASKS: dict[str, Callable[[], RealTask]] = {
    "minilm-sst2": partial(sentences, "sst2", n=960, batch_size=16, steps=60),
    "minilm-sst2-lengths": partial(sentences, "sst2", n=960, batch_size=16, steps=60, grouped=True),
    "minilm-sst2-long": partial(
        sentences, "sst2", n=960, batch_size=16, steps=300, grouped=True, rates=(3e-5, 5e-5, 1e-4, 2e-4)
    ),
    "minilm-sst2-5000": partial(sentences, "sst2", n=5000, batch_size=16, steps=312, grouped=True),
    "minilm-cola": partial(
        sentences, "cola", n=4000, batch_size=32, steps=375, grouped=True, rates=(2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)
    ),
    "minilm-rte": partial(sentences, "rte", n=1920, batch_size=16, steps=120, length=64, grouped=True),
    "dinov2-cifar10": partial(dino, 98),
    "dinov2-cifar10-5000": partial(dino, 98, n=5000, steps=200, tested=2500),
    "dinov2-cifar10-56": partial(dino, 56),
    "dinov2-cifar10-56-long": partial(dino, 56, steps=200, tested=2500),
    "dinov2-breastmnist": partial(breast, 56, steps=84),
    "efficientnet-cifar10": lite0,
    "efficientnet-cifar10-frozen-norms": partial(lite0, True),
    "efficientnet-cifar10-frozen-norms-long": partial(lite0, True, steps=200),
    "stories": stories,
}


@cache
def task(name: str) -> RealTask:
    return TASKS[name]()
