"""The ledger in Trainer's log: its numbers are those that the loop measures."""

import json

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from memtrain_common.hf import MemoryLedgerCallback, why_no_saving  # noqa: E402
from memtrain_common.measuring.memory import SavedActivations, measure  # noqa: E402

pytestmark = pytest.mark.usefixtures("libraries_frozen")


class Net(nn.Module):
    def __init__(self, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(24, 48), nn.Linear(48, 3)
        self.body.requires_grad_(not frozen)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.head(self.body(x).relu()), labels)}


def rows(n=16):
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(24, generator=draw), "labels": i % 3} for i in range(n)]


def run(folder, *, model=None, with_trainer=True, step=1, **words):
    args = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no", logging_steps=1, **words,
    )  # fmt: skip
    trainer = transformers.Trainer(model or Net(), args, train_dataset=rows(), eval_dataset=rows(4))
    callback = MemoryLedgerCallback(trainer if with_trainer else None, step=step)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def by_hand(model, batch=4):
    """The same step in a loop of one's own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = torch.stack([r["x"] for r in rows()[:batch]])
    with SavedActivations(model) as saved:
        loss = model(x, torch.tensor([r["labels"] for r in rows()[:batch]]))["loss"]
    activations = saved.by_layer()
    loss.backward()
    optimizer.step()
    return measure(model, optimizer, activations)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_ledger_is_that_of_a_step_by_hand(tmp_path, frozen, accumulated, capsys):
    trainer, callback = run(tmp_path, model=Net(frozen), gradient_accumulation_steps=accumulated)
    expected = by_hand(Net(frozen))
    assert callback.ledger.totals == expected.totals
    assert callback.ledger.bytes_by_layer == expected.bytes_by_layer
    logged = next(entry for entry in trainer.state.log_history if "memory/total" in entry)
    assert logged["step"] == 1
    for category, n in expected.totals.items():
        assert logged[f"memory/{category}"] == pytest.approx(n / 2**20)
    assert logged["memory/total"] == pytest.approx(sum(expected.totals.values()) / 2**20)
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["totals"] == expected.totals
    printed = capsys.readouterr().out
    assert all(line in printed for line in written["why_no_saving"])


def test_without_a_trainer_it_is_in_the_history_and_a_later_step_can_be_measured(tmp_path):
    trainer, callback = run(tmp_path, with_trainer=False, step=3, eval_strategy="steps", eval_steps=2)
    (entry,) = [e for e in trainer.state.log_history if "memory/total" in e]
    assert entry["step"] == 3
    peaks = {k for e in trainer.state.log_history for k in e if "peak" in k}
    assert peaks in ({"memory/peak_train", "memory/peak_evaluation"}, set())  # where the system tells
    assert not trainer.model._forward_hooks
    assert not trainer.model._forward_pre_hooks
    assert callback.ledger.total("activations") == by_hand(Net()).total("activations")


class Failing(transformers.Trainer):
    """Raises in the first step: before the forward pass, in it, or after it."""

    failing: str | None = None

    def compute_loss(self, model, inputs, **words):
        if self.failing == "before":
            raise KeyError("mine")
        if self.failing == "in":
            inputs["labels"] = inputs["labels"].new_full((4,), 7)
        loss = super().compute_loss(model, inputs, **words)
        if self.failing == "after":
            raise KeyError("mine")
        return loss


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(("failing", "error"), [("before", KeyError), ("in", IndexError), ("after", KeyError)])
def test_a_step_that_raises_leaves_no_hook_and_the_next_training_is_measured(tmp_path, failing, error, same):
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    model = Net()
    trainer = Failing(model, args, train_dataset=rows())
    trainer.add_callback(callback := MemoryLedgerCallback(trainer))
    trainer.failing = failing
    with pytest.raises(error):
        trainer.train()
    assert not model._forward_hooks
    assert len(model._forward_pre_hooks) == (failing == "before")  # waits for the pass that never came
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.children())
    trainer.failing = None
    if not same:
        trainer = transformers.Trainer(model, args, train_dataset=rows())
        trainer.add_callback(callback := MemoryLedgerCallback(trainer))
    trainer.train()
    assert callback.ledger.totals == by_hand(Net()).totals
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_step_that_never_comes_is_told(tmp_path):
    with pytest.warns(UserWarning, match="ended at step 3, before the memory of step 9 was measured"):
        run(tmp_path, step=9)


def test_the_sentences_are_bounds(tmp_path):
    model = Net(frozen=True)
    ledger = by_hand(model)
    lines = why_no_saving(model, ledger)
    share = ledger.total("optimizer") / sum(ledger.totals.values())
    assert f"a smaller optimizer state (GaLore, 8-bit AdamW) can save {share:.0%} at most" in "\n".join(lines)
    assert lines[0].startswith("why no saving? 10.9% of the parameters are trained")  # 147 of 1,347
    with pytest.raises(ValueError, match="from 1"):
        MemoryLedgerCallback(step=0)
