"""How far the bases of LoRA-XS are from those of the official code where the spectrum has no gap.

A 1024×1024 weight with singular values k^-½. For each rank: ‖BA − B'A'‖/‖B'A'‖ of ours, LAPACK's and svd="official"
against scikit-learn's TruncatedSVD(n_iter=10, random_state=42), which the official code calls, and what part of the
best rank-r approximation's energy each carries. Mean, least and greatest over the seeds.

    uv run python benchmarks/lora_xs_official.py
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from lora_xs.svd import official_bases, svd_bases
from memtrain_common.console import Console
from memtrain_common.measuring.bench import write_results
from sklearn.decomposition import TruncatedSVD
from torch import Tensor

WIDTH, RANKS, SEEDS = 1024, (4, 8, 16, 25), (0, 1, 2)
OUT = Path(__file__).parent / "results" / "lora_xs_official.json"


def realistic(seed: int) -> Tensor:
    """(1024×1024) with σ_k = k^-½."""
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw)).Q for _ in range(2))
    return (U * torch.arange(1, WIDTH + 1) ** -0.5) @ V.t()


def main() -> None:
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        W = realistic(seed)
        for rank in RANKS:
            fitted = TruncatedSVD(rank, n_iter=10, random_state=42)
            product = torch.from_numpy(fitted.fit_transform(W.t().numpy()) @ fitted.components_).t()
            best = sum(1 / k for k in range(1, rank + 1))  # ‖W_r‖²
            ways = {
                "randomized": svd_bases(W, rank),
                "exact": svd_bases(W, rank, exact=True),
                "official": official_bases(W, rank),
            }
            for way, (A, B) in ways.items():
                distance = float((B @ A - product).norm() / product.norm())
                energy = float(A.square().sum()) / best
                rows.append({"seed": seed, "rank": rank, "svd": way, "distance": distance, "energy": energy})
            energy = float(product.square().sum()) / best
            rows.append({"seed": seed, "rank": rank, "svd": "scikit-learn", "distance": 0.0, "energy": energy})
    for rank in RANKS:
        for way in ("randomized", "exact", "official"):
            found = [row["distance"] for row in rows if (row["rank"], row["svd"]) == (rank, way)]
            spread = f"{statistics.mean(found):.2g} ({min(found):.2g} to {max(found):.2g})"
            Console().say(f"r = {rank:2}, {way:10}: {spread}")
    command = ["python", "benchmarks/lora_xs_official.py"]
    write_results(OUT, argv=command, device=torch.device("cpu"), seeds=SEEDS, rows=rows)


if __name__ == "__main__":
    main()
