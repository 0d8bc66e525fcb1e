"""The configuration, its matching of names, and what the package imports."""

import dataclasses

import pytest
import torch
from fresh import run_fresh
from lora_xs import CAUSAL_LM_TARGETS, ROBERTA_TARGETS, LoRAXSConfig, LoRAXSError, inject
from lora_xs.config import in_layers
from lora_xs.layer import layers
from lora_xs.targets import find_targets
from support import run_light
from torch import nn


def adapted(model):
    return [layer.name for _, layer in layers(model)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"rank": 2, "alpha": 0}, "alpha must be greater than 0"),
        ({"rank": 2, "alpha_pattern": {"a": -1}}, r"alpha_pattern\['a'\] must be greater"),
        ({"rank": 2, "rank_pattern": {"a": 0}}, r"rank_pattern\['a'\] must be a whole"),
        ({"rank": 2, "targets": ()}, "targets is empty"),
        ({"rank": 2, "exclude": "lm_head"}, "exclude must be a tuple"),
        ({"rank": 2, "first_step": 1e-3}, 'first_step follows the gradient, which init="svd" does not look at'),
        ({"rank": 2, "init": "gradient", "first_step": -1.0}, "first_step must be 0 or a small positive number"),
        ({"rank": 2, "init": "pissa"}, 'init must be "svd", "random" or "gradient"'),
        ({"rank": 2, "svd": "fast"}, 'svd must be "randomized", "exact" or "official"'),
        ({"rank": 2, "dropout": 1.0}, "dropout must be"),
        ({"rank": 2, "r_std": -1.0}, "r_std must not be negative"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(LoRAXSError, match=message):
        LoRAXSConfig(**fields)


def test_the_words_of_peft():
    ours = LoRAXSConfig(8, 16, ("q_proj", "v_proj"), exclude=("0.q_proj",), head=("score",), dropout=0.1)
    theirs = LoRAXSConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], exclude_modules=["0.q_proj"],
        modules_to_save=["score"], lora_dropout=0.1,
    )  # fmt: skip
    assert theirs == ours
    assert (ours.r, ours.lora_alpha, ours.target_modules) == (8, 16, ("q_proj", "v_proj"))
    assert (ours.exclude_modules, ours.modules_to_save, ours.lora_dropout) == (("0.q_proj",), ("score",), 0.1)
    assert dataclasses.replace(theirs, rank=4) == dataclasses.replace(ours, rank=4)
    assert dataclasses.replace(ours, lora_alpha=None).alpha == 16
    assert LoRAXSConfig.from_json(theirs.to_json()) == ours
    assert LoRAXSConfig(r=2, target_modules="all-linear") == LoRAXSConfig(2)
    assert LoRAXSConfig(r=2, target_modules={"b", "a"}).targets == ("a", "b")
    with pytest.raises(LoRAXSError, match="r is PEFT's word for rank: give one of the two"):
        LoRAXSConfig(rank=4, r=8)
    with pytest.raises(LoRAXSError, match="rank must be a whole number of at least 1, not 0"):
        LoRAXSConfig(target_modules=["a"])


@pytest.mark.parametrize("layers_to_transform", [1, [1], (0, 1)])
def test_layers_to_transform(llama, layers_to_transform):
    config = LoRAXSConfig(2, target_modules=["q_proj"], layers_to_transform=layers_to_transform)
    wanted = [1] if layers_to_transform != (0, 1) else [0, 1]
    assert adapted(inject(llama(), config)) == [f"model.layers.{i}.self_attn.q_proj" for i in wanted]
    named = dataclasses.replace(config, layers_pattern="layers")
    assert adapted(inject(llama(), named)) == [f"model.layers.{i}.self_attn.q_proj" for i in wanted]
    with pytest.raises(LoRAXSError, match="leaves no module to adapt"):
        inject(llama(), dataclasses.replace(config, layers_pattern="h"))
    with pytest.raises(LoRAXSError, match=r"layers_to_transform=\[7\] leaves no module"):
        inject(llama(), LoRAXSConfig(2, layers_to_transform=7))
    assert LoRAXSConfig.from_json(config.to_json()) == config


def test_the_first_number_of_a_name_is_its_layer_as_in_peft():
    peft_utils = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    # One thing differs: without a pattern PEFT finds no number in "layers.1.w", a list at the model's top.
    names = ("a.layers.1.experts.0.w", "a.layers.0.experts.1.w", "a.blocks.1.w", "1.w", "m.h.1.layers.0.w")
    for pattern in ((), ("layers",), ("layers", "h")):
        ours = LoRAXSConfig(2, targets=("w",), layers_to_transform=(1,), layers_pattern=pattern)
        theirs = peft.LoraConfig(target_modules=["w"], layers_to_transform=[1], layers_pattern=list(pattern))
        for name in names:
            assert in_layers(name, ours) == bool(peft_utils.check_target_module_exists(theirs, name)), (name, pattern)


def test_a_lora_config_is_read(llama):
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], lora_dropout=0.1,
        rank_pattern={r"self_attn\.q_proj": 2}, alpha_pattern={"down_proj": 3}, modules_to_save=["model.norm"],
    )  # fmt: skip
    config = LoRAXSConfig.from_peft(theirs, seed=3)
    wrapped = peft.get_peft_model(llama(), theirs)
    model = inject(llama(), config)
    own = {n: layer for _, layer in layers(model) for n in [layer.name]}
    found = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert set(own) == set(found)
    for name, layer in own.items():
        assert layer.rank == found[name].r["default"]
        assert layer.scale("default") == found[name].scaling["default"]
    assert config.seed == 3
    saved = {n for n, _ in wrapped.named_modules() if n.endswith("modules_to_save.default")}
    assert len(saved) == 1
    assert model.model.norm.weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_rslora": True}, {"alpha": 16.0}),
        ({"task_type": "SEQ_CLS"}, {"head": None}),
        ({"task_type": "QUESTION_ANS"}, {"head": ("qa_outputs",)}),
        ({"task_type": "CAUSAL_LM"}, {"head": ()}),
        ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
        ({"target_modules": r".*\.q"}, {"targets": r".*\.q"}),
        ({"target_parameters": ["experts.down_proj"]}, {"targets": ("a", "experts.down_proj")}),
        ({"exclude_modules": ["b"]}, {"exclude": ("b",)}),
    ],
)
def test_fields_of_a_lora_config(fields, expected):
    peft = pytest.importorskip("peft")
    config = LoRAXSConfig.from_peft(peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["a"], **fields}))
    for name, value in expected.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True, for which LoRA-XS has no counterpart"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": None}, "names no target_modules"),
        ({"exclude_modules": "b.*"}, "exclude_modules must be a list"),
        ({"rank_pattern": {"(q|v)": 2}}, "rank_pattern has the regular expression"),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["x"]}, "PEFT adds the classifier; name it too"),
    ],
)
def test_what_a_lora_config_has_and_lora_xs_has_not(fields, message):
    peft = pytest.importorskip("peft")
    with pytest.raises(LoRAXSError, match=message):
        LoRAXSConfig.from_peft(peft.LoraConfig(**{"target_modules": ["a"], **fields}))


def test_json_round_trip():
    config = LoRAXSConfig(4, 16, ["a", "b.c"], rank_pattern={"a": 2}, head=("x",), dropout=0.1)
    assert LoRAXSConfig.from_json(config.to_json()) == config
    assert config.targets == ("a", "b.c")
    with pytest.raises(LoRAXSError, match="not a LoRA-XS configuration"):
        LoRAXSConfig.from_json('{"rank": 2, "colour": "red"}')


def test_patterns_prefer_the_longest_suffix():
    config = LoRAXSConfig(8, 16, rank_pattern={"output.dense": 4, "attention.output.dense": 2}, alpha_pattern={"q": 3})
    assert config.rank_of("l.0.attention.output.dense") == 2
    assert config.rank_of("l.0.output.dense") == 4
    assert config.rank_of("l.0.layoutput.dense") == 8  # a suffix begins at a dot
    assert config.scale_of("l.0.q") == 3 / 8
    assert LoRAXSConfig(8).scale_of("x") == 1


def test_paper_targets_of_roberta(roberta):
    model = inject(roberta(), LoRAXSConfig(2, targets=ROBERTA_TARGETS))
    assert len(adapted(model)) == 4 * 2
    assert not any("classifier" in name or "key" in name or "intermediate" in name for name in adapted(model))
    head = {n for n, p in model.named_parameters() if p.requires_grad and ".R." not in n}
    assert head == {n for n, _ in model.named_parameters() if n.startswith("classifier.")}


def test_all_linear_leaves_out_head_and_output_embedding(roberta, llama):
    assert not any("classifier" in name for name in adapted(inject(roberta(), LoRAXSConfig(2))))
    names = adapted(inject(llama(), LoRAXSConfig(2)))
    assert len(names) == 2 * len(CAUSAL_LM_TARGETS)
    assert "lm_head" not in names


def test_a_usual_head_without_parameters_and_a_layer_without_numbers_stop_nothing():
    model = nn.ModuleDict({"body": nn.Linear(6, 6), "classifier": nn.Flatten()})
    model["none"] = nn.Linear(6, 0)  # MobileBert's, where its embeddings are as wide as it is
    assert list(find_targets(model, LoRAXSConfig(2))) == ["body"]
    with pytest.raises(LoRAXSError, match="the head classifier has no parameters to train"):
        find_targets(model, LoRAXSConfig(2, head=("classifier",)))


def test_transformers_conv1d_is_known():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (2, 8))
    before = model(ids).logits
    inject(model, LoRAXSConfig(4, r_std=1.0))
    assert adapted(model) == [f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    after = model(ids).logits
    assert not torch.equal(after, before)


def test_regular_expression_targets(llama):
    names = adapted(inject(llama(), LoRAXSConfig(2, targets=r"model\.layers\.1\.self_attn\.[qv]_proj")))
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_a_target_that_matches_nothing_lists_what_there_is(llama):
    with pytest.raises(LoRAXSError, match=r"'quary_proj' matches no module.*q_proj \(2\).*Did you mean") as caught:
        inject(llama(), LoRAXSConfig(2, targets=("v_proj", "quary_proj")))
    assert "embed_tokens (1)" in str(caught.value)
    assert "norm" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": ("x_proj",)}, "exclude names 'x_proj'"),
        ({"rank_pattern": {"x_proj": 1}}, "rank_pattern names 'x_proj'"),
        ({"alpha_pattern": {"x_proj": 1}}, "alpha_pattern names 'x_proj'"),
        ({"head": ("scores",)}, "head names 'scores'"),
        ({"targets": ("q_proj",), "exclude": ("q_proj",)}, "exclude leaves no module"),
        ({"targets": "nothing.*"}, "matches no module"),
    ],
)
def test_options_that_would_do_nothing_are_refused(llama, fields, message):
    with pytest.raises(LoRAXSError, match=message):
        inject(llama(), LoRAXSConfig(2, **fields))


def test_exclude_and_head(llama):
    model = inject(
        llama(),
        LoRAXSConfig(2, targets=("q_proj", "v_proj"), exclude=("0.self_attn.q_proj",), head=("norm",)),
    )
    assert [n.split(".")[2:] for n in adapted(model)] == [
        ["0", "self_attn", "v_proj"], ["1", "self_attn", "q_proj"], ["1", "self_attn", "v_proj"],
    ]  # fmt: skip
    assert model.model.norm.weight.requires_grad
    assert not model.model.layers[0].input_layernorm.weight.requires_grad


RUN = """
import sys
import lora_xs
assert "torch" not in sys.modules, "importing lora_xs imports torch"
assert set(dir(lora_xs)) >= set(lora_xs.__all__)
for name in lora_xs.__all__:
    value = getattr(lora_xs, name)
    assert getattr(lora_xs, name) is value
assert callable(lora_xs.inject) and callable(lora_xs.merge)
try:
    lora_xs.nothing
except AttributeError:
    pass
else:
    raise SystemExit("an unknown name was found")
"""

ALONE = """
import sys
for name in ("numpy", "transformers", "peft", "torchao", "sklearn", "memtrain_common"):
    sys.modules[name] = None  # importing it fails
import torch
from lora_xs import *
model = torch.nn.Sequential(torch.nn.Linear(600, 300), torch.nn.Linear(300, 8))
inject(model, LoRAXSConfig(4, targets=("0",), head=("1",)), cache=sys.argv[1] + "/c")
x = torch.randn(2, 600)
model(x).sum().backward()
want = model(x)
save_adapter(model, sys.argv[1])
load_adapter(remove(model), sys.argv[1], cache=sys.argv[1] + "/c")
assert torch.equal(model(x), want)
export_peft(model, sys.argv[1] + "/p")
"""


@pytest.mark.slow
def test_an_import_is_light():
    ((code, said),) = run_light([RUN])
    assert not code, said


def test_it_runs_with_torch_and_safetensors_alone(tmp_path):
    done = run_fresh(ALONE, str(tmp_path))
    assert done.returncode == 0, done.stderr
