"""Instructions as tokens: prompts masked from the loss, padded batches, and a batch's share of a process."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .instruct import Example, Row, find_file, read_rows, rows_from_hub

IGNORED = -100  # the label that cross entropy passes over
# data: (file names, hub name, its split)
SETS = {
    "metamathqa": (("MetaMathQA-395K.json", "MetaMathQA.json", "metamathqa.jsonl"), "meta-math/MetaMathQA", "train"),
    "commonsense": (("commonsense_170k.json", "commonsense_170k.jsonl"), "zwhe99/commonsense_170k", "train"),
}


@dataclass(frozen=True)
class Tokens:
    """One row: the prompt's tokens, then the response's."""

    ids: list[int]
    prompt: int
    """Tokens of the prompt, which the loss passes over."""


def load_rows(data: str, data_dir: str, limit: int | None = None) -> list[Row]:
    """The training rows of a known set or a file.

    Args:
        data: metamathqa, commonsense, or a JSON or JSON Lines file.
        data_dir: the known set's folder or file; empty reads it from the hub.
        limit: of the first rows; None takes all.
    """
    if data in SETS:
        names, hub, split = SETS[data]
        if data_dir:
            return read_rows(find_file(Path(data_dir), names), limit)
        return rows_from_hub(hub, None, split, limit)
    if not Path(data).is_file():
        raise UserError(f"there is no file {data}: --data takes {', '.join(SETS)} or a JSON or JSON Lines file")
    return read_rows(Path(data), limit)


def tokenize(example: Example, tokenizer: Any, max_length: int) -> Tokens:
    """Prompt, response and the end token, cut to ``max_length``. A token across the border belongs to the response."""
    prompt = tokenizer(example.prompt)["input_ids"]
    ids = tokenizer(example.prompt + example.response)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return Tokens(ids[:max_length], same)


def with_response(pairs: Sequence[Example], tokenizer: Any, *, data: str, max_length: int, needed: int) -> list[Tokens]:
    """The rows whose response begins within ``max_length`` tokens.

    Raises:
        UserError: if fewer than ``needed`` do: how many, and what the shortest row takes.
    """
    kept = [r for r in (tokenize(e, tokenizer, max_length) for e in pairs) if len(r.ids) > r.prompt]
    if len(kept) < needed:
        shortest = min((len(tokenize(e, tokenizer, 2**62).ids) for e in pairs), default=0)
        raise UserError(
            f"{data} has {len(kept)} rows with a response within --max-length {max_length} tokens, and at least "
            f"{needed} are needed: it has {len(pairs):,} rows, and the shortest of them takes {shortest} tokens"
        )
    return kept


def collate(rows: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Rows padded on the right: input_ids, attention_mask and labels, each (rows×tokens)."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = 1
        labels[i, row.prompt : n] = ids[i, row.prompt : n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scored_tokens(labels: Tensor) -> int:
    """How many labels (rows×tokens) the loss looks at: each is scored by the token before it."""
    return int((labels[:, 1:] != IGNORED).sum())


def shared_batch(rows: Sequence[Tokens], pad_id: int, rank: int, size: int) -> dict[str, Tensor]:
    """This process's rows of a micro-batch, and the "weight" that makes the processes' mean the micro-batch's own."""
    parts = [collate(rows[r::size], pad_id) for r in range(size)]
    counts = [scored_tokens(part["labels"]) for part in parts]
    return {**parts[rank], "weight": torch.tensor(counts[rank] * size / sum(counts))}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy over the responses' tokens: those of a whole micro-batch weigh alike, on any number of
    processes."""
    inputs = {name: value for name, value in batch.items() if name != "weight"}
    loss = model(**inputs, use_cache=False).loss
    return loss * batch["weight"] if "weight" in batch else loss
