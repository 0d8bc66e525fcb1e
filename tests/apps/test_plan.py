"""``plan``: shapes, units, the composition of moments against whole steps, budgets that hold, and what it says."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from fresh import run_fresh
from memtrain_apps.compose.axes import Axes
from memtrain_apps.compose.compose import compose
from memtrain_apps.plan import known
from memtrain_apps.plan.config import configure, planned_shape
from memtrain_apps.plan.cuda_choices import CudaChoices
from memtrain_apps.plan.depth import Passes
from memtrain_apps.plan.forecast import (
    Workplace,
    between,
    compose_forecast,
    count_optimizers,
    count_step,
    largest,
    predict_arm,
)
from memtrain_apps.plan.measuring import measure_place
from memtrain_apps.plan.plan import make_plan
from memtrain_apps.plan.shape_models import build_model, loss_of, make_batch, plain_task
from memtrain_apps.plan.shapes import CNNS, Shape, find_shape, known_names
from memtrain_apps.plan.step_use import passes_of, step_use_of
from memtrain_apps.plan.uses import Step
from memtrain_common.commands.units import parse_bytes
from memtrain_common.errors import UserError
from memtrain_common.measuring.prediction import fake_step, predict
from small_shapes import LLAMA, SMALL, TINY
from support import ROOT, assert_refused, run_command, run_ranks
from torch import nn


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What was counted by other runs answers no test; within this one each step of a plan is counted once."""
    mine = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("XDG_CACHE_HOME", str((mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "plans"))


# -- shapes and units ------------------------------------------------------------------------------------------------

# parameters of the published checkpoints' architectures, with the head that plan gives them
PUBLISHED = {
    "google/vit-base-patch16-224": 86_567_656,
    "google/vit-large-patch16-224": 304_326_632,
    "facebook/deit-tiny-patch16-224": 5_717_416,
    "facebook/deit-small-patch16-224": 22_050_664,
    "google-bert/bert-base-uncased": 109_482_240 + 2 * 769,
    "google-bert/bert-large-uncased": 335_141_888 + 2 * 1025,
    "FacebookAI/roberta-base": 124_647_170,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "meta-llama/Llama-2-7b": 6_738_415_616,
    "meta-llama/Llama-2-13b": 13_015_864_320,
    "meta-llama/Llama-2-70b": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B": 1_100_048_384,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "HuggingFaceTB/SmolLM-135M": 134_515_008,
    "HuggingFaceTB/SmolLM-360M": 361_821_120,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_add_up_to_the_published_parameters(name):
    """From two shallow ones: every block has the same."""
    shape = find_shape(name)

    def parameters(blocks):
        with fake_step():
            return sum(p.numel() for p in build_model(shape.with_depth(blocks)).parameters())

    one, two = parameters(1), parameters(2)
    assert one + (shape.depth - 1) * (two - one) == PUBLISHED[name]


def test_names_are_found_with_and_without_owner_and_tuning():
    assert find_shape("bert-base-uncased").config == find_shape("google-bert/bert-base-uncased").config
    assert find_shape("meta-llama/Llama-2-7b-chat-hf").config == find_shape("meta-llama/Llama-2-7b").config
    assert find_shape("meta-llama/Meta-Llama-3-8B-Instruct").config["vocab_size"] == 128256
    assert find_shape("mistralai/Mistral-7B-Instruct-v0.3").config["vocab_size"] == 32768
    assert find_shape("TinyLlama/TinyLlama-1.1B-Chat-v1.0").depth == 22
    assert len(known_names()) == len(set(known_names())) > 60


@pytest.mark.slow
def test_finetunes_names_are_the_shapes_that_it_builds():
    from memtrain_common.models.classifiers import MODELS, build_classifier

    assert set(MODELS) <= set(known_names())
    for name in set(MODELS) - set(CNNS):
        shape = find_shape(name)
        with fake_step():
            built = build_classifier(name, 1000, image_size=shape.image_size).model
            mine = build_model(shape)
            assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}


def test_a_folder_of_transformers_is_a_shape(tmp_path):
    model = build_model(LLAMA)
    model.config.save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    assert (shape.family, shape.depth, shape.uniform) == ("llama", 3, True)
    with fake_step():
        built = {n: p.shape for n, p in build_model(shape).named_parameters()}
    assert built == {n: p.shape for n, p in model.named_parameters()}
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "architectures": ["LlamaModel"], "model_type": "l"}))
    with pytest.raises(UserError, match="architectures LlamaModel, which do not say"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a configuration"):
        find_shape(str(tmp_path))


def test_any_folder_of_transformers_is_told_by_its_class(tmp_path):
    """Families that are not in the table: blocks are taken for alike only where that is known."""
    for name, family, task, uniform in (
        ("T5ForConditionalGeneration", "t5", "pairs", False), ("OPTForCausalLM", "opt", "language", True),
        ("ConvNextForImageClassification", "convnext", "pictures", False),
        ("Qwen2MoeForCausalLM", "qwen2_moe", "language", False), ("AlbertForMaskedLM", "albert", "text", False),
    ):  # fmt: skip
        content = {"model_type": family, "architectures": [name], "num_hidden_layers": 5, "vocab_size": 99}
        (tmp_path / "config.json").write_text(json.dumps(content))
        shape = find_shape(str(tmp_path))
        assert (shape.family, shape.task, shape.uniform) == (family, task, uniform)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("t5", {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 40}),
        ("deit", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                  "image_size": 16, "patch_size": 8}),
    ],
)  # fmt: skip
def test_what_a_configuration_leaves_open_has_a_step(family, sizes, tmp_path):
    """T5's begins its answers with nothing, and DeiT's has two classes and chooses none."""
    name = {"t5": "T5ForConditionalGeneration", "deit": "DeiTForImageClassification"}[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "architectures": [name], **sizes}))
    step = Step(find_shape(str(tmp_path)), tokens=8, cuda=False)
    with fake_step():
        model = build_model(step.shape)
        loss_of(step, model, make_batch(step, 2)).backward()
    assert type(model).__name__ == name


@pytest.mark.slow
def test_a_model_of_timm_has_its_own_input():
    timm = pytest.importorskip("timm")
    shape = find_shape("timm/test_vit")
    assert (shape.name, shape.task, shape.depth, shape.uniform) == ("test_vit", "pictures", 0, False)
    assert shape.image_size == timm.get_pretrained_cfg("test_vit").input_size[1]
    with fake_step():
        mine = build_model(shape.changed(num_labels=7, image_size=96))
        assert mine(torch.zeros(2, 3, 96, 96)).shape == (2, 7)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("7.5 gib", 7.5 * 2**30),
        ("512MiB", 2**29),
        ("1,000 KB", 10**6),
        ("9B", 9),
    ],
)
def test_units(text, n_bytes):
    assert parse_bytes(text, "--budget") == n_bytes


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("8G", "8,589,934,592"), ("8G", "8,000,000,000"), ("8", "no unit"), ("8Gb", "bits"), ("0GiB", "above 0"),
        ("-1GB", "above 0"), ("many", "not an amount"), ("8 apples", "no unit of memory"), ("", "not an amount"),
        ("7,5GiB", "not an amount"), ("8,GB", "not an amount"), ("1,0000KB", "not an amount"), ("0.1B", "one byte"),
    ],
)  # fmt: skip
def test_ambiguous_amounts_are_refused(text, word):
    with pytest.raises(UserError, match=word):
        parse_bytes(text, "--budget")


# -- the composition against whole steps -------------------------------------------------------------------------------


def whole(step, axes, rows, micro_batches=1):
    """``predict`` of the combination as one step, at the whole depth."""
    made, batches = [], []

    def build():
        made.append(compose(plain_task(step, build_model(step.shape, step.weights)), axes, lr=1e-3, predicting=True))
        return made[0].model

    def loss(model):
        batches[:] = [make_batch(step, rows)]  # the loop holds its batch while it steps
        return loss_of(step, model, batches[0])

    return predict(
        build, loss, lambda _: made[0].optimizer, saving=lambda: made[0].saving(), micro_batches=micro_batches
    )


SPREAD = (
    "full+all+adamw", "full+backrazor+sgd", "full+checkpoint+galore-adamw", "head+all+sgd", "head+all+adamw8bit",
    "bitfit+all+adamw", "bitfit+checkpoint+sgd", "lora+all+galore-adafactor", "lora+checkpoint+adamw8bit",
    "melo+backrazor+adamw", "melo+all+galore-adamw8bit", "lora-xs+all+adamw", "lora-xs+checkpoint+galore-adamw",
    "lte+all+sgd", "lte+backrazor+galore-adamw",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SPREAD)
def test_composed_is_predicted_whole(name):
    """Each choice of each axis, of a ViT: refused by both, or the same ledger, and the same peak but for what falls
    into single steps (GaLore's refreshes, LTE's merges), memory that GaLore uses again for the next weight, and Back
    Razor's working memory, which depends on what is live beside it."""
    axes = Axes(*name.split("+"), rank=8, galore_rank=4)
    place = Workplace(SMALL["vit"], rows=4)
    try:
        found = predict_arm(place, axes)
    except UserError:
        with pytest.raises(UserError):
            whole(place.step, axes, 4)
        return
    expected = whole(place.step, axes, 4)
    assert found.ledger == expected.ledger.totals
    if axes.optim.startswith("galore") or axes.train == "lte":
        assert 0.99 * expected.peak_bytes <= found.peak <= 1.1 * expected.peak_bytes
    elif axes.save == "backrazor":
        assert found.peak == pytest.approx(expected.peak_bytes, rel=1e-3)
    else:
        assert found.peak == expected.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        Axes(),
        Axes("lora", "checkpoint", "sgd"),
        Axes("lora-xs", "all", "adamw"),
        Axes("full", "backrazor"),
    ],
    ids=lambda a: f"{a.train}+{a.save}",
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_composed_is_predicted_whole_for_text(family, axes):
    """Of one and of three micro-batches, from the same counts."""
    places = [Workplace(SMALL[family], rows=3, micro_batches=n) for n in (1, 3)]
    moments = count_step(places[0], axes)
    steps = count_optimizers(places[0], axes, (axes.optim,))[axes.optim]
    for place in places:
        found = compose_forecast(place, axes, moments, steps)
        with_mask = predict_with_mask(place, axes, place.micro_batches)
        assert found.ledger == with_mask.ledger.totals
        # Llama's whole prediction is up to 1.3 % above; a real step is not (test_no_plan_is_too_small)
        assert abs(found.peak - with_mask.peak_bytes) <= 0.015 * found.peak


def predict_with_mask(place, axes, micro_batches):
    """``predict`` takes a fake mask for one that masks nothing; plan wants the mask of rows of several lengths."""
    from unittest import mock

    from torch._subclasses.fake_tensor import FakeTensor

    with mock.patch("memtrain_common.measuring.prediction.as_if_real") as real:
        real.side_effect = lambda: mock.patch(
            "transformers.utils.import_utils.is_fake_tensor", lambda x: isinstance(x, FakeTensor)
        )
        return whole(place.step, axes, place.rows, micro_batches)


EVERY_PAIR = [
    (family, save, ("full", "lora")[(i + j) % 2])
    for i, family in enumerate(SMALL)
    for j, save in enumerate(("all", "backrazor", "checkpoint", "offload"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "save", "train"), EVERY_PAIR)
def test_depth_is_drawn_out_exactly(family, save, train):
    """Of seven blocks, from two and three, or three and four: every number is that of the whole count."""
    step = replace(SMALL[family], shape=SMALL[family].shape.with_depth(7))
    passes = Passes(step, Axes(train, save))
    (drawn,), cut = passes.whole([4])
    assert min(passes._counted) > 0, "it was counted at its whole depth"
    ((counted,), whole_cut) = passes_of(step, Axes(train, save), [4])
    assert drawn.use == counted.use
    assert cut == whole_cut


@pytest.mark.slow
def test_a_library_is_not_first_imported_on_fake_tensors():
    """PEFT imports libraries with tables of 4-bit levels: they would be counted once, and be fake from then on."""
    code = """
from memtrain_apps.compose.axes import Axes
from memtrain_apps.plan.step_use import passes_of, step_use_of
from memtrain_apps.plan.shapes import find_shape
from memtrain_apps.plan.uses import Step
step = Step(find_shape("facebook/deit-tiny-patch16-224").with_depth(1), cuda=False)
assert step_use_of(step, Axes("lora"), 1) == step_use_of(step, Axes("lora"), 1)
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_offloading_holds_in_host_memory_what_save_on_cpu_packs():
    step = SMALL["gpt2"]
    counted = step_use_of(step, Axes("full", "offload"), 3)
    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.nbytes) or t, lambda t: t)
    with hooks:  # save_on_cpu copies whatever is saved, as often as it is
        loss_of(step, build_model(step.shape), make_batch(step, 3))
    assert counted.host == sum(packed)
    assert counted.activations == 0


# -- budgets that hold -----------------------------------------------------------------------------------------------

PLANS = [
    (family, train, save, optim)
    for family, arms in {
        "vit": [("full", "all", "adamw"), ("full", "backrazor", "sgd"), ("full", "checkpoint", "galore-adamw"),
                ("head", "all", "adamw"), ("bitfit", "all", "adamw"), ("melo", "checkpoint", "sgd"),
                ("lora-xs", "backrazor", "adamw"), ("lte", "all", "adamw"), ("full", "all", "galore-adafactor")],
        "bert": [("full", "all", "adamw"), ("full", "all", "adamw8bit"), ("lora", "all", "adamw"),
                 ("bitfit", "checkpoint", "adamw"), ("lora-xs", "all", "sgd"), ("lte", "checkpoint", "adamw"),
                 ("full", "backrazor", "galore-adamw8bit")],
        "gpt2": [("full", "all", "sgd"), ("full", "checkpoint", "adamw"), ("lora", "backrazor", "adamw"),
                 ("lora", "checkpoint", "sgd"), ("bitfit", "all", "sgd"), ("full", "all", "galore-adamw"),
                 ("lora-xs", "checkpoint", "adamw")],
        "llama": [("full", "all", "adamw"), ("full", "checkpoint", "sgd"), ("lora", "all", "adamw"),
                  ("lora-xs", "all", "adamw"), ("lte", "all", "sgd"), ("full", "backrazor", "adamw"),
                  ("lora", "checkpoint", "galore-adamw")],
    }.items()
    for train, save, optim in arms
]  # fmt: skip


def test_there_are_thirty_plans():
    assert len(PLANS) == 30


@pytest.mark.slow
@pytest.mark.parametrize(("family", "train", "save", "optim"), PLANS)
def test_no_plan_is_too_small(family, train, save, optim):
    """A real step, two micro-batches, never holds more than was planned; and the plan is not far above it. What Back
    Razor works in while it packs is left to what is set aside: less than all activations, dense."""
    axes = Axes(train, save, optim, rank=8, galore_rank=4)
    place = Workplace(SMALL[family], rows=4, micro_batches=2)
    found = predict_arm(place, axes)
    ledger, peak = measure_place(place, axes, torch.device("cpu"))
    for category, n_bytes in ledger.items():
        assert found.ledger[category] == pytest.approx(n_bytes, rel=0.02), category
    dense = replace(axes, save="all")
    workspace = count_step(place, dense).activations if save == "backrazor" else 0
    assert peak <= found.peak + workspace
    assert found.peak <= (1.03 if save == "backrazor" else 1.001) * peak


@pytest.mark.slow
def test_adamw_on_the_cpu_holds_something_of_the_parameter_before():
    """The output matrix is as large as the embedding, and is stepped after another one."""
    step = replace(SMALL["llama"], shape=SMALL["llama"].shape.changed(vocab_size=4096))
    place = Workplace(step, rows=2)
    _, peak = measure_place(place, Axes(), torch.device("cpu"))
    assert predict_arm(place, Axes()).peak == pytest.approx(peak, abs=16)


@pytest.mark.slow
def test_the_largest_batch_fits_and_uses_the_budget():
    """Straight lines between batches are above the truth, and not by much."""
    step = SMALL["vit"]
    known_peaks = {r: step_use_of(step, Axes(), r).peak for r in (1, 4, 60)}
    for rows in (2, 3, 11, 37):
        assert between(known_peaks, rows) >= step_use_of(step, Axes(), rows).peak
    usable = step_use_of(step, Axes(), 23).peak
    peak = lambda rows: between(known_peaks, rows)  # noqa: E731
    most = largest(peak, 1, 60, usable)
    assert 20 <= most <= 23
    assert largest(peak, 1, 60, usable, multiple=4) == 20
    assert largest(peak, 1, 60, known_peaks[1] - 1) == 0


# -- CUDA's ways, and several GPUs -----------------------------------------------------------------------------------


def test_dropout_masks_are_bytes_and_attention_saves_no_probabilities_on_cuda():
    x = torch.randn(7, 11, requires_grad=True)
    saved = []

    def counted(call):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            call()
        return sum(t.nbytes for t in saved)

    with CudaChoices():
        assert counted(lambda: nn.functional.dropout(x, 0.5)) == 7 * 11
    q = torch.randn(2, 3, 64, 8, requires_grad=True)
    attention = lambda: nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1)  # noqa: E731
    plain = counted(attention)
    with CudaChoices():
        assert counted(attention) < plain - 2 * 3 * 64 * 64


def test_cudas_autocast_computes_norms_in_float32():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.layer_norm(x, (8,)).dtype == torch.bfloat16
        with CudaChoices():
            assert nn.functional.layer_norm(x, (8,)).dtype == torch.float32
            assert (x**2).dtype == torch.float32


def fsdp_step(place, axes, out):
    from memtrain_apps.compose.families import blocks
    from memtrain_common.measuring.prediction import LiveBytes
    from memtrain_common.training.distributed import launch, parallelize

    world, device = launch("cpu")
    with LiveBytes() as live:
        composed = compose(
            plain_task(place.step, build_model(place.step.shape)), axes, lr=1e-3, predicting=True,
            wrap=lambda m: parallelize(m, place.parallel, device, blocks=blocks(m).values()),
        )  # fmt: skip
        live.peak_bytes = live.bytes
        for _ in range(2):
            batch = make_batch(place.step, place.rows)
            with composed.saving():
                loss = loss_of(place.step, composed.model, batch)
            loss.backward()
            del loss
            composed.optimizer.step()
            composed.optimizer.zero_grad(set_to_none=True)
    (out / f"{place.parallel}-{world.rank}").write_text(str(live.peak_bytes))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_hold_no_more_than_was_planned(parallel, tmp_path):
    place = Workplace(SMALL["vit"], rows=4, processes=2, parallel=parallel)
    axes = Axes()
    found = predict_arm(place, axes)
    one = predict_arm(replace(place, processes=1), axes)
    if parallel == "ddp":
        assert found.peak - one.peak == one.ledger["gradients"]
    else:
        assert found.ledger["optimizer"] < 0.6 * 2 * count_step(place, axes).weights
    run_ranks(2, fsdp_step, place, axes, tmp_path)
    for rank in range(2):
        assert int((tmp_path / f"{parallel}-{rank}").read_text()) <= found.peak


# -- the command -----------------------------------------------------------------------------------------------------


def plan_of(*words):
    return make_plan(configure([*words, "--workers", "1"]))


@pytest.mark.slow
def test_what_fits_fits_and_remedies_are_plans_that_fit():
    plan = plan_of(
        *TINY, "--budget", "30MiB", "--train", "full", "lora", "--save", "all", "checkpoint", "--optim", "adamw", "sgd"
    )
    assert plan.fitting
    assert plan.lacking
    assert all(
        a.predicted.peak <= plan.config.usable_bytes < b.predicted.peak for a in plan.fitting for b in plan.lacking
    )
    trained = [a.predicted.trained for a in plan.fitting]
    assert trained == sorted(trained, reverse=True)
    arm = plan.lacking[0]
    remedy = arm.remedies[0]
    again = plan_of(
        *TINY, "--budget", "30MiB", "--train", arm.axes.train, "--save", arm.axes.save, "--optim", arm.axes.optim,
        *remedy.flags.split(),
    )  # fmt: skip
    assert again.fitting
    assert again.fitting[0].predicted.peak <= remedy.peak
    assert again.fitting[0].time == pytest.approx(1.0) or arm.axes.train != "full"


@pytest.mark.slow
def test_checkpointing_costs_up_to_a_third_more_products():
    plan = plan_of(*TINY, "--budget", "1GiB", "--train", "full", "--save", "all", "checkpoint", "--optim", "adamw")
    times = {a.axes.save: a.time for a in plan.fitting}
    assert times["all"] == 1.0
    assert 1.15 < times["checkpoint"] <= 4 / 3  # a block's last products are not needed, and not computed again


@pytest.mark.slow
def test_refused_combinations_say_why():
    plan = plan_of(
        "--model", "gpt2", "--budget", "900GiB", "--train", "head", "bitfit", "melo", "lte", "--batch", "6",
        "--save", "all", "checkpoint", "--optim", "adamw", "galore-adamw",
    )  # fmt: skip
    reasons = {a.axes.name: a.refused for a in plan.refused}
    assert "no gradient passes" in reasons["head+checkpoint+adamw"]
    assert "needs a task head" in reasons["head+all+adamw"]
    assert "not a classifier" in reasons["melo+all+adamw"] or "which" in reasons["melo+all+adamw"]
    assert "6 samples" in reasons["lte+all+adamw"]
    assert "no matrix of a block" in reasons["bitfit+all+galore-adamw"]
    assert {a.axes.train for a in plan.fitting} == {"bitfit"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "google/vit-large-patch16-22", "--budget", "8GiB"], ["did you mean", "vit-large-patch16-224"]),
        (["--model", "./nowhere", "--budget", "8GiB"], ["no folder"]),
        (["--model", "gpt2"], ["--budget is missing", "8GiB"]),
        (["--budget", "8GiB", "--json"], ["--json", "name it by --model"]),
        (["--model", "gpt2", "--budget", "8GiB", "--reserved", "--gpus", "2"], ["--reserved is of one process"]),
        (["--model", "gpt2", "--budget", "8G"], ["8GiB", "8GB"]),
        (["--model", "gpt2", "--budget", "700MiB"], ["leaves nothing"]),
        (["--model", "gpt2", "--budget", "8GiB", "--batch", "0"], ["--batch must be at least 1"]),
        (["--model", "gpt2", "--budget", "8GiB", "--batch", "3", "--gpus", "2"], ["divisible by the 2 GPUs"]),
        (["--model", "gpt2", "--budget", "8GiB", "--seq-len", "1025"], ["1024 positions"]),
        (["--model", "gpt2", "--budget", "8GiB", "--image-size", "224"], ["--image-size is for pictures"]),
        (["--model", "vit-b-16", "--budget", "8GiB", "--image-size", "225"], ["patches of 16"]),
        (["--model", "vit-b-16", "--budget", "8GiB", "--seq-len", "9"], ["--image-size"]),
        (["--model", "gpt2", "--budget", "8GiB", "--buget", "9GiB"], ["--budget"]),
        (["--model", "gpt2", "--budget", "8GiB", "--margin", "5"], ["--margin"]),
        (["--model", "gpt2", "--budget", "8GiB", "--rank", "0"], ["--rank"]),
    ],
)
def test_bad_input_is_one_sentence(words, expected, tmp_path):
    assert_refused(run_command(["plan", *words], tmp_path), *expected)


@pytest.mark.slow
def test_a_budget_for_nothing_says_what_the_least_would_need(tmp_path):
    words = ["plan", *TINY, "--budget", "1MiB", "--train", "full", "head", "--save", "all", "--optim", "sgd"]
    assert_refused(run_command(words, tmp_path), "nothing fits", "head+all+sgd", "needs")


@pytest.mark.slow
def test_the_command_prints_tables_and_json(tmp_path):
    words = ["plan", *TINY, "--budget", "30MiB", "--train", "full", "head", "--optim", "adamw", "galore-adamw"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("fits (", "does not fit (", "refused (", "not measured", "no difference from", "31,457,280 bytes"):
        assert text in done.stdout, done.stdout
    done = run_command([*words, "--json"], tmp_path)
    content = json.loads(done.stdout)
    assert len(content["combinations"]) == 2 * 4 * 2
    assert {c["status"] for c in content["combinations"]} == {"fits", "does not fit", "refused"}


@pytest.mark.slow
def test_measured_stands_beside_predicted(tmp_path):
    words = ["plan", *TINY, "--budget", "1GiB", "--train", "lora", "--save", "all", "--optim", "adamw", "--measure"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    errors = {
        words[0]: float(words[-1].rstrip("%"))
        for words in lines
        if words and words[-1].endswith("%") and len(words) == 6
    }
    assert {"weights", "gradients", "optimizer", "activations", "peak"} <= set(errors)
    assert all(abs(e) <= 2 for e in errors.values())


@pytest.mark.slow
def test_a_large_model_is_planned_without_being_allocated():
    from memtrain_common.measuring.peak import memory_in_use

    before = memory_in_use(torch.device("cpu"))
    plan = plan_of(
        "--model", "meta-llama/Llama-2-7b", "--budget", "80GiB", "--batch", "1", "--weights", "bfloat16",
        "--train", "full", "lora", "--save", "checkpoint", "--optim", "sgd",
    )  # fmt: skip
    full = next(a for a in plan.arms if a.axes.train == "full")
    assert full.predicted.ledger["weights"] == 2 * 6_738_415_616
    assert memory_in_use(torch.device("cpu")) - before < 1 << 30


def test_known_results_are_the_committed_ones():
    assert json.loads(known.FILE.read_text()) == known.collect(ROOT / "benchmarks" / "results")
    scores, overheads, timings = known.read()
    assert all((ROOT / "benchmarks" / "results" / k.source).exists() for k in [*scores, *overheads, *timings])
    assert [k.settings["rank"] for k in known.scores_of(Axes("lora-xs", rank=9), scores)] == [8, 8]  # of two studies
    assert known.scores_of(Axes("melo", "backrazor"), scores) == []
    assert len(known.scores_of(Axes("full", "backrazor", "sgd"), scores)) == 3
    for task in ("text", "pictures", "language"):  # a real pretrained model for it comes first, another's not at all
        plain, *others = known.scores_of(Axes(), scores, task)
        assert plain.task == task
        assert plain.value == plain.plain
        assert {k.task for k in others} <= {"", task}
    (found,) = known.scores_of(Axes("lora", "backrazor"), scores)
    assert found.source == "ablation_digits.json"
    assert found.value != found.plain


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["galore-adamw8bit", "galore-adafactor"])
def test_galore_is_planned_for_shards(optim):
    place = Workplace(SMALL["bert"], rows=4, processes=2, parallel="fsdp")
    whole = Workplace(SMALL["bert"], rows=4)
    axes = Axes("full", "all", optim, galore_rank=8)
    assert predict_arm(place, axes).ledger["optimizer"] == predict_arm(whole, axes).ledger["optimizer"]


def test_input_flags_reach_the_shape():
    config = configure(["--model", "vit-b-16", "--budget", "8GiB", "--image-size", "384", "--classes", "7"])
    shape, tokens = planned_shape(config)
    assert (shape.image_size, shape.config["num_labels"], tokens) == (384, 7, 0)
    assert planned_shape(configure(["--model", "roberta-base", "--budget", "8GiB"]))[1] == 128


@pytest.mark.slow
def test_the_readmes_example_is_what_plan_prints(tmp_path):
    text = (ROOT / "apps" / "README.md").read_text()
    (block,) = re.findall(r"```\n\$ (plan .*?)```", text, re.S)
    command, shown = block.replace("\\\n", " ").split("\n", 1)
    done = run_command(command.split(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(shown)


@pytest.mark.parametrize(
    ("family", "more", "most"),
    [
        ("roberta", {}, 512),
        ("camembert", {"pad_token_id": 1}, 512),
        ("mpnet", {}, 512),
        ("esm", {"pad_token_id": 0}, 513),
        ("bert", {"pad_token_id": 0}, 514),
    ],
)
def test_positions_behind_the_paddings(family, more, most):
    assert Shape("it", family, {"max_position_embeddings": 514, **more}, "text").positions == most
