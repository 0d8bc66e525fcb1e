"""backrazor-memory: predicted as measured, layers and operations add up, known shapes, pictures, mistakes."""

import dataclasses
import json
import re
from contextlib import nullcontext

import pytest
from backrazor.tasks.memory import alike, saved, shaped
from backrazor.tasks.memory_flags import KNOWN, MemoryConfig
from memtrain_common.files import read_json
from memtrain_common.measuring.prediction import fake_step
from support import assert_refused, run_command

PROG = "backrazor-memory"


def memory(cwd, *words, draw=False):
    return run_command([PROG, *words], cwd, pictures=draw)


SMALL = {
    "vit-mini": ["--image-size", "24"],
    "vit-mini eager": ["--image-size", "24", "--eager"],
    "resnet20": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_predicted_is_measured(tmp_path, name):
    found = []
    for more in ([], ["--measure"]):
        words = [name.split()[0], *SMALL[name], "--batch-size", "3", "--json", "a.json", "--overwrite", *more]
        done = memory(tmp_path, *words)
        assert done.returncode == 0, done.stderr
        found.append(read_json(tmp_path / "a.json"))
    assert found[0].pop("measured") is False
    assert found[1].pop("measured") is True
    assert found[0] == found[1]
    one = found[0]
    assert one["dense"] == sum(p["dense"] for p in one["saved"])
    assert one["back_razor"] == sum(p["back_razor"] for p in one["saved"])
    assert one["dense"] > 8 * one["back_razor"]
    shown = re.findall(r"total .*? ([\d.]+)×", done.stdout)
    assert float(shown[-1]) == pytest.approx(one["dense"] / one["back_razor"], abs=0.06)
    assert ("softmax" in done.stdout) == ("eager" in name)


@pytest.mark.slow
def test_what_is_recomputed_is_not_stored_and_what_is_exact_is_dense(tmp_path):
    kept = {}
    for words in ((), ("--recompute", "attention"), ("--recompute", "block"), ("--exact", "attention", "*.fc1")):
        done = memory(tmp_path, "vit-mini", *words, "--json", "a.json", "--overwrite")
        assert done.returncode == 0, done.stderr
        kept[words] = json.loads((tmp_path / "a.json").read_text())["back_razor"]
    bytes_of = list(kept.values())
    assert bytes_of[3] > bytes_of[0] > bytes_of[1] > bytes_of[2]


@pytest.mark.slow
def test_a_picture_and_tables(tmp_path):
    done = memory(tmp_path, "resnet20", "--layers", "all", "--out", "r.png", draw=True)
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "r.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert_refused(memory(tmp_path, "resnet20", "--out", "r.png"), "--out r.png exists", "--overwrite")
    assert (tmp_path / "r.png").read_bytes() == drawn
    assert "layer3.2.bn2" in done.stdout
    assert "batch_norm" in done.stdout
    none = memory(tmp_path, "resnet20", "--layers", "none")
    assert "by layer" not in none.stdout
    folded = memory(tmp_path, "resnet20").stdout
    assert "layer3.*.bn2" in folded
    assert "layer3.2" not in folded


def test_names_that_differ_in_the_block_alone():
    assert alike("vit.layers.11.mlp.fc1") == "vit.layers.*.mlp.fc1"
    assert alike("layer1.0") == "layer1.*"
    assert alike("h.3.attn.1.c") == "h.*.attn.1.c"
    assert alike("(model)") == "(model)"
    assert alike("fc1") == "fc1"


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_are_built_without_memory(name):
    """Published counts of parameters, a head of 100 classes left out."""
    published = {"vit-b-16": 85.8e6, "vit-s-16": 21.67e6, "resnet18": 11.18e6, "resnet50": 23.51e6, "gpt2": 124.4e6,
                 "mobilenet_v2": 2.22e6, "proxyless_mobile": 2.80e6, "bert-base": 109.5e6, "bert-large": 335.1e6,
                 "roberta-base": 124.6e6, "gpt2-medium": 354.8e6, "gpt2-large": 774.0e6,
                 "gpt2-xl": 1557.6e6}  # fmt: skip
    with fake_step():
        model = shaped(MemoryConfig(model=name)).build()
        body = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("classifier", "fc.", "linear.")))
    if name in published:
        assert body == pytest.approx(published[name], rel=0.01)
    else:
        assert body > 1e5


def test_a_folder_refuses_the_size_of_what_its_model_does_not_see(tmp_path, encoder):
    from memtrain_common.models.vit import build_vit

    build_vit("mini", image_size=16, patch_size=4, classes=3).save_pretrained(
        tmp_path / "gpt2-like"
    )  # a name says nothing
    text = memory(tmp_path, encoder, "--image-size", "64", "--sequence-length", "20")
    assert_refused(text, "--image-size 64 would do nothing", "sees tokens, so leave it out")
    pictures = memory(tmp_path, "gpt2-like", "--sequence-length", "9", "--layers", "none")
    assert_refused(pictures, "--sequence-length 9 would do nothing", "gpt2-like sees pictures, so leave it out")


@pytest.mark.slow
def test_the_numbers_state_every_setting_that_changes_them(tmp_path, encoder):
    """All flags but where to write, how to show it and the model's other kind of size."""
    stated = {}
    for name, words in {"vit-mini": ["--image-size", "16"], encoder: ["--sequence-length", "12"]}.items():
        words = [
            name,
            *words,
            "--batch-size",
            "2",
            "--train",
            "bitfit",
            "--eager",
            "--dtype",
            "bfloat16",
            "--classes",
            "7",
        ]
        done = memory(tmp_path, *words, "--layers", "none", "--json", "a.json", "--overwrite")
        assert done.returncode == 0, done.stderr
        stated[name] = read_json(tmp_path / "a.json")
    flags = {f.name for f in dataclasses.fields(MemoryConfig)} - {"out", "json", "overwrite", "layers", "measure"}
    for name, size, other in (
        ("vit-mini", "image_size", "sequence_length"),
        (encoder, "sequence_length", "image_size"),
    ):
        assert flags - {other} <= set(stated[name]), flags - set(stated[name])
        assert other not in stated[name]
        assert stated[name][size] == {"vit-mini": 16}.get(name, 12)
        wanted = {"train": "bitfit", "eager": True, "dtype": "bfloat16", "classes": 7, "batch_size": 2}
        assert wanted.items() <= stated[name].items()


@pytest.mark.slow
def test_a_folder_of_transformers(tmp_path, encoder):
    done = memory(tmp_path, encoder, "--sequence-length", "20", "--layers", "none")
    assert done.returncode == 0, done.stderr
    assert "8 sequences of 20 tokens" in done.stdout
    too_long = memory(tmp_path, encoder, "--sequence-length", "65")
    assert_refused(too_long, "beyond the 64 positions")
    from memtrain_common.models.vit import build_vit

    build_vit("mini", image_size=16, patch_size=4, classes=3).save_pretrained(tmp_path / "vit")
    done = memory(tmp_path, "vit", "--layers", "none")
    assert "8 pictures of 16×16 pixels" in done.stdout
    assert memory(tmp_path, "vit", "--image-size", "32", "--layers", "none").returncode == 0


@pytest.mark.slow
def test_frozen_weights_save_less():
    totals = {}
    for train in ("full", "bitfit", "head"):
        config = MemoryConfig(model="vit-mini", image_size=16, train=train)
        totals[train] = sum(saved(config, shaped(config), nullcontext)[0].values())
    assert totals["full"] > totals["bitfit"] > totals["head"] > 0


@pytest.mark.slow
def test_a_batch_of_any_size_saves_as_much_a_sample():
    totals = []
    for n in (2, 6):
        config = MemoryConfig(model="resnet20", batch_size=n)
        totals.append(sum(saved(config, shaped(config), nullcontext)[0].values()))
    per_batch = 64 * 2 * 4  # mean and 1/σ of the batch norms, which do not grow with it
    assert totals[1] == pytest.approx(3 * totals[0], abs=40 * per_batch)


REFUSED = {
    "no model": ([], "MODEL is missing"),
    "unknown": (["resnet19"], "'resnet19' is no known model and no folder"),
    "keep": (["resnet20", "--keep", "2"], "--keep must be above 0 and at most 1, got 2"),
    "mode": (["resnet20", "--razor-mode", "new"], "--razor-mode"),
    "eager cnn": (["resnet20", "--eager"], "--eager would do nothing"),
    "tokens of pictures": (["resnet20", "--sequence-length", "9"], "resnet20 sees pictures"),
    "pixels of tokens": (["gpt2", "--image-size", "9"], "gpt2 sees tokens"),
    "the padding's positions": (
        ["roberta-base", "--batch-size", "1", "--sequence-length", "514"], "beyond the 512 positions of roberta-base",
    ),
    "too long": (["gpt2", "--sequence-length", "2000"], "beyond the 1024 positions of gpt2"),
    "flag": (["resnet20", "--batchsize", "3"], "did you mean --batch-size?"),
    "picture": (["resnet20", "--out", "saved.xyz"], "--out saved.xyz must end in one of .png"),
    "a folder for numbers": (["resnet20", "--json", ".", "--overwrite"], "--json . is a folder"),
    "a folder for the picture": (["resnet20", "--out", "no/x.png"], "--out no/x.png has no folder to be in: make "),
    "one file for two": (
        ["resnet20", "--out", "x.png", "--json", "./x.png", "--overwrite"], "--out and --json name the same file",
    ),
    "one value a channel": (
        ["resnet20", "--image-size", "1", "--batch-size", "1"], "resnet20 cannot take a training step as it was asked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    words, expected = REFUSED[name]
    assert_refused(memory(tmp_path, *words), expected)
    assert not list(tmp_path.iterdir())
