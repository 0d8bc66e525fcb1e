"""How long the bases of LoRA-XS take, and whether they are the same subspace.

    python -m benchmarks.lora_xs_init --out benchmarks/results/lora_xs_init.json

1. A 4096×14336 weight at r = 64, float32: ours against scikit-learn's TruncatedSVD(n_iter=10,
   random_state=42), which the official code calls. Pairs, one after the other in one process, in alternating
   order; the ratio is that of each pair. Singular values 10·k^-½ with a gap after the 32nd and the 64th, over
   Gaussian noise.
2. RoBERTa-base's 48 weights at r = 16: first start, and start from the cache (weights are hashed each time).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn
import torch
from lora_xs import ROBERTA_TARGETS, LoRAXSConfig, inject, remove
from lora_xs.svd import svd_bases
from sklearn.decomposition import TruncatedSVD
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification


def planted(out: int, width: int, gaps: dict[int, float], noise: float) -> Tensor:
    """A matrix (out×width) with σ_k = 10·k^-½, divided by gaps[k] beyond k, plus Gaussian noise."""
    n = 512
    s = 10 * torch.arange(1, n + 1) ** -0.5
    for k, factor in gaps.items():
        s[k:] /= factor
    U = torch.linalg.qr(torch.randn(out, n)).Q
    V = torch.linalg.qr(torch.randn(width, n)).Q
    return (U * s) @ V.t() + noise * torch.randn(out, width)


def sine(X: Tensor, reference: Tensor) -> float:
    """Sine of the largest principal angle between the spans of orthonormal columns."""
    X, reference = X.double(), reference.double()
    return float(torch.linalg.matrix_norm(X - reference @ (reference.t() @ X), 2))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def decompositions(pairs: int, rank: int, shape: tuple[int, int], seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    gaps = {rank // 2: 1.5, rank: 2.0}
    W = planted(*shape, gaps=gaps, noise=0.004)
    transposed = W.t().numpy()  # as the official code passes it; a view

    def theirs() -> Tensor:
        fitted = TruncatedSVD(rank, n_iter=10, random_state=42).fit(transposed)
        return torch.from_numpy(fitted.components_.copy()).t()

    def ours() -> Tensor:
        return svd_bases(W, rank)[1]

    svd_bases(W[:512, :512].contiguous(), 8)  # loads the libraries
    times: dict[str, list[float]] = {"lora_xs": [], "sklearn": []}
    B = S = torch.empty(0)
    for i in range(pairs):
        for name in ("lora_xs", "sklearn") if i % 2 == 0 else ("sklearn", "lora_xs"):
            seconds, bases = timed(ours if name == "lora_xs" else theirs)
            times[name].append(seconds)
            B, S = (bases, S) if name == "lora_xs" else (B, bases)
    _, exact = svd_bases(W, rank, exact=True)
    return {
        "shape": shape,
        "rank": rank,
        "gaps": {str(k): v for k, v in gaps.items()},
        "seconds": {name: spread(values) for name, values in times.items()},
        "speedup": spread([b / a for a, b in zip(times["lora_xs"], times["sklearn"], strict=True)]),
        "sine_of_largest_angle": {
            f"first {k}": {
                "lora_xs to LAPACK": sine(B[:, :k], exact[:, :k]),
                "sklearn to LAPACK": sine(S[:, :k], exact[:, :k]),
                "lora_xs to sklearn": sine(B[:, :k], S[:, :k]),
            }
            for k in gaps
        },
    }


def starts(repeats: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, max_position_embeddings=514))
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    config = LoRAXSConfig(16, alpha=16, targets=ROBERTA_TARGETS)
    cold, warm = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(timed(lambda: inject(model, config, cache=folder))[0])
            remove(model)
            for p in model.parameters():
                p.data = p.data.clone()  # elsewhere in memory: no digest from before is taken
            warm.append(timed(lambda: inject(model, config, cache=folder))[0])
            remove(model)
    return {
        "model": "RobertaForSequenceClassification, base shape, Gaussian weights",
        "modules": 48,
        "rank": 16,
        "first_start_seconds": spread(cold),
        "cached_start_seconds": spread(warm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "benchmark": "lora_xs_init",
        "command": "python -m benchmarks.lora_xs_init " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.processor() or platform.machine()} CPU, {args.threads} thread(s)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sklearn": sklearn.__version__,
        },
        "seeds": [args.seed],
        "decomposition": decompositions(args.pairs, 64, (4096, 14336), args.seed),
        "start": starts(args.pairs, args.seed),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
