"""GLUE's rows as tokens: padded batches, the loss, and the benchmark's metrics over the development rows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from .glue import GlueSplit, glue_metrics, load_glue


@dataclass(frozen=True)
class Prepared:
    """A task's rows as tokens; made once for all runs on it."""

    ids: dict[str, list[dict[str, list[int]]]]
    """What the tokenizer gives for each row (input_ids, token_type_ids where it has them), by split."""
    labels: dict[str, Any]
    tokenizer: Any
    sha256: str
    """Of texts and labels."""
    parts: dict[str, str]
    """Hashes of each split's tokens and labels, which another tokenizer changes, and of how they are padded."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row["input_ids"]) for rows in self.ids.values() for row in rows)

    def batch(self, split: str, rows: Sequence[int], max_length: int = 0) -> dict[str, Tensor]:
        """The rows, padded to the longest of them or to ``max_length``: tensors (rows×tokens), labels (rows,)."""
        picked = [self.ids[split][i] for i in rows]
        how: dict[str, Any] = {"padding": "max_length", "max_length": max_length} if max_length else {}
        padded = self.tokenizer.pad(picked, return_tensors="pt", **how)
        return {**padded, "labels": torch.from_numpy(self.labels[split][np.asarray(rows)])}


def prepare_glue(
    task: str,
    data_dir: str,
    tokenizer: Any,
    *,
    max_length: int,
    max_train_samples: int = 0,
    max_eval_samples: int = 0,
) -> Prepared:
    """Read and tokenise a task.

    Args:
        task: a key of :data:`memtrain_common.data.text.glue.TASKS`.
        data_dir: GLUE's folders of TSV files; empty reads the hub's copy.
        tokenizer: of transformers.
        max_length: tokens a row is cut to.
        max_train_samples, max_eval_samples: take the first so many rows; 0 takes all.
    """
    sha = hashlib.sha256()
    ids, labels = {}, {}
    parts = {"padding": f"{tokenizer.pad_token_id} on the {tokenizer.padding_side}"}
    for split, rows in load_glue(task, data_dir or None).items():
        rows = _first(rows, max_train_samples if split == "train" else max_eval_samples)
        sha.update(json.dumps([split, rows.texts, rows.labels.tolist()]).encode())
        columns = [list(column) for column in zip(*rows.texts, strict=True)]
        special = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
        if max_length < special + len(columns):
            raise UserError(
                f"--max-length {max_length} leaves no word of {'each sentence' if len(columns) > 1 else 'a sentence'} "
                f"beside the tokenizer's {special} special tokens: give at least {special + len(columns)}"
            )
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        names = [name for name in encoded if name != "attention_mask"]
        ids[split] = [{name: encoded[name][i] for name in names} for i in range(len(rows))]
        labels[split] = rows.labels
        tokens = hashlib.sha256(json.dumps(rows.labels.tolist()).encode())
        for row in ids[split]:
            tokens.update(json.dumps(row).encode())
        parts[f"{split} tokens"] = tokens.hexdigest()
    return Prepared(ids, labels, tokenizer, sha.hexdigest(), parts)


def _first(rows: GlueSplit, n: int) -> GlueSplit:
    return GlueSplit(rows.texts[:n], rows.labels[:n]) if n else rows


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy, or the squared error of a score: the mean over rows, as the model's class has it."""
    return model(**batch).loss


def evaluation(task: str, prepared: Prepared, model: nn.Module, batch_size: int) -> dict[str, float]:
    """The task's metrics and the mean loss over the development rows, in their order."""
    device = next(model.parameters()).device
    outputs: dict[str, Any] = {}
    loss = 0.0
    for split in (s for s in prepared.ids if s != "train"):
        n = len(prepared.ids[split])
        logits = []
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            batch = {k: v.to(device) for k, v in prepared.batch(split, rows).items()}
            out = model(**batch)
            logits.append(out.logits.float().cpu())
            if split == "dev":
                loss += float(out.loss) * len(rows) / n
        outputs[split] = torch.cat(logits).numpy()
    labels = {split: prepared.labels[split] for split in outputs}
    return {**glue_metrics(task, outputs, labels), "loss": loss}
