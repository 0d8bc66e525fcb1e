"""``lora-xs glue`` on GLUE's real files, with a small encoder that is made here: the whole path, and its metrics.

The encoder (BERT's vocabulary, 2 layers, width 64) learns masked words of the three training sets for a few hundred
steps, so its scores say nothing of LoRA-XS on real encoders; they say that the path from TSV to metric is whole.
Needs MEMTRAIN_DATA.

    MEMTRAIN_DATA=… python benchmarks/lora_xs_glue.py
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from lora_xs.tasks.glue import run_glue
from lora_xs.tasks.glue_flags import PRESETS, GlueConfig
from memtrain_common.bench import write_results
from memtrain_common.console import Console
from memtrain_common.data_order import epoch_batch, random_bits
from memtrain_common.glue import read_split
from memtrain_common.loop import FitConfig, fit
from memtrain_common.rng import seed_all
from torch import Tensor, nn

TASKS = {"cola": 2.0, "rte": 4.0, "sst2": 0.5}  # epochs
OUT = Path(__file__).parent / "results" / "lora_xs_glue.json"
BATCH = 32


def make_encoder(data: Path, folder: Path, steps: int) -> float:
    """Train a small BERT on masked words and save it with its tokenizer; -> the last loss."""
    seed_all(0)
    tokenizer = transformers.BertTokenizer(str(data / "tokenizers/bert-base-uncased/vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = transformers.BertForMaskedLM(config)
    texts = [" ".join(t) for task in TASKS for t in read_split(task, data / "glue", "train").texts]
    mask = tokenizer.mask_token_id

    def batches(i: int) -> dict[str, Tensor]:
        picked = [texts[j] for j in epoch_batch(0, i, batch=BATCH, size=len(texts))]
        rows = tokenizer(picked, truncation=True, max_length=32, padding=True, return_tensors="pt")
        ids = rows["input_ids"]
        draw = torch.from_numpy((random_bits(0, i, size=ids.numel()) >> 11).astype("float64") * 2.0**-53).view_as(ids)
        hidden = (draw < 0.15) & (ids > 999)  # no special tokens
        labels = torch.where(hidden, ids, -100)
        return {**rows, "input_ids": ids.masked_fill(hidden, mask), "labels": labels}

    losses: list[float] = []

    def loss_of(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = m(**batch).loss
        losses.append(float(loss.detach()))
        return loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    fit(model, batches, loss_of, optimizer, FitConfig(steps))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(losses[-20:]) / len(losses[-20:])


def main(steps: int = 200, rank: int = 16, out: Path = OUT) -> None:
    """
    Args:
        steps: of the encoder's training.
        rank: of LoRA-XS.
        out: where the results go.
    """
    data = Path(os.environ["MEMTRAIN_DATA"])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loss = make_encoder(data, folder / "encoder", steps)
        for task, epochs in TASKS.items():
            config: GlueConfig = replace(
                PRESETS["scratch"], task=task, model=str(folder / "encoder"), data_dir=str(data / "glue"), rank=rank,
                epochs=epochs, out=str(folder / task), tracker="none",
            )  # fmt: skip
            metrics = run_glue(config, [])
            trained = json.loads((folder / task / "memory.json").read_text())["totals"]["gradients"] // 4
            adapter = (folder / task / "adapter" / "adapter.safetensors").stat().st_size
            kept = {k: v for k, v in asdict(config).items() if k in ("learning_rate", "head_learning_rate", "epochs")}
            results[task] = {**metrics, **kept, "trained_with_head": trained, "adapter_bytes": adapter}
    write_results(
        out,
        argv=["python", "benchmarks/lora_xs_glue.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=[0],
        encoder={"layers": 2, "width": 64, "steps": steps, "masked_word_loss": loss},
        rank=rank,
        tasks=results,
    )
    Console().say(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
