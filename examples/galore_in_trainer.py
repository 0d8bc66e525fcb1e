"""GaLore in transformers' Trainer: a run that is stopped half way and resumed ends with the same bytes."""

from tempfile import TemporaryDirectory

import torch
from digits import digits, network
from galore_vit import state_bytes
from galore_vit.hf import galore_optimizer
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

x, y, _, _ = digits()
rows = [{"pixels": row, "labels": int(label)} for row, label in zip(x, y, strict=True)]


class Network(torch.nn.Sequential):  # Trainer takes any module that returns its loss
    def forward(self, pixels, labels):
        return {"loss": cross_entropy(super().forward(pixels), labels)}


def trainer(folder: str, stop_at: int = 0) -> Trainer:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == stop_at

    set_seed(0)
    model, quiet = Network(network()), dict(disable_tqdm=True, report_to="none")
    args = TrainingArguments(folder, max_steps=40, save_steps=20, learning_rate=3e-3, weight_decay=0.01, **quiet)
    optimizer = galore_optimizer(model, args, rank=8, update_proj_gap=7)  # lr and the rest come from args
    return Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None), callbacks=[Stop()])


with TemporaryDirectory() as one, TemporaryDirectory() as two:
    straight, stopped, resumed = trainer(one), trainer(two, stop_at=20), trainer(two)
    straight.train(), stopped.train(), resumed.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, straight.model.parameters(), resumed.model.parameters()))
    print(f"equal after {resumed.state.global_step} steps; {state_bytes(straight.optimizer) / 1024:.0f} KiB of state")
