"""Where do the bytes of an LTE step go, and from which rank on does it hold no more than full training?

    python benchmarks/lte_memory.py

lte-train's default model and batch (4 layers, width 128, 16 × 64 bytes) with AdamW, float32, predicted without
allocating anything (memtrain_common.measuring.prediction); lte-train's own ledgers measure the first two rows. In one
process with all heads, and on one of four processes with a head and a quarter of the batch.
"""

from pathlib import Path
from typing import Any

import torch
from lte import LTEConfig, Ranks, inject, param_groups
from memtrain_common.measuring.bench import write_results
from memtrain_common.measuring.prediction import predict
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from torch import nn

RESULT = Path(__file__).parent / "results" / "lte_memory.json"
COPIES = {"replicas": ("embeddings", "norms")}
WAYS: dict[str, dict[str, Any] | None] = {
    "full training": None,
    "r = 64": {"rank": 64},
    "r = 64, B reset at merges": {"rank": 64, "reset": "B"},
    "r = 16": {"rank": 16},
    "r = 16, B reset at merges": {"rank": 16, "reset": "B"},
    "r = 8": {"rank": 8},
}
APART: dict[str, dict[str, Any] | None] = {
    "full training": None,
    "r = 64": {"rank": 64, **COPIES},
    "r = 64, sparse merges": {"rank": 64, **COPIES, "merge_density": 0.03},
    "r = 8": {"rank": 8, **COPIES},
}


def step(options: dict[str, Any] | None, processes: int) -> dict[str, Any]:
    """Bytes by category of one process's step."""
    ranks = Ranks.alone()
    ranks.size = processes

    def build() -> nn.Module:
        model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=128))
        return model if options is None else inject(model, LTEConfig(heads=4, alpha=256.0, **options), ranks)

    def loss(model: nn.Module) -> torch.Tensor:
        tokens = torch.zeros(16 // processes, 65, dtype=torch.long)
        return next_token_loss(model, (tokens[:, :-1], tokens[:, 1:]))

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": list(model.parameters())}]
        return torch.optim.AdamW(
            groups if options is None else param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0)
        )

    totals = predict(build, loss, optimizer).ledger.totals
    return {**totals, "in_all": sum(totals.values())}


def main() -> None:
    rows = []
    for processes, ways in ((1, WAYS), (4, APART)):
        full = 0
        for name, options in ways.items():
            row = step(options, processes)
            full = full or row["in_all"]
            rows.append({"processes": processes, "way": name, **row, "over_full": round(row["in_all"] / full, 3)})
            print(rows[-1], flush=True)
    write_results(RESULT, argv=["python", "benchmarks/lte_memory.py"], device=torch.device("cpu"), seeds=[], rows=rows)


if __name__ == "__main__":
    main()
