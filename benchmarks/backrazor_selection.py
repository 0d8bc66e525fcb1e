"""Which elements should be kept? Gradient error on real activations: groups, blocks, samples, whole tensors.

A trained ResNet-20 on CIFAR-10's test pictures (nothing is trained or tuned on them: one backward pass) and a trained
language model on text. The error is that of all weight gradients together, ‖ĝ − g‖ / ‖g‖, beside their cosine.

    uv run python benchmarks/backrazor_selection.py --data-dir DATA
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from backrazor import Razor
from backrazor.saved import Dense, Geometry, Saved
from memtrain_common.data.images.folders import picture_folder
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.cifar_resnet import CifarResNet
from memtrain_common.models.classifiers import build_classifier
from memtrain_common.models.llama2c import Llama2cTokenizer, load_llama2c
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "backrazor_selection.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def largest(x: Tensor, k: int) -> Tensor:
    """Rows of ``x`` with all but their k largest magnitudes set to zero."""
    index = x.abs().topk(k, -1).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def blocks(n: int) -> Callable[[Tensor, float], Tensor]:
    """The largest of every n neighbours in memory."""

    def select(x: Tensor, keep: float) -> Tensor:
        flat = F.pad(x.reshape(-1), (0, -x.numel() % n)).view(-1, n)
        return largest(flat, max(1, round(n * keep))).view(-1)[: x.numel()].view(x.shape)

    return select


def samples(x: Tensor, keep: float) -> Tensor:
    flat = x.reshape(x.shape[0], -1)
    return largest(flat, max(1, round(flat.shape[1] * keep))).view(x.shape)


def whole(x: Tensor, keep: float) -> Tensor:
    return samples(x.reshape(1, -1), keep).view(x.shape)


WAYS: dict[str, Callable[[Tensor, float], Tensor] | None] = {
    "groups (pruned)": None,
    "30 neighbours": blocks(30),
    "256 neighbours": blocks(256),
    "sample": samples,
    "whole tensor": whole,
}


class Selecting(Razor):
    """A Razor that keeps what another way of selecting keeps, dense: for its gradients, not for its memory."""

    way: Callable[[Tensor, float], Tensor]

    def prune(self, x: Tensor, **_: Any) -> Saved:
        kept = self.way(x.detach(), self.keep).bfloat16().to(x.dtype)
        return Saved((kept,), Dense(Geometry.of(kept)))


def context(way: str, keep: float, **settings: Any) -> Razor:
    select = WAYS[way]
    if select is None:
        return Razor(keep, mode="pruned", **settings)
    razor = Selecting(keep, mode="pruned", **settings)
    razor.way = select
    return razor


def resnet(data: Path) -> tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]]]:
    weights = data / "weights" / "resnet_cifar10" / "resnet20-12fca82f.th"
    model = build_classifier("resnet20", 10, weights=str(weights)).model
    (archive,) = (data / "cifar10").glob("*.zip")
    test = picture_folder(archive).splits["test"]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()

    def batch(i: int) -> tuple[Tensor, Tensor]:
        rows = order[i * 64 : (i + 1) * 64]
        pixels = torch.stack([torch.from_numpy(test.images[r].copy()) for r in rows]).permute(0, 3, 1, 2) / 255
        shape = (1, 3, 1, 1)
        return (pixels - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape), torch.tensor(
            test.labels[rows]
        )

    return model, batch


def story(data: Path) -> tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]]]:
    folder = data / "weights" / "stories260K"
    model = load_llama2c(folder / "stories260K.bin")
    text = (data / "text" / "tinyshakespeare.txt").read_text()[:40_000]
    tokens = torch.tensor(Llama2cTokenizer(folder / "tok512.bin").encode(text))

    def batch(i: int) -> tuple[Tensor, Tensor]:
        part = tokens[i * 2048 : (i + 1) * 2048].view(8, 256)
        return part, part

    return model, batch


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(model, CifarResNet):
        return F.cross_entropy(model(x), y)
    return model(input_ids=x, labels=y).loss


def error(model: nn.Module, batch: tuple[Tensor, Tensor], razor: Razor) -> dict[str, float]:
    """Relative error and cosine of all weight gradients as one vector."""
    parameters = list(model.parameters())

    def flat(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()

    g = flat(loss_of(model, *batch))
    with razor:
        loss = loss_of(model, *batch)
    approximate = flat(loss)
    return {
        "error": float((approximate - g).norm() / g.norm()),
        "cosine": float(F.cosine_similarity(approximate, g, 0)),
    }


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with weights/, cifar10/ and text/")
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    rows = []
    for name, make in (("ResNet-20, CIFAR-10", resnet), ("stories260K (Llama), text", story)):
        model, batch = make(args.data_dir)
        model.train()
        arms: list[tuple[str, float, dict[str, Any]]] = [(way, keep, {}) for keep in (0.1, 0.03) for way in WAYS]
        arms += [("groups (pruned)", 0.1, {"derivative_bits": b}) for b in (3, 4)]
        arms += [("groups (pruned)", 0.1, {"values": v}) for v in ("fp32", "int8")]
        arms += [("groups (pruned)", 0.1, {"attention": "exact"}), ("groups (pruned)", 0.1, {"mode": "paper"})]
        for way, keep, settings in arms:
            found = mean([error(model, batch(i), context(way, keep, **settings)) for i in range(args.batches)])
            rows.append({"model": name, "way": way, "keep": keep, **settings, **found})
            what = f"{name:28} {way:18} keep {keep:<5} {settings!s:28}"
            print(f"{what} error {found['error']:.3f}  cosine {found['cosine']:.3f}")
    argv = ["DATA" if word == str(args.data_dir) else word for word in sys.argv]
    write_results(RESULTS, argv=argv, device=torch.device("cpu"), seeds=[0], batches=args.batches, rows=rows)


if __name__ == "__main__":
    main()
