"""galore-vit train, eval and info: what they train, write, resume and refuse."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from image_files import image_folder, random_file
from memtrain_common.data.images.medmnist_sets import SETS
from memtrain_common.models.vit import build_vit
from memtrain_common.runs import checkpoint
from support import assert_refused, rows, run_command, run_ranks, without_pictures

QUICK = ["--epochs", "2", "--batch-size", "8", "--tracker", "none", "--device", "cpu", "--galore-rank", "4",
         "--gap", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes, told apart by their brightness."""
    return image_folder(tmp_path_factory.mktemp("pictures") / "pets", 12)


def galore_vit(cwd, *words):
    return run_command(["galore-vit", *words], cwd)


def train(cwd, *words, data=None, quick=QUICK, pictures=False):
    where = ["--data", "folder", "--data-dir", str(data), "--size", "8"] if data else []
    words = ["galore-vit", "train", *where, *quick, *words]
    return run_command(words, cwd, pictures=pictures)


def weights(run):
    """The newest checkpoint's model, as bytes by name."""
    state = checkpoint.load(max((run / "checkpoints").glob("step-*")))
    return {n: t.numpy().tobytes() for n, t in state["model"].items()}


def without(words, flag):
    i = words.index(flag)
    return [*words[:i], *words[i + 2 :]]


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_source_projects_rank_above_every_side_runs_as_published(tmp_path, pictures):
    """meloravit.py: MeLo r = 8 under GaLore's rank 512, which turns the adapters' gradients and projects nothing."""
    words = ["--train", "melo", "--rank", "8", "--paper", "--out", "run"]
    done = train(tmp_path, *words, data=pictures, quick=[*without(QUICK, "--galore-rank"), "--galore-rank", "512"])
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "run" / "log.txt").read_text()
    # q and v of four blocks, A and B of each
    assert "GaLore projects nothing: rank 512 is not below the smaller side of any of the 16 weights" in said
    assert "(8 at most)" in said
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    numbers = 16 * 8 * 96  # of the adapters; both moments, and an 8x8 basis for each
    head = 96 * 2 + 2
    assert measured["optimizer"] >= 4 * (2 * numbers + 2 * head + 16 * 8 * 8)


@pytest.mark.slow
def test_the_run_folder(tmp_path, pictures):
    done = train(tmp_path, "--out", "run", data=pictures, pictures=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    [trial] = result["own"]["trials"]
    assert trial["test"]["AUC"] > 0.9  # a model of brightness
    for name in ("confusion_test.png", "roc_test.png", "loss.png", "memory.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    [predictions] = run.glob("pets_test_*.csv")
    shown = f"pets_test_[AUC]{trial['test']['AUC']:.3f}_[ACC]{trial['test']['ACC']:.3f}@seed-0.csv"
    assert predictions.name == shown
    table = np.loadtxt(predictions, delimiter=",")
    assert table.shape == (24, 3)
    assert np.array_equal(table[:, 0], np.arange(24))
    assert np.allclose(table[:, 1:].sum(1), 1)
    best = max((r for r in rows(run) if r["split"] == "val"), key=lambda r: r["AUC"])
    assert best["step"] == trial["step"]
    assert result["measured"]["optimizer"] == json.loads((run / "memory.json").read_text())["totals"]["optimizer"]
    said = (run / "log.txt").read_text()
    assert "energy" in said
    assert re.search(r"optimizer +[\d.]+ [KM]iB of state", said)
    assert f"{trial['test']['AUC']:.3f}" in said


@pytest.mark.slow
def test_galore_keeps_less_state_than_adamw(tmp_path, pictures):
    quick = QUICK[: QUICK.index("--galore-rank")]
    sizes = {}
    for optim, more in (
        ("adamw", []),
        ("galore-adamw", ["--galore-rank", "16"]),
        ("galore-adamw8bit", ["--galore-rank", "16"]),
    ):
        done = train(tmp_path, "--optim", optim, "--out", optim, *more, data=pictures, quick=quick)
        assert done.returncode == 0, done.stderr
        sizes[optim] = json.loads((tmp_path / optim / "result.json").read_text())["measured"]["optimizer"]
    assert sizes["adamw"] > 4 * sizes["galore-adamw"]
    assert sizes["galore-adamw"] > sizes["galore-adamw8bit"]


RESUMED = {
    "galore-adamw": [],
    "galore-adamw8bit": [],
    "galore-adafactor": [],
    "galore-scaled": ["--galore-rank", "1", "--proj-type", "reverse_std"],
    "galore-torch": ["--proj-type", "full"],
    "with everything": ["--refresh", "svd", "--augment", "flip-shift", "--dropout", "0.1", "--schedule", "steps",
                        "--gradient-accumulation-steps", "2", "--weight-decay", "0.1"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.filterwarnings("ignore")
def test_resuming_gives_the_bytes_of_never_having_stopped(tmp_path, pictures, name):
    """Stopped at the end of the first of two epochs: in the middle of a gap, with the next refresh still to come."""
    optim = name if name in RESUMED and "everything" not in name else "galore-adamw"
    words = [*RESUMED[name], "--optim", optim]
    assert train(tmp_path, *words, "--out", "whole", data=pictures).returncode == 0
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    steps = sorted((cut / "checkpoints").glob("step-*"))
    for late in steps[1:]:
        (late / "manifest.json").write_text("damaged")
    (cut / "result.json").unlink()
    again = galore_vit(tmp_path, "train", "--resume", "cut")
    assert again.returncode == 0, again.stderr
    assert f"resumed from {steps[0].relative_to(tmp_path)}" in again.stdout
    assert weights(cut) == weights(tmp_path / "whole")
    assert rows(cut) == rows(tmp_path / "whole")


def _under_torchrun(folder, words):
    os.chdir(folder)
    without_pictures()
    from galore_vit.cli import dispatch

    dispatch(words)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, pictures):
    words = ["train", "--data", "folder", "--data-dir", str(pictures), "--size", "8", *QUICK]
    words += ["--gradient-accumulation-steps", "2", "--log-interval", "1", "--out"]
    assert galore_vit(tmp_path, *words, "one").returncode == 0
    run_ranks(2, _under_torchrun, tmp_path, [*words, "two"])
    losses = [[r["loss"] for r in rows(tmp_path / n)] for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert max(losses[0]) > 1.05 * min(losses[0])
    [one], [two] = ([np.loadtxt(f, delimiter=",") for f in (tmp_path / n).glob("*_test_*.csv")] for n in ("one", "two"))
    assert np.allclose(one, two, atol=0.02)
    assert not np.allclose(one[:, 1], one[0, 1], atol=0.02)


@pytest.mark.slow
def test_what_each_way_of_training_moves(tmp_path, pictures):
    torch.manual_seed(3)
    build_vit("mini", image_size=8, patch_size=2, classes=2).save_pretrained(tmp_path / "vit")
    plain = [*without(without(QUICK, "--galore-rank"), "--gap"), "--weights", "vit", "--optim", "adamw"]

    from safetensors.torch import load_file

    begun = load_file(tmp_path / "vit" / "model.safetensors")
    for way, adapters in (("head", 0), ("melo", 2 * 4), ("lora", 6 * 4)):
        done = train(tmp_path, "--train", way, "--out", way, data=pictures, quick=plain)
        assert done.returncode == 0, done.stderr
        state = checkpoint.load(max((tmp_path / way / "checkpoints").glob("step-*")))["model"]
        moved = {n for n, t in state.items() if "lora_B" in n and t.count_nonzero()}
        assert len(moved) == adapters
        for name, tensor in state.items():
            own = name.replace("base_model.model.", "").replace("base_layer.", "")
            if own in begun and "classifier" not in own:
                assert torch.equal(tensor, begun[own]), name
        heads = [t for n, t in state.items() if n.endswith("classifier.modules_to_save.default.weight")]
        heads += [t for n, t in state.items() if n == "classifier.weight"]
        assert not torch.equal(heads[0], begun["classifier.weight"])
    from galore_vit.melo_file import read_melo
    from memtrain_common.models.vit import load_vit

    vit, _ = load_vit(tmp_path / "vit", image_size=8, classes=2)
    again = read_melo(vit, tmp_path / "melo" / "adapter.safetensors")
    state = checkpoint.load(tmp_path / "melo" / "checkpoints" / _best(tmp_path / "melo"))["model"]
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())


def _best(run):
    return f"step-{json.loads((run / 'result.json').read_text())['step']:08d}"


@pytest.mark.slow
def test_seeds_and_folds(tmp_path, pictures):
    words = ["--seeds", "2", "--folds", "2", "--epochs", "1", "--out", "many"]
    done = train(tmp_path, *words, data=pictures)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "many" / "result.json").read_text())["own"]
    names = [f"seed-{s}-fold-{k}" for s in (0, 1) for k in (0, 1)]
    aucs = [json.loads((tmp_path / "many" / n / "test.json").read_text())["AUC"] for n in names]
    assert result["mean"]["test_AUC"] == pytest.approx(np.mean(aucs))
    assert result["ci95"]["test_AUC"] == pytest.approx(3.182 * np.std(aucs, ddof=1) / 2)
    assert "mean ± 95 % CI" in done.stdout
    evaluated = galore_vit(tmp_path, "eval", "--run", "many", "--split", "val", "--out", "seen")
    assert evaluated.returncode == 0, evaluated.stderr
    assert sorted(p.name for p in (tmp_path / "seen").iterdir()) == names
    again = galore_vit(tmp_path, "train", "--resume", "many")  # nothing is left to do
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "many" / "result.json").read_text())["own"]["mean"] == result["mean"]


@pytest.mark.slow
def test_a_multi_label_set(tmp_path):
    random_file(tmp_path, "chestmnist", 24)
    words = ["--data", "chestmnist", "--data-dir", ".", "--no-verify", "--epochs", "1", "--out", "chest"]
    done = train(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    [predictions] = (tmp_path / "chest").glob("chestmnist_test_*.csv")
    table = np.loadtxt(predictions, delimiter=",")
    assert table.shape == (24, 15)
    from medmnist.evaluator import Evaluator

    official = Evaluator("chestmnist", "test", root=str(tmp_path)).evaluate(table[:, 1:])
    found = json.loads((tmp_path / "chest" / "test.json").read_text())
    assert found["AUC"] == pytest.approx(official.AUC, abs=1e-12)
    assert found["ACC"] == pytest.approx(official.ACC, abs=1e-12)


# -- eval and info ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eval_agrees_with_train_and_with_its_own_predictions(tmp_path, pictures):
    assert train(tmp_path, "--out", "run", data=pictures).returncode == 0
    trained = json.loads((tmp_path / "run" / "test.json").read_text())
    done = galore_vit(tmp_path, "eval", "--run", "run", "--out", "again")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again" / "test.json").read_text()) == trained
    [predictions] = (tmp_path / "again").glob("pets_test_*.csv")
    lines = predictions.read_text().splitlines()
    predictions.write_text("\n".join(reversed(lines)) + "\n")  # the index says which is which
    words = ["--predictions", str(predictions), "--data", "folder", "--data-dir", str(pictures), "--size", "8"]
    compared = galore_vit(tmp_path, "eval", *words)
    assert compared.returncode == 0, compared.stderr
    assert f"{trained['AUC']:.4f}  {trained['ACC']:.4f}" in compared.stdout
    predictions.write_text("\n".join(lines[:-1]) + "\n")
    assert_refused(galore_vit(tmp_path, "eval", *words), "23 scores do not match 24 labels")
    predictions.write_text("0,0.2,0.3\n0,0.1,0.9\n")
    assert_refused(galore_vit(tmp_path, "eval", *words), "does not number its lines 0 to 1")
    predictions.write_text("image,cat,dog\n")
    assert_refused(galore_vit(tmp_path, "eval", *words), "is not a file of predictions")


@pytest.mark.slow
def test_eval_knows_the_pictures_of_the_run(tmp_path, pictures):
    """A folder that grew, renamed classes, another set; the run's own scores stay."""
    flat = tmp_path / "pets"
    shutil.copytree(pictures / "train", flat)
    assert train(tmp_path, "--epochs", "1", "--out", "run", data=flat).returncode == 0
    own = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    shutil.copytree(flat, tmp_path / "moved")
    evaluate = ["eval", "--run", "run", "--data-dir"]
    done = galore_vit(tmp_path, *evaluate, "moved", "--out", "same")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "same" / "test.json").read_bytes() == own["test.json"]
    shutil.copy(pictures / "val" / "cat" / "0.png", flat / "cat" / "new.png")
    refused = galore_vit(tmp_path, "eval", "--run", "run")
    assert_refused(refused, "run was trained on other data: ", "--data-changed ok --out FOLDER")
    other, ok = str(image_folder(tmp_path / "other", 12, seed=1)), ["--data-changed", "ok"]
    assert_refused(galore_vit(tmp_path, *evaluate, other), "run was trained on other data: ")
    for out in ([], ["--out", "run"], ["--out", str(tmp_path / "run")]):
        assert_refused(galore_vit(tmp_path, *evaluate, other, *ok, *out), "--data-changed ok needs --out")
    done = galore_vit(tmp_path, *evaluate, other, *ok, "--out", "transfer")
    assert done.returncode == 0, done.stderr
    assert "whose training may have seen some of them" in done.stdout
    assert json.loads((tmp_path / "transfer" / "test.json").read_text())["images"] == 24
    (tmp_path / "moved" / "cat").rename(tmp_path / "moved" / "zebra")  # now the second class
    refused = galore_vit(tmp_path, *evaluate, "moved", *ok, "--out", "renamed")
    assert_refused(refused, "the classes are others (not cat but zebra)")
    assert not (tmp_path / "renamed").exists()
    assert own == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}


def test_info(tmp_path):
    random_file(tmp_path, "breastmnist", 20)
    done = galore_vit(tmp_path, "info", "--data-dir", ".", "--model", "s", "--ranks", "64")
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in SETS)
    assert re.search(r"breastmnist\.npz +MD5 \w+, not 750601b1", done.stdout)
    assert re.search(r"adamw +168\.\d MiB +1\.0", done.stdout)
    assert re.search(r"galore-adamw, rank 64 +40\.\d MiB +4\.2", done.stdout)


# -- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "no data folder": (["--data", "breastmnist"], "needs --data-dir"),
    "no such file": (["--data", "breastmnist", "--data-dir", "nowhere"], "breastmnist.npz is not there"),
    "scale 0": (["--scale", "0"], "--galore-scale must be positive, got 0"),
    "rank 0": (["--galore-rank", "0"], "--galore-rank must be at least 1, got 0"),
    "alpha 0": (["--train", "melo", "--lora-alpha", "0"], "--alpha must be positive"),
    "rank too large": (
        ["--galore-rank", "96"],
        "rank 96 is not below the smaller side of any targeted weight",
    ),
    "nothing to project": (["--train", "head"], "GaLore finds no weight to project"),
    "adapters thinner than the rank": (["--train", "melo", "--galore-rank", "4"], "GaLore would project nothing"),
    "which --paper takes": (["--train", "melo", "--galore-rank", "4"], "--paper runs it as the published"),
    "paper with its own refresh": (["--paper", "--refresh", "svd"], "--paper finds subspaces as published"),
    "paper in 8 bits": (["--paper", "--optim", "galore-adamw8bit"], "8-bit arithmetic is bitsandbytes' own"),
    "rank without GaLore": (["--optim", "adamw", "--galore-rank", "8"], "--galore-rank 8 would do nothing"),
    "alpha without adapters": (["--lora-alpha", "8"], "--alpha 8.0 would do nothing"),
    "an adapter's rank without one": (["--rank", "8"], "GaLore's rank is --galore-rank"),
    "refresh of galore-torch": (["--optim", "galore-torch", "--refresh", "svd"], "would do nothing"),
    "size of digits": (["--size", "64"], "the digits have 8 pixels"),
    "unknown set": (["--data", "mnist"], "--data"),
    "unknown flag": (["--rnak", "8"], "did you mean --rank?"),
    "patches that do not fill": (["--patch-size", "3"], "do not fill images of 8"),
    "one fold": (["--folds", "1"], "--folds 1 leaves nothing"),
    "no weights": (["--weights", "nowhere"], "nowhere holds no ViT"),
    "no such run": (["--resume", "nowhere"], "nowhere is not a run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    words, expected = REFUSED[name]
    assert_refused(galore_vit(tmp_path, "train", "--device", "cpu", *words), expected)
    assert not (tmp_path / "runs").exists() or not list(tmp_path.glob("runs/*/checkpoints/*"))


def rewritten(folder, **changes):
    random_file(folder, "breastmnist", 20)
    arrays = {**np.load(folder / "breastmnist.npz"), **changes}
    np.savez(folder / "breastmnist.npz", **arrays)


CONTENTS = {
    "absent": ({"val_labels": np.zeros((20, 1), np.uint8)}, "class 0 of breastmnist is the only one in the 20 val"),
    "one sample": ({"test_labels": np.ones((1, 1), np.uint8), "test_images": np.zeros((1, 28, 28), np.uint8)},
                   "class 0 of breastmnist is absent from the 1 test images"),
    "range": ({"train_labels": np.full((20, 1), 2, np.uint8)}, "must lie in 0..1"),
    "task": ({"test_labels": np.zeros((20, 14), np.uint8)}, "14 columns"),
    "match": ({"test_labels": np.zeros((19, 1), np.uint8)}, "19 test labels for 20 images"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_refused_contents(tmp_path, name):
    changes, expected = CONTENTS[name]
    rewritten(tmp_path, **changes)
    words = ["galore-vit", "train", "--data", "breastmnist", "--data-dir", ".", "--no-verify", "--device", "cpu"]
    assert_refused(run_command(words, tmp_path), expected)
    assert not (tmp_path / "runs").exists()


def test_a_wrong_md5_is_refused(tmp_path):
    random_file(tmp_path, "breastmnist", 20)
    words = ["galore-vit", "train", "--data", "breastmnist", "--data-dir", "."]
    assert_refused(run_command(words, tmp_path), "published file has 750601b1f35ba3300ea97c75c52ff8f6")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_settings_and_images(tmp_path, pictures):
    assert train(tmp_path, "--out", "run", "--epochs", "1", data=pictures).returncode == 0
    again = ["galore-vit", "train", "--resume", "run"]
    assert_refused(run_command([*again, "--galore-rank", "8"], tmp_path), "was begun with --galore-rank 4, not 8")
    other = image_folder(tmp_path / "other", 12, seed=1)
    assert_refused(run_command([*again, "--data-dir", str(other)], tmp_path), "was trained on other data")
    (tmp_path / "run" / "result.json").unlink()
    assert_refused(galore_vit(tmp_path, "eval", "--run", "run"), "run is not finished")


@pytest.mark.parametrize(("words", "expected"), [
    (["eval"], "needs either --run"),
    (["eval", "--run", "a", "--predictions", "b"], "needs either --run"),
    (["eval", "--run", "a", "--size", "64"], "--size goes with --predictions"),
    (["eval", "--predictions", "b", "--data-changed", "ok"], "--data-changed goes with --run"),
    (["eval", "--run", "nowhere"], "nowhere is not a run"),
    (["info", "--ranks", "0"], "--ranks takes whole numbers"),
    (["info", "--image-size", "30"], "do not fill images of 30"),
    (["trian"], "the commands are train, eval and info"),
])  # fmt: skip
def test_other_refusals(tmp_path, words, expected):
    assert_refused(galore_vit(tmp_path, *words), expected)


@pytest.mark.slow
def test_the_real_breastmnist(tmp_path, real_data):
    words = ["--data", "breastmnist", "--data-dir", str(real_data / "medmnist"), "--epochs", "1", "--out", "run"]
    done = train(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "546 train, 78 val, 156 test images" in done.stdout
    [predictions] = (tmp_path / "run").glob("breastmnist_test_*.csv")
    from medmnist.evaluator import Evaluator

    official = Evaluator("breastmnist", "test", root=str(real_data / "medmnist"))
    table = np.loadtxt(predictions, delimiter=",")
    found = json.loads((tmp_path / "run" / "test.json").read_text())
    assert found["AUC"] == pytest.approx(official.evaluate(table[:, 1:]).AUC, abs=1e-12)
