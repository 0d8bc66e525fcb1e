"""What tests of transformers' Trainer share: a small BERT, rows for it, and a kill at a step."""

import torch
import transformers


class Killed(Exception):
    """Raised where a process would have been killed."""


def kill_at(step):
    """A callback that ends a run after its ``step``; None never does."""

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == step:
                raise Killed

    return Kill()


def small_bert(width=64, positions=16, seed=0):
    """A classifier of two classes, of 40 words and two blocks."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=positions,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def token_rows(length=8):
    """Forty rows, whose label is the parity of their tokens' sum."""
    tokens = torch.randint(0, 40, (40, length), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": t, "labels": int(t.sum() % 2)} for t in tokens]
