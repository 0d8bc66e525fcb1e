"""Time and saved activations of a training step: LoRA-XS over PEFT's LoRA at the same rank and modules.

RoBERTa-base's shape with random weights, a classifier for a task head, AdamW, the paper's four modules a layer. Both
models live in one process and take steps in turn on the same batch. Saved activations are the bytes that autograd keeps
for one backward pass, parameters aside, each storage counted once.

    uv run python benchmarks/lora_xs_step.py
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import peft
import torch
import tyro
from lora_xs import ROBERTA_TARGETS, LoRAXSConfig, inject
from memtrain_common.console import Console
from memtrain_common.measuring.bench import pairwise, write_results
from memtrain_common.measuring.memory import SavedActivations
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

Method = Literal["lora_xs", "peft_lora"]
OUT = Path(__file__).parent / "results" / "lora_xs_step.json"


def base() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514)
    return RobertaForSequenceClassification(config).train()


def build(method: Method, rank: int) -> nn.Module:
    if method == "lora_xs":
        return inject(base(), LoRAXSConfig(rank, alpha=16, targets=ROBERTA_TARGETS), cache=False)
    lora = peft.LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=list(ROBERTA_TARGETS), task_type="SEQ_CLS"
    )
    return peft.get_peft_model(base(), lora)


class Trainer:
    """One model with its optimizer."""

    def __init__(self, method: Method, rank: int, ids: Tensor, labels: Tensor) -> None:
        self.model = build(method, rank)
        self.inputs = {"input_ids": ids, "labels": labels}
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(**self.inputs).loss.backward()
        self.optimizer.step()

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps for one backward pass."""
        with SavedActivations(self.model) as saved:
            out = self.model(**self.inputs)  # held: it is what keeps them
        size = sum(saved.by_layer().values())
        del out
        return size


def compare(rank: int, pairs: int, batch: int, length: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    ids, labels = torch.randint(5, 50000, (batch, length)), torch.randint(0, 2, (batch,))
    ours, theirs = (Trainer(method, rank, ids, labels) for method in get_args(Method))
    time = pairwise(ours.step, theirs.step, pairs=pairs)
    saved = {"lora_xs": ours.saved_bytes(), "peft_lora": theirs.saved_bytes()}
    head = sum(p.numel() for n, p in base().named_parameters() if n.startswith("classifier"))
    return {
        "rank": rank,
        "batch": batch,
        "tokens_per_row": length,
        "trained_parameters_without_head": {
            name: sum(p.numel() for p in t.trained) - head for name, t in (("lora_xs", ours), ("peft_lora", theirs))
        },
        "step_time_of_ours_over_peft": dataclasses.asdict(time),
        "saved_activation_bytes": saved,
        "saved_activations_of_ours_over_peft": saved["lora_xs"] / saved["peft_lora"],
    }


def main(
    ranks: tuple[int, ...] = (4, 16),
    pairs: int = 20,
    batch: int = 4,
    length: int = 64,
    threads: int = 1,
    out: Path = OUT,
) -> None:
    """
    Args:
        ranks: of both methods.
        pairs: of steps.
        batch: rows.
        length: tokens of a row.
        threads: of torch.
        out: where the results go.
    """
    torch.set_num_threads(threads)
    console = Console()
    runs = [compare(rank, pairs, batch, length) for rank in ranks]
    console.say("\n".join(map(str, runs)))
    write_results(
        out,
        argv=["python", "benchmarks/lora_xs_step.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=[0],
        threads=threads,
        runs=runs,
    )
    console.say(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
