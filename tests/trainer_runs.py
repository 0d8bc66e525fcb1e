"""What tests of transformers' Trainer share: a small BERT, rows for it, a run that is killed, and runs on two."""

import os
import signal
from pathlib import Path

import accelerate
import torch
import transformers
from support import Forked, free_port, torchrun_environment


class Kill(transformers.TrainerCallback):
    """Kills its own process after a step, before Trainer saves anything of it."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_killed(trainer, step):
    """Train in a process of its own, which is killed after its ``step``.

    Args:
        trainer: makes the Trainer.
    """

    def main():
        run = trainer()
        run.add_callback(Kill(step))
        run.train()

    done = Forked(main, ["trainer"], Path.cwd()).wait()
    assert done.returncode == -signal.SIGKILL, done.stderr


def on_two(function, *args):
    """Call a function in two processes as torchrun would start them; -> how they ended."""

    def main():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # it remembers that there was one
        function(*args)

    port = free_port()
    ranks = [Forked(main, ["trainer"], Path.cwd(), environment=torchrun_environment(r, 2, port)) for r in range(2)]
    return [rank.wait() for rank in ranks]


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
