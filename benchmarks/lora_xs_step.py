"""Time and saved activations of a training step: LoRA-XS beside PEFT's LoRA at the same rank and modules.

    python -m benchmarks.lora_xs_step --out benchmarks/results/lora_xs_step.json

RoBERTa-base's shape with random weights, a classifier for a task head, AdamW, the paper's four modules a
layer. Both models live in one process and take steps in turn on the same batch, in alternating order; the
ratio is that of each pair. Saved activations are the bytes of all storages that autograd keeps for one
backward pass, parameters aside, each counted once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from lora_xs import ROBERTA_TARGETS, LoRAXSConfig, inject
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification


def base(seed: int) -> RobertaForSequenceClassification:
    torch.manual_seed(seed)
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514)
    return RobertaForSequenceClassification(config).train()


def build(method: str, rank: int, seed: int) -> nn.Module:
    model = base(seed)
    if method == "lora_xs":
        return inject(model, LoRAXSConfig(rank, alpha=16, targets=ROBERTA_TARGETS), cache=False)
    lora = peft.LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=list(ROBERTA_TARGETS), task_type="SEQ_CLS"
    )
    return peft.get_peft_model(model, lora)


class Trainer:
    """One model with its optimizer."""

    def __init__(self, method: str, rank: int, seed: int) -> None:
        self.model = build(method, rank, seed)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3)

    def step(self, ids: Tensor, labels: Tensor) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(input_ids=ids, labels=labels).loss.backward()
        self.optimizer.step()
        return time.perf_counter() - begin

    def saved_bytes(self, ids: Tensor, labels: Tensor) -> int:
        """Bytes that autograd keeps for one backward pass."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage  # held, so that its address is not used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.model(input_ids=ids, labels=labels)
        return sum(storage.nbytes() for storage in kept.values())


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def compare(rank: int, pairs: int, batch: int, length: int, seed: int) -> dict[str, Any]:
    trainers = {method: Trainer(method, rank, seed) for method in ("lora_xs", "peft_lora")}
    ids = torch.randint(5, 50000, (batch, length))
    labels = torch.randint(0, 2, (batch,))
    for trainer in trainers.values():
        trainer.step(ids, labels)
    times: dict[str, list[float]] = {method: [] for method in trainers}
    for i in range(pairs):
        for method in list(trainers) if i % 2 == 0 else list(trainers)[::-1]:
            times[method].append(trainers[method].step(ids, labels))
    saved = {method: trainer.saved_bytes(ids, labels) for method, trainer in trainers.items()}
    head = sum(p.numel() for n, p in base(seed).named_parameters() if n.startswith("classifier"))
    return {
        "rank": rank,
        "batch": batch,
        "tokens_per_row": length,
        "trained_parameters_without_head": {
            method: sum(p.numel() for p in trainer.parameters) - head for method, trainer in trainers.items()
        },
        "seconds_per_step": {method: spread(values) for method, values in times.items()},
        "time_ratio_lora_xs_to_peft": spread(
            [a / b for a, b in zip(times["lora_xs"], times["peft_lora"], strict=True)]
        ),
        "saved_activation_bytes": saved,
        "saved_ratio_lora_xs_to_peft": saved["lora_xs"] / saved["peft_lora"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "benchmark": "lora_xs_step",
        "command": "python -m benchmarks.lora_xs_step " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.processor() or platform.machine()} CPU, {args.threads} thread(s)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
        },
        "seeds": [args.seed],
        "runs": [compare(rank, args.pairs, args.batch, args.length, args.seed) for rank in args.ranks],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
