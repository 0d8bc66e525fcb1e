"""How long the bases of LoRA-XS take, and whether they are the same subspace.

1. A 4096×14336 weight at r = 64, float32: scikit-learn's TruncatedSVD(n_iter=10, random_state=42), which the official
   code calls, over ours, pair by pair. Singular values 10·k^-½ with a gap after the 32nd and the 64th, over Gaussian
   noise, which closes the second gap.
2. RoBERTa-base's 48 weights at r = 16: first start over the start from the cache (weights are hashed each time).

    uv run python benchmarks/lora_xs_init.py
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from lora_xs import ROBERTA_TARGETS, LoRAXSConfig, inject, remove
from lora_xs.svd import svd_bases
from memtrain_common.console import Console
from memtrain_common.measuring.bench import pairwise, ratio_of, write_results
from sklearn.decomposition import TruncatedSVD
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

SHAPE, RANK = (4096, 14336), 64
GAPS = {RANK // 2: 1.5, RANK: 2.0}
NOISE = 0.004
OUT = Path(__file__).parent / "results" / "lora_xs_init.json"


def planted() -> Tensor:
    """A matrix with σ_k = 10·k^-½, divided by GAPS[k] beyond k, plus Gaussian noise."""
    n = 512
    s = 10 * torch.arange(1, n + 1) ** -0.5
    for k, factor in GAPS.items():
        s[k:] /= factor
    U, V = (torch.linalg.qr(torch.randn(size, n)).Q for size in SHAPE)
    return (U * s) @ V.t() + NOISE * torch.randn(*SHAPE)


def sine(X: Tensor, reference: Tensor) -> float:
    """Sine of the largest principal angle between the spans of orthonormal columns."""
    X, reference = X.double(), reference.double()
    return float(torch.linalg.matrix_norm(X - reference @ (reference.t() @ X), 2))


def decompositions(pairs: int) -> dict[str, Any]:
    W = planted()
    transposed = W.t().numpy()  # as the official code passes it; a view
    kept: dict[str, Tensor] = {}

    def theirs() -> None:
        fitted = TruncatedSVD(RANK, n_iter=10, random_state=42).fit(transposed)
        kept["sklearn"] = torch.from_numpy(fitted.components_.copy()).t()

    def ours() -> None:
        kept["A"], kept["lora_xs"] = svd_bases(W, RANK)

    speedup = pairwise(theirs, ours, pairs=pairs, warmup=1)
    torch.set_num_threads(os.cpu_count() or 1)  # nothing is timed here
    exact_A, exact = svd_bases(W, RANK, exact=True)
    lost = 1 - torch.linalg.vector_norm(kept["A"], dim=1) / torch.linalg.vector_norm(exact_A, dim=1)
    return {
        "shape": SHAPE,
        "rank": RANK,
        "gaps": {str(k): v for k, v in GAPS.items()},
        "time_of_sklearn_over_ours": dataclasses.asdict(speedup),
        "sine_of_largest_angle": {
            f"first {k}": {
                "lora_xs to LAPACK": sine(kept["lora_xs"][:, :k], exact[:, :k]),
                "sklearn to LAPACK": sine(kept["sklearn"][:, :k], exact[:, :k]),
            }
            for k in GAPS
        },
        "largest_relative_loss_of_a_singular_value": float(lost.max()),
    }


def starts(repeats: int) -> dict[str, Any]:
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, max_position_embeddings=514))
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    config = LoRAXSConfig(16, alpha=16, targets=ROBERTA_TARGETS)
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for times in (cold, warm):
                for p in model.parameters():
                    p.data = p.data.clone()  # elsewhere in memory: no digest from before is taken
                times.append(seconds(lambda: inject(model, config, cache=folder)))
                remove(model)
    return {
        "model": "RobertaForSequenceClassification, base shape, Gaussian weights",
        "modules": 48,
        "rank": 16,
        "first_start_seconds": statistics.median(cold),
        "cached_start_seconds": statistics.median(warm),
        "longest_cached_start_seconds": max(warm),
        "first_over_cached": dataclasses.asdict(ratio_of([a / b for a, b in zip(cold, warm, strict=True)])),
    }


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(pairs: int = 7, starts_too: int = 5, threads: int = 1, out: Path = OUT) -> None:
    """
    Args:
        pairs: of decompositions.
        starts_too: pairs of starts.
        threads: of torch and of scikit-learn.
        out: where the results go.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    console = Console()
    decomposition = decompositions(pairs)
    console.say(f"{decomposition}")
    torch.set_num_threads(threads)
    start = starts(starts_too)
    console.say(f"{start}")
    write_results(
        out,
        argv=["python", "benchmarks/lora_xs_init.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=[0],
        threads=threads,
        decomposition=decomposition,
        start=start,
    )
    console.say(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
