"""Back Razor in transformers' Trainer: its words, and a killed run that ends with the same bytes."""

import os
from pathlib import Path

import pytest
import torch
from backrazor import Razor, RazorError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from backrazor.hf import RazorMixin, RazorTrainer  # noqa: E402
from trainer_runs import small_bert, token_rows, train_killed  # noqa: E402

pytestmark = pytest.mark.usefixtures("libraries_frozen")


def arguments(folder, **words):
    words = {"max_steps": 6, "save_steps": 2, **words}
    return transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2, report_to="none",
        disable_tqdm=True, use_cpu=True, **words,
    )  # fmt: skip


def trainer(folder, kind=RazorTrainer, model=None, razor=None, **words):
    transformers.set_seed(0)
    more = {"razor": razor or Razor(0.1)} if issubclass(kind, RazorMixin) else {}
    data = {"train_dataset": token_rows(48), "eval_dataset": token_rows(48)[:8]}
    return kind(model=model or small_bert(positions=64), args=arguments(folder, **words), **data, **more)


@pytest.mark.slow
@pytest.mark.parametrize("words", [{}, {"bf16": True, "gradient_checkpointing": True}])
def test_a_killed_run_is_resumed_to_the_same_bytes(words, tmp_path):
    straight = trainer(tmp_path / "straight", **words)
    straight.train()
    train_killed(lambda: trainer(tmp_path / "killed", **words), 3)
    resumed = trainer(tmp_path / "killed", **words)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    for name, p in straight.model.state_dict().items():
        assert torch.equal(p, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_it_is_the_razor_that_trains(tmp_path):
    """At keep 1 as Trainer itself; below it the weights go another way, by the gradients of a Razor."""

    def weights(**settings):
        run = trainer(tmp_path, max_steps=1, save_strategy="no", lr_scheduler_type="constant", **settings)
        run.train()
        return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    plain = weights(kind=transformers.Trainer)
    torch.testing.assert_close(weights(razor=Razor(1)), plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(weights(), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_trainer_of_ones_own_and_its_evaluation(tmp_path):
    seen = []

    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs)
            seen.append(out.loss.grad_fn is not None)
            return (out.loss, out) if return_outputs else out.loss

    class Mine(RazorMixin, Own):
        pass

    run = trainer(tmp_path, Mine, max_steps=1, save_strategy="no")
    run.train()
    plain = trainer(tmp_path, Own, model=run.model)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert seen.count(True) == 2
    assert False in seen


def test_what_a_razor_cannot_enter_is_refused_in_words(tmp_path):
    with pytest.raises(RazorError, match="torch_compile"):
        trainer(tmp_path, torch_compile=True)

    class Two(transformers.TrainingArguments):
        n_gpu = 2

    args = arguments(tmp_path)
    args.__class__ = Two
    with pytest.raises(RazorError, match="torchrun --nproc-per-node 2"):
        RazorTrainer(model=small_bert(positions=64), args=args, train_dataset=token_rows(48))


def test_a_razor_that_would_not_be_entered_is_refused(tmp_path):
    with pytest.raises(RazorError, match=r"Behind has RazorMixin behind Trainer"):

        class Behind(transformers.Trainer, RazorMixin):
            pass

    class Own(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model.train(), inputs)
            loss.backward()
            return loss.detach()

    class Mine(RazorMixin, Own):
        pass

    with pytest.raises(RazorError, match=r"the training_step of Mine has not entered the Razor"):
        trainer(tmp_path, Mine, max_steps=1).train()
    with pytest.raises(RazorError, match=r"razor must be a Razor, such as Razor\(keep=0.1\), not 0.1"):
        trainer(tmp_path, razor=0.1)


@pytest.mark.slow
@pytest.mark.skipif("MEMTRAIN_DATA" not in os.environ, reason="MEMTRAIN_DATA names no folder with real weights")
def test_minilm_keeps_an_order_less(tmp_path):
    from memtrain_common.measuring.memory import SavedActivations

    folder = Path(os.environ["MEMTRAIN_DATA"]) / "weights" / "minilm_l6"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    run = trainer(tmp_path, model=model, save_strategy="no", max_steps=1)
    batch = {"input_ids": torch.randint(1000, 2000, (4, 48)), "labels": torch.tensor([0, 1, 1, 0])}
    bytes_of, losses = [], []
    for context in (torch.enable_grad, run.compute_loss_context_manager):
        model.eval()  # no dropout: the same loss
        with context(), SavedActivations(model) as saved:
            loss = run.compute_loss(model, batch)
        bytes_of.append(sum(saved.by_layer().values()))
        losses.append(loss.detach())
        loss.backward()
    assert torch.equal(*losses)
    assert bytes_of[0] > 10 * bytes_of[1]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    run.train()
    assert run.state.global_step == 1
