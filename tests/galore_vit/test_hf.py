"""GaLore under transformers' Trainer and accelerate: the words, and a killed run that ends with the same bytes."""

import re
import runpy
from types import SimpleNamespace

import pytest
import torch
from galore_vit import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreScaled, Refresh
from support import ROOT
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from galore_vit.hf import galore_cls_and_kwargs, galore_optimizer  # noqa: E402
from trainer_runs import small_bert, token_rows, train_killed  # noqa: E402

pytestmark = pytest.mark.usefixtures("libraries_frozen")

WORDS = dict(
    learning_rate=3e-3, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-7, optim="adamw_torch",
    optim_args=None, optim_target_modules=None,
)  # fmt: skip


def trainer(folder, make, **words):
    transformers.set_seed(0)
    model = small_bert()
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, weight_decay=0.1, report_to="none", disable_tqdm=True, use_cpu=True, **words,
    )  # fmt: skip
    data = {"train_dataset": token_rows(), "eval_dataset": token_rows()[:8]}
    return transformers.Trainer(model, args, **data, **make(model, args))


def by_optimizers(**settings):
    settings = {"rank": 4, "update_proj_gap": 2, **settings}
    return lambda model, args: {"optimizers": (galore_optimizer(model, args, **settings), None)}


def by_class(**settings):
    settings = {"rank": 4, "update_proj_gap": 2, **settings}
    return lambda model, args: {"optimizer_cls_and_kwargs": galore_cls_and_kwargs(model, args, **settings)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        by_optimizers(),
        by_class(optim="galore_adamw_8bit", rank=48),
        by_optimizers(optim="galore_adafactor", beta1=0.9),
        by_class(paper=True),
        by_optimizers(refresh=Refresh(lazy=0.5), residual=True),
    ],
)
def test_a_killed_run_is_resumed_to_the_same_bytes(make, tmp_path):
    """Six steps, killed at the third, gone on with from the second; dropout and accumulation on."""
    straight = trainer(tmp_path / "straight", make)
    straight.train()
    train_killed(lambda: trainer(tmp_path / "killed", make), 3)
    resumed = trainer(tmp_path / "killed", make)
    before = {n: p.clone() for n, p in resumed.model.state_dict().items()}
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    for name, p in straight.model.state_dict().items():
        assert torch.equal(p, resumed.model.state_dict()[name]), name
        assert not torch.equal(p, before[name]) or not p.is_floating_point() or "token_type" in name, name
    one, two = (t.optimizer.optimizer.state_dict()["state"] for t in (straight, resumed))
    assert all(torch.equal(v, two[i][k]) for i, s in one.items() for k, v in s.items())


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(tmp_path):
    words = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    run = trainer(tmp_path, by_optimizers(), **words)
    run.train()
    assert run.state.best_model_checkpoint is not None


def test_lr_decay_and_adams_numbers_come_from_the_arguments():
    model = small_bert()
    kind, kwargs = galore_cls_and_kwargs(model, SimpleNamespace(**WORDS), rank=4)
    assert kind is GaLoreAdamW
    assert (kwargs["lr"], kwargs["betas"], kwargs["eps"]) == (3e-3, (0.8, 0.9), 1e-7)
    assert {p.ndim >= 2 for g in kwargs["params"] if g["weight_decay"] for p in g["params"]} == {True}
    assert {p.ndim >= 2 for g in kwargs["params"] if not g["weight_decay"] for p in g["params"]} == {False}
    assert sum(len(g["params"]) for g in kwargs["params"]) == len(list(model.parameters()))
    given = galore_optimizer(model, SimpleNamespace(**WORDS), rank=4, lr=1.0, weight_decay=0.0)
    assert {g["lr"] for g in given.param_groups} == {1.0}
    assert {g["weight_decay"] for g in given.param_groups} == {0.0}
    adafactor = galore_optimizer(model, SimpleNamespace(**WORDS), optim="galore_adafactor", rank=4)
    assert isinstance(adafactor, GaLoreAdafactor)
    scaled = galore_optimizer(model, SimpleNamespace(**WORDS), optim="galore_scaled", rank=1)
    assert isinstance(scaled, GaLoreScaled)
    assert adafactor.param_groups[0]["lr"] == 3e-3


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


@pytest.mark.parametrize(
    "make",
    [
        small_bert,
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL, image_size=28)),
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
    ],
)
def test_what_decays_is_what_trainer_decays(make, tmp_path):
    model = make()
    args = transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True)
    theirs = transformers.Trainer(model, args).create_optimizer()
    ours = galore_optimizer(model, args, rank=4)
    one, two = ({p: g["weight_decay"] for g in o.param_groups for p in g["params"]} for o in (theirs, ours))
    assert {n for n, p in model.named_parameters() if one[p] != two[p]} == set()
    assert set(two.values()) == {0.0, 0.1}


def test_embeddings_that_a_word_names_are_not_projected():
    """Trainer's own GaLore takes linear layers alone and warns of a module that is none."""
    model = small_bert()
    with pytest.warns(UserWarning, match="has 'embeddings', which names no linear layer"):
        optimizer = galore_optimizer(model, rank=4, targets=["attention", "embeddings"])
    optimizers = [optimizer, galore_optimizer(model, rank=4, targets=r".*(attention|embeddings).*")]
    names = {p: name for name, p in model.named_parameters()}
    for chosen in ([names[p] for g in o.param_groups if "rank" in g for p in g["params"]] for o in optimizers):
        assert len(chosen) == 8
        assert all("attention" in name for name in chosen)


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (None, 12),
        ("all-linear", 12),
        (["attention"], 8),
        (["query", "value"], 4),
        ([r".*.attention.*", r".*.intermediate.*"], 10),
        (["intermediate", r"bert.encoder.layer.[01].attention.self.(query|key)"], 6),
        ([r"encoder"], 12),
        (r"bert\.encoder\.layer\.0\.attention\.self\.(query|key)", 2),
    ],
)
def test_trainers_own_words_for_galore(targets, chosen):
    words = {**WORDS, "optim": "galore_adamw_8bit", "optim_args": "rank=4, update_proj_gap=3,scale=0.5"}
    optimizer = galore_optimizer(small_bert(), SimpleNamespace(**{**words, "optim_target_modules": targets}))
    assert isinstance(optimizer, GaLoreAdamW8bit)
    projected = [g for g in optimizer.param_groups if "rank" in g]
    assert sum(len(g["params"]) for g in projected) == chosen
    assert [(g["rank"], g["update_proj_gap"], g["scale"]) for g in projected] == [(4, 3, 0.5)]


@pytest.mark.parametrize(
    ("words", "settings", "match"),
    [
        ({"optim": "galore_adamw_layerwise"}, {}, "InBackward"),
        ({}, {"optim": "sgd"}, "optim must be one of galore_adamw"),
        ({"optim": "galore_adamw", "optim_args": "rang=4"}, {}, "not 'rang=4'"),
        ({"optim": "galore_adamw", "optim_args": "rank=a"}, {}, "rank=a, whose value must be a whole number"),
        ({}, {"targets": ["nowhere"]}, "has 'nowhere', which is in no module's name"),
        ({}, {"targets": ["query", "*keys"]}, r"has '\*keys', which is in no module's name"),
        ({}, {"rank": 999}, "would project nothing"),
        ({}, {"targets": "(query"}, "targets is no regular expression"),
        ({}, {"targets": "bert.embeddings.word_embeddings"}, "finds no weight to project"),
    ],
)
def test_what_is_wrong_is_refused(words, settings, match):
    with pytest.raises(ValueError, match=match):
        galore_optimizer(small_bert(), SimpleNamespace(**{**WORDS, **words}), **settings)


def test_without_arguments_it_is_an_optimizer_as_any():
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 12)))
    optimizer = galore_optimizer(model, rank=4, lr=0.5)
    assert [g.get("rank") for g in optimizer.param_groups] == [None, 4]
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "pattern"),
    [
        ("galore_in_trainer.py", r"equal after 40 steps; \d\d+ KiB"),
        ("galore_in_accelerate.py", r"accuracy (0\.[89]\d+|1\.000), 0 steps skipped"),
    ],
)
def test_the_example_runs(script, pattern, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    runpy.run_path(str(ROOT / "examples" / script))
    assert re.search(pattern, capsys.readouterr().out)
