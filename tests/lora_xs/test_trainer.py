"""LoRA-XS in transformers' Trainer: its checkpoints are adapter folders, and resuming loses nothing."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from lora_xs import (
    ROBERTA_TARGETS,
    LoRAXSConfig,
    LoRAXSError,
    describe_adapter,
    inject,
    load_adapter,
    merge,
    param_groups,
)
from lora_xs.layer import layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from lora_xs.hf import LoRAXSCallback, write_checkpoint  # noqa: E402
from trainer_runs import train_killed  # noqa: E402

pytestmark = pytest.mark.usefixtures("libraries_frozen")

CONFIG = LoRAXSConfig(4, 16, ROBERTA_TARGETS)


def rows(n=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (n, 9), generator=g)
    return [{"input_ids": row, "labels": int(row[0] % 2)} for row in ids]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, num_labels=2,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


def trainer(model, out, *, steps=6, callbacks=(), full_model=False, **options):
    options = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_steps": 3, "eval_steps": 3, **options}
    args = transformers.TrainingArguments(
        str(out), max_steps=steps, save_strategy="steps", logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=5, **options,
    )  # fmt: skip
    return transformers.Trainer(
        model, args, train_dataset=rows(), eval_dataset=rows(16, 1),
        callbacks=[LoRAXSCallback(model, full_model=full_model), *callbacks],
    )  # fmt: skip


def trained_bytes(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


OPTIONS = {
    "accumulation in autocast": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumed_equals_uninterrupted_bit_for_bit(base, tmp_path, options):
    whole = inject(copy.deepcopy(base), CONFIG)
    untrained = trained_bytes(whole)
    trainer(whole, tmp_path / "whole", **options).train()
    assert all(not torch.equal(p, untrained[n]) for n, p in trained_bytes(whole).items())

    killed = inject(copy.deepcopy(base), CONFIG)
    train_killed(lambda: trainer(killed, tmp_path / "parts", **options), 4)
    folder = tmp_path / "parts" / "checkpoint-3"
    resumed = inject(copy.deepcopy(base), CONFIG)
    result = trainer(resumed, tmp_path / "parts", **options)
    result.train(resume_from_checkpoint=str(folder))
    want = trained_bytes(whole)
    assert all(torch.equal(p, want[n]) for n, p in trained_bytes(resumed).items())
    for file in ("adapter.safetensors", "head.safetensors"):
        ends = [(tmp_path / part / "checkpoint-6" / file).read_bytes() for part in ("whole", "parts")]
        assert ends[0] == ends[1]
    assert len([h["loss"] for h in result.state.log_history if "loss" in h]) == 6


@pytest.mark.slow
def test_a_checkpoint_is_an_adapter_folder_without_the_model(base, tmp_path):
    model = inject(copy.deepcopy(base), CONFIG)
    trainer(model, tmp_path).train()
    folder = tmp_path / "checkpoint-6"
    assert not (folder / "model.safetensors").exists()
    assert describe_adapter(folder).config == CONFIG
    again = load_adapter(copy.deepcopy(base), folder)
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_from_pretrained_is_told_what_is_missing(base, tmp_path):
    model = inject(copy.deepcopy(base), CONFIG)
    write_checkpoint(model, tmp_path)
    for load in (transformers.AutoModelForSequenceClassification, transformers.RobertaForSequenceClassification):
        with pytest.raises(OSError, match=r"base weights are not in this folder.*lora_xs\.load_adapter"):
            load.from_pretrained(tmp_path)


@pytest.mark.slow
def test_without_the_callback_trainer_reads_a_checkpoint_too(base, tmp_path):
    model = inject(copy.deepcopy(base), CONFIG)
    trainer(model, tmp_path, steps=3).train()
    other = inject(copy.deepcopy(base), CONFIG)
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=3)
    plain = transformers.Trainer(other, args, train_dataset=rows())
    plain._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    want = trained_bytes(model)
    assert all(torch.equal(p, want[n]) for n, p in trained_bytes(other).items())


@pytest.mark.slow
def test_a_checkpoint_for_other_base_weights_is_refused(base, tmp_path):
    trainer(inject(copy.deepcopy(base), CONFIG), tmp_path, steps=3).train()
    other = copy.deepcopy(base)
    other.roberta.embeddings.word_embeddings.weight.data[7] += 1e-3
    with pytest.raises(LoRAXSError, match="other base weights"):
        trainer(inject(other, CONFIG), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["same folder", "another folder", "full model", "earlier version"])
def test_another_scale_than_the_checkpoints_is_refused(base, tmp_path, case):
    full_model = case == "full model"
    options = {"steps": 1, "save_steps": 1, "full_model": full_model}
    trainer(inject(copy.deepcopy(base), CONFIG), tmp_path, **options).train()
    folder = tmp_path / "checkpoint-1"
    if case == "earlier version":
        file = folder / "trainer_state.json"
        state = json.loads(file.read_text())
        del state["stateful_callbacks"]["lora_xs"]
        file.write_text(json.dumps(state))
    out = tmp_path if case in ("same folder", "earlier version") else tmp_path / "other"
    for alpha in (16, 32):
        run = trainer(inject(copy.deepcopy(base), LoRAXSConfig(4, alpha, ROBERTA_TARGETS)), out, **options)
        if alpha == 16:
            run.train(resume_from_checkpoint=str(folder))
            continue
        message = r"a scale α/r of 4 for .*, and this model has 8: inject with the same alpha"
        with pytest.raises(LoRAXSError, match=message):
            run.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("full_model", [False, True])
def test_a_checkpoint_of_an_adapter_with_another_name_is_refused(base, tmp_path, full_model):
    saved = inject(copy.deepcopy(base), CONFIG)
    run = trainer(saved, tmp_path, full_model=full_model)
    run.save_model(str(tmp_path))
    other = inject(copy.deepcopy(base), CONFIG, name="second")
    with pytest.raises(LoRAXSError, match="the checkpoint holds the adapter 'default', and this model trains 'second'"):
        trainer(other, tmp_path, full_model=full_model)._load_from_checkpoint(str(tmp_path))
    run._load_from_checkpoint(str(tmp_path))


@pytest.mark.parametrize("targets", [("query",), ("query", "value", "output.dense")])
def test_a_checkpoint_of_other_targets_is_refused(base, tmp_path, targets):
    write_checkpoint(inject(copy.deepcopy(base), LoRAXSConfig(4, 16, ("query", "value"))), tmp_path)
    other = inject(copy.deepcopy(base), LoRAXSConfig(4, 16, targets))
    with pytest.raises(LoRAXSError, match=r"has an adapter at .*layer\.0.*: inject with the same targets"):
        trainer(other, tmp_path)._load_from_checkpoint(str(tmp_path))


@pytest.mark.slow
def test_a_callback_for_another_model_is_refused(base, tmp_path):
    models = [inject(copy.deepcopy(base), CONFIG) for _ in range(2)]
    run = trainer(models[0], tmp_path, steps=3)
    run.add_callback(LoRAXSCallback(models[1]))
    with pytest.raises(LoRAXSError, match="another model than LoRAXSCallback was made for"):
        run.train()


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(base, tmp_path):
    model = inject(copy.deepcopy(base), CONFIG)
    at_three = {}

    class Note(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            at_three.setdefault(state.global_step, trained_bytes(model))

    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "step"}
    options |= {"greater_is_better": False}  # the first evaluation is the best
    run = trainer(model, tmp_path, callbacks=[Note()], **options)
    evaluate = run.evaluate
    run.evaluate = lambda *a, **k: evaluate(*a, **k)
    run.compute_metrics = lambda prediction: {"step": float(run.state.global_step)}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    assert all(torch.equal(p, at_three[3][n]) for n, p in trained_bytes(model).items())
    assert any(not torch.equal(p, at_three[6][n]) for n, p in trained_bytes(model).items())


@pytest.mark.slow
def test_beside_the_full_model(base, tmp_path):
    model = inject(copy.deepcopy(base), CONFIG)
    trainer(model, tmp_path, steps=3, full_model=True).train()
    folder = tmp_path / "checkpoint-3"
    assert (folder / "model.safetensors").stat().st_size > 4 * sum(p.numel() for p in base.parameters())
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        want = model.eval()(ids).logits
        assert torch.equal(load_adapter(copy.deepcopy(base), folder / "adapter").eval()(ids).logits, want)


@pytest.mark.slow
def test_a_merged_model_is_saved_whole(base, tmp_path):
    model = inject(copy.deepcopy(base), CONFIG)
    run = trainer(model, tmp_path, steps=3)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()
    merge(model, keep=False)
    run.save_model(str(tmp_path / "whole"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(base, tmp_path, copied):
    model = inject(copy.deepcopy(base), CONFIG)
    LoRAXSCallback(model)
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    best = copied(model).eval()
    for _, layer in layers(best):
        torch.nn.init.normal_(layer.R["default"])
    with torch.no_grad():
        want = best(ids).logits
        best.save_pretrained(tmp_path / "adapter")
        assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "adapter").eval()(ids).logits, want)
        merge(best, keep=False).save_pretrained(tmp_path / "whole")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
        torch.testing.assert_close(again.eval()(ids).logits, want)
    model.save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "adapter.safetensors").exists()


class Normed(torch.nn.Module):
    """No model of transformers, with statistics that training moves."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(9, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 16))
        self.classifier = torch.nn.Linear(16, 2)

    def forward(self, input_ids, labels=None):
        logits = self.classifier(self.layers(input_ids / 60).tanh())
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.slow
def test_a_model_of_ones_own_with_buffers(tmp_path):
    torch.manual_seed(1)
    plain = Normed()
    models = [inject(copy.deepcopy(plain), LoRAXSConfig(2)) for _ in range(3)]
    trainer(models[0], tmp_path / "whole").train()
    train_killed(lambda: trainer(models[1], tmp_path / "parts"), 4)
    trainer(models[2], tmp_path / "parts").train(resume_from_checkpoint=True)
    want = models[0].state_dict()
    assert all(torch.equal(value, want[key]) for key, value in models[2].state_dict().items())
    assert not torch.equal(want["layers.1.running_mean"], plain.layers[1].running_mean)
    assert not (tmp_path / "parts" / "checkpoint-6" / "model.safetensors").exists()


@pytest.mark.slow
def test_bases_that_do_not_follow_come_back(base, tmp_path):
    config = LoRAXSConfig(4, targets=("query",), train_bases=True, r_std=0.1)
    models = [inject(copy.deepcopy(base), config) for _ in range(2)]
    trainer(models[0], tmp_path, steps=3).train()
    trainer(models[1], tmp_path, steps=3)._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    want = trained_bytes(models[0])
    assert all(torch.equal(p, want[n]) for n, p in trained_bytes(models[1]).items())


def test_a_model_without_adapters_is_refused(base):
    with pytest.raises(LoRAXSError, match=r"call lora_xs\.inject before LoRAXSCallback"):
        LoRAXSCallback(copy.deepcopy(base))


@pytest.mark.slow
def test_own_rates_for_r_and_head(base, tmp_path):
    model = inject(copy.deepcopy(base), CONFIG)
    run = trainer(model, tmp_path, steps=3)
    run.optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, head_lr=5e-4))
    run.train()
    assert [g["initial_lr"] for g in run.optimizer.param_groups] == [1e-3, 5e-4]


@pytest.mark.slow
@pytest.mark.skipif("MEMTRAIN_DATA" not in os.environ, reason="needs the files in MEMTRAIN_DATA")
def test_a_checkpoint_of_minilm_has_fewer_than_20_kb(tmp_path):
    folder = Path(os.environ["MEMTRAIN_DATA"]) / "weights" / "minilm_l6"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    inject(model, LoRAXSConfig(8, 16, ROBERTA_TARGETS), cache=False)
    assert len(layers(model)) == 24
    assert 4 * sum(p.numel() for p in model.parameters()) > 90_000_000  # what Trainer alone would write
    write_checkpoint(model, tmp_path)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sum(sizes.values()) < 20_000, sizes
    assert json.loads((tmp_path / "config.json").read_text())["transformers_weights"].startswith("the base weights")
