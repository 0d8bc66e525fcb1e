"""backrazor-train as a person meets it: what it trains and saves, its folder, kills and signals, sets, mistakes."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from backrazor.tasks.official import TRAIN
from backrazor.tasks.saving import first_and_last, saving_of, train_only
from backrazor.tasks.train import evaluate, image_size, lr_factor, make_model, make_optimizer, train_one
from backrazor.tasks.train_flags import PRESETS, TrainConfig, check, with_preset
from image_files import google_file, image_folder, random_file
from memtrain_common.commands.cli import parse
from memtrain_common.commands.official import translate
from memtrain_common.commands.session import Session
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError
from memtrain_common.measuring.memory import SavedActivations
from memtrain_common.measuring.prediction import dense_activations
from memtrain_common.models.classifiers import build_classifier, classification_loss
from memtrain_common.models.vit import build_vit, load_vit
from memtrain_common.runs import checkpoint
from support import Command, assert_refused, pause_at, rows, run_command, run_ranks, without_pictures
from torch import nn

PROG = "backrazor-train"
QUICK = ["--epochs", "2", "--batch-size", "8", "--tracker", "none", "--device", "cpu", "--log-interval", "1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes, told apart by their brightness."""
    return image_folder(tmp_path_factory.mktemp("pictures") / "pets", 12)


def razor(cwd, *words, pictures=False):
    return run_command([PROG, *words], cwd, pictures=pictures)


def words_for(data, *more):
    return ["--data", "folder", "--data-dir", str(data), "--image-size", "8", *QUICK, *more]


def train(cwd, data, *more, pictures=False):
    return razor(cwd, *words_for(data, *more), pictures=pictures)


def weights(run):
    state = checkpoint.load(max((run / "checkpoints").glob("step-*")))
    return {n: t.numpy().tobytes() for n, t in state["model"].items()}


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ([], True), (["--out", "x"], True), (["--keep=0.2", "--out", "x"], True), (["vit-pets", "--out", "x"], False),
        (["--data", "folder"], False), (["--model=vit-mini"], False), (["--resume", "x"], False), (["--help"], False),
    ],
)  # fmt: skip
def test_flags_that_leave_model_and_data_alone_are_laid_over_the_preset_of_no_flags(words, preset):
    assert list(with_preset(words)) == (["digits", *words] if preset else words)


# -- a run and its folder ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_run_folder(tmp_path, pictures):
    done = train(tmp_path, pictures, "--out", "run", "--compare-dense", "--epochs", "4", pictures=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert result["scores"]["test"]["accuracy"] > 0.9  # a model of brightness
    assert result["own"]["dense"]["test"]["accuracy"] > 0.9
    dense, kept = result["own"]["dense_activation_bytes"], result["measured"]["activations"]
    assert dense > 8 * kept
    for name in ("loss.png", "memory.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    # what was predicted of dense training is what dense training held, to the byte
    assert json.loads((run / "dense" / "memory.json").read_text())["totals"]["activations"] == dense
    assert json.loads((run / "memory.json").read_text())["totals"]["activations"] == kept
    said = (run / "log.txt").read_text()
    assert said == done.stdout
    assert f"{100 * result['scores']['test']['accuracy']:.2f} %" in said
    assert f"{dense / kept:.1f}×" in said
    assert "energy" in said
    losses = [r["loss"] for r in rows(run) if r["split"] == "train"]
    begun = [r["loss"] for r in rows(run / "dense") if r["split"] == "train"]
    assert losses[0] == pytest.approx(begun[0], rel=1e-5)  # the forward pass is exact, on the same batch
    assert losses[1:] != begun[1:]


@pytest.mark.slow
def test_keep_1_is_dense_training(tmp_path, pictures):
    assert train(tmp_path, pictures, "--mode", "full", "--out", "full").returncode == 0
    assert train(tmp_path, pictures, "--keep", "1", "--out", "all").returncode == 0
    a, b = (rows(tmp_path / n) for n in ("full", "all"))
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "bitfit", "head", "backrazor"])
def test_what_each_mode_moves(tmp_path, pictures, mode):
    torch.manual_seed(3)
    build_vit("mini", image_size=8, patch_size=2, classes=2).save_pretrained(tmp_path / "vit")
    begun = load_vit(tmp_path / "vit", image_size=8, classes=2)[0].state_dict()
    done = train(tmp_path, pictures, "--mode", mode, "--weights", "vit", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "the head is theirs" in done.stdout
    state = checkpoint.load(max((tmp_path / "run" / "checkpoints").glob("step-*")))["model"]
    moved = {n for n in begun if not torch.equal(state[n], begun[n])}
    expected = {
        "full": set(begun),
        "backrazor": set(begun),
        "bitfit": {n for n in begun if n.endswith(".bias") or n.startswith("classifier.")},
        "head": {"classifier.weight", "classifier.bias"},
    }[mode]
    assert moved <= expected
    # the key's bias has no gradient: softmax does not see what is the same for all keys
    assert expected - moved <= {n for n in expected if n.endswith("k_proj.bias")}


@pytest.mark.slow
def test_modes_save_less_and_less(tmp_path, pictures):
    kept = {}
    for mode in ("full", "bitfit", "backrazor", "head"):
        assert train(tmp_path, pictures, "--mode", mode, "--out", mode).returncode == 0
        kept[mode] = json.loads((tmp_path / mode / "memory.json").read_text())["totals"]["activations"]
    assert kept["full"] > kept["bitfit"] > kept["backrazor"] > kept["head"] > 0


# -- resuming ---------------------------------------------------------------------------------------------------------

RESUMED = {
    "vit": ["--augment", "vit", "--color-jitter", "torch"],
    "cnn": ["--model", "resnet20", "--augment", "cnn", "--optim", "adam", "--learning-rate", "1e-3",
            "--label-smoothing", "0.3", "--gradient-accumulation-steps", "2"],
    "frozen norms": ["--model", "resnet20", "--freeze-bn", "--fix-bn-stat", "--select", "best", "--keep", "0.3",
                     "--schedule", "linear"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_resuming_gives_the_bytes_of_never_having_stopped(tmp_path, pictures, name):
    done = train(tmp_path, pictures, *RESUMED[name], "--out", "whole")
    assert done.returncode == 0, done.stderr
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / ".lock").unlink(missing_ok=True)
    steps = sorted((cut / "checkpoints").glob("step-*"))
    for late in steps[1:]:
        (late / "manifest.json").write_text("damaged")
    again = razor(tmp_path, "--resume", "cut")
    assert again.returncode == 0, again.stderr
    assert f"resumed from {steps[0].relative_to(tmp_path)}" in again.stdout
    assert weights(cut) == weights(whole)
    assert rows(cut) == rows(whole)
    assert json.loads((cut / "result.json").read_text())["scores"]["test"] == json.loads(
        (whole / "result.json").read_text()
    )["scores"]["test"]  # fmt: skip


@pytest.mark.slow
def test_sigterm_saves_and_resumes_in_the_comparison_too(tmp_path, pictures):
    words = [PROG, *words_for(pictures, "--compare-dense", "--epochs", "4", "--out", "run")]
    stopped = Command(words, tmp_path, before=pause_at(1, "dense")).end_by(signal.SIGTERM)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "resume with --resume run" in stopped.stderr
    assert "--resume run/dense" not in stopped.stderr
    done = razor(tmp_path, "--resume", "run")
    assert done.returncode == 0, done.stderr
    assert "dense" in json.loads((tmp_path / "run" / "result.json").read_text())["own"]
    assert_refused(razor(tmp_path, "--resume", "run", "--keep", "0.5"), "was begun with --keep 0.1, not 0.5")
    other = image_folder(tmp_path / "other", 12, seed=1)
    assert_refused(razor(tmp_path, "--resume", "run", "--data-dir", str(other)), "was trained on other data")


def ranks_train(cwd, words):
    import os
    import sys

    from backrazor.cli import train as command

    os.chdir(cwd)
    without_pictures()
    sys.argv = [PROG, *words]
    with pytest.raises(SystemExit) as stop:
        command()
    assert not stop.value.code


@pytest.mark.slow
def test_two_processes_see_the_same_batches_as_one(tmp_path, pictures):
    """Dense, since what is kept of an activation is chosen within what a process has of the batch."""
    words = words_for(pictures, "--mode", "full", "--epochs", "1")
    assert razor(tmp_path, *words, "--out", "one").returncode == 0
    run_ranks(2, ranks_train, str(tmp_path), [*words, "--out", "two"])
    one, two = (rows(tmp_path / n) for n in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)
    run_ranks(2, ranks_train, str(tmp_path), [*words_for(pictures, "--epochs", "1"), "--out", "razor"])
    assert (tmp_path / "razor" / "result.json").exists()


# -- sets --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_medmnist_with_several_labels(tmp_path):
    random_file(tmp_path, "chestmnist", 24)
    words = ["--data", "chestmnist", "--data-dir", ".", "--no-verify", *QUICK, "--epochs", "1", "--out", "run"]
    done = razor(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert (
        0.3 < json.loads((tmp_path / "run" / "result.json").read_text())["scores"]["test"]["accuracy"] < 0.8
    )  # of 14 labels


@pytest.mark.slow
def test_all_of_train_without_validation(tmp_path, pictures):
    done = train(tmp_path, pictures, "--validate", "none", "--epochs", "1", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "pictures: 48 train, 24 test" in done.stdout
    assert not [r for r in rows(tmp_path / "run") if r["split"] == "val"]
    assert "accuracy" in json.loads((tmp_path / "run" / "result.json").read_text())["scores"]["test"]


@pytest.mark.slow
def test_damaged_pictures(tmp_path):
    folder = image_folder(tmp_path / "pets", 12)
    (folder / "train" / "dog" / "3.png").write_bytes(b"no picture")
    assert_refused(train(tmp_path, folder), "dog/3.png is not a picture", "--bad-images skip")
    assert not (tmp_path / "runs").exists()
    done = train(tmp_path, folder, "--bad-images", "skip", "--epochs", "1", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "left out 1 damaged picture: " in done.stdout
    assert "pictures: 23 train" in done.stdout
    unseen = train(tmp_path, folder, "--bad-images", "unchecked", "--workers", "1")
    assert_refused(unseen, "dog/3.png is not a picture")


@pytest.mark.slow
def test_the_real_breastmnist(tmp_path, real_data):
    """The official file, and ResNet-20's published weights with a new head."""
    weights_file = next((real_data / "weights" / "resnet_cifar10").glob("*.th"))
    where = ["--data", "breastmnist", "--data-dir", str(real_data / "medmnist")]
    model = ["--model", "resnet20", "--weights", str(weights_file), "--image-size", "28"]
    done = razor(
        tmp_path, *where, *model, "--max-iters", "2", "--batch-size", "32", "--tracker", "none", "--out", "run"
    )
    assert done.returncode == 0, done.stderr
    assert "546 train, 78 val, 156 test" in done.stdout
    assert "the head is new" in done.stdout
    right = 156 * json.loads((tmp_path / "run" / "result.json").read_text())["scores"]["test"]["accuracy"]
    assert right == pytest.approx(round(right))


# -- parts -------------------------------------------------------------------------------------------------------------

DIGITS = load_images("digits")


def test_the_presets_are_the_published_settings_and_hold_their_own_checks():
    for name, preset in PRESETS.items():
        assert check(preset, preset) == preset, name
    assert len(PRESETS) == 31
    aircraft = PRESETS["vit-aircraft"]
    assert (aircraft.learning_rate, aircraft.max_iters, aircraft.keep) == (0.03, 6000, 0.2)
    assert (aircraft.batch_size, aircraft.warmup_iters, aircraft.head_lr_factor) == (128, 500, 10.0)
    assert (PRESETS["cnn-cars"].label_smoothing, PRESETS["cnn-cars"].freeze_bn) == (0.7, False)
    assert PRESETS["cnn-pets"].fix_bn_stat
    assert not PRESETS["cnn-food101"].fix_bn_stat
    assert PRESETS["vit-s-pets"].max_iters == 2300


def test_steps_and_learning_rates():
    config = TrainConfig(epochs=2.0, batch_size=50, gradient_accumulation_steps=2, learning_rate=0.1)
    assert config.total_steps(len(DIGITS.splits["train"]), 100) == 24  # 2 · 1197 / 100, and the rest
    assert TrainConfig(max_iters=7).total_steps(1, 1) == 7
    for schedule, middle in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        factor = lr_factor(TrainConfig(schedule=schedule, warmup_iters=9), 109)
        assert factor(0) == pytest.approx(0.1)
        assert factor(4) == pytest.approx(0.5)
        assert factor(9) == 1.0
        assert factor(59) == pytest.approx(middle)


def test_the_optimizer():
    """The head's rate is a multiple; one SGD step is w − lr·(g + wd·w), the second has 0.9 of the first."""
    config = TrainConfig(learning_rate=0.1, head_lr_factor=10.0, weight_decay=0.01)
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    model["body"].bias.requires_grad_(False)
    optimizer = make_optimizer(model, "head", config)
    assert [(len(g["params"]), g["lr"]) for g in optimizer.param_groups] == [(1, 0.1), (2, 1.0)]
    w = model["body"].weight.detach().clone()
    velocity = torch.zeros_like(w)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        velocity = 0.9 * velocity + 1 + 0.01 * w
        w = w - 0.1 * velocity
    assert torch.allclose(model["body"].weight, w)


@pytest.mark.slow
def test_frozen_norms_stay_as_they_are():
    config = TrainConfig(model="resnet20", image_size=8, freeze_bn=True, fix_bn_stat=True, mode="full", max_iters=3,
                         tracker="none")  # fmt: skip
    torch.manual_seed(0)
    before = build_classifier("resnet20", 10).model.state_dict()
    trained = train_one(Session.alone(config), DIGITS)
    after = trained.outcome.model.state_dict()
    for name, tensor in after.items():
        norm = ".bn" in f".{name}"
        assert torch.equal(tensor, before[name]) == norm, name
    moving = TrainConfig(model="resnet20", image_size=8, mode="full", max_iters=3)
    moving = train_one(Session.alone(moving), DIGITS).outcome.model.state_dict()
    assert not torch.equal(moving["bn1.running_mean"], before["bn1.running_mean"])


@pytest.mark.slow
def test_the_accuracy_is_of_the_whole_split():
    made = make_model(TrainConfig(eval_batch_size=77), DIGITS)
    made.model.eval()
    with torch.no_grad():
        found = evaluate(TrainConfig(eval_batch_size=77), DIGITS, made, "test", made.model)
        split = DIGITS.splits["test"]
        images = np.stack([split.images[i] for i in range(len(split))])
        logits = made.model(made.normalize(images)).logits
    labels = torch.from_numpy(split.labels)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit-mini", "resnet20", "mobilenet_v2"])
def test_dense_activations_are_what_dense_training_saves_and_finding_them_touches_nothing(model):
    made = build_classifier(model, 10, image_size=32)
    state = {n: t.clone() for n, t in made.model.state_dict().items()}
    batch = (torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3]))
    random = torch.get_rng_state()
    predicted = sum(dense_activations(made.model, classification_loss, batch).values())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[n]) for n, t in made.model.state_dict().items())
    recording = SavedActivations(made.model)
    with recording:
        loss = classification_loss(made.model, batch)
    measured = sum(recording.by_layer().values())
    del loss
    assert predicted == measured


def test_nothing_to_save_is_refused():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x.mean((2, 3)) + self.shift

    def loss(model, batch):
        return model(batch[0]).mean()

    with pytest.raises(UserError, match="Average has nothing to save"):
        dense_activations(Average(), loss, (torch.randn(2, 3, 4, 4), torch.zeros(2)))


def test_what_is_trained_by_name():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "head": nn.Linear(4, 2)})

    def names():
        return {n for n, p in model.named_parameters() if p.requires_grad}

    train_only(model, ("head",), "bitfit")
    assert names() == {"conv.bias", "bn.bias", "head.weight", "head.bias"}
    train_only(model, ("head",), "full", freeze_bn=True)
    assert names() == {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    train_only(model, ("head",), "head")
    assert names() == {"head.weight", "head.bias"}
    with saving_of(TrainConfig(mode="full"))():
        pass


def test_sizes_of_pictures():
    assert image_size(TrainConfig(), DIGITS) == 8
    assert image_size(TrainConfig(model="resnet18"), DIGITS) == 224
    assert image_size(TrainConfig(image_size=12), DIGITS) == 12


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "keep 0": (["--keep", "0"], "--keep must be above 0 and at most 1, got 0"),
    "keep above 1": (["--keep", "1.5"], "--keep must be above 0 and at most 1, got 1.5"),
    "keep nan": (["--keep", "nan"], "--keep must be above 0"),
    "unknown mode": (["--mode", "prune"], "--mode"),
    "recompute what is pruned": (["--razor-mode", "pruned", "--recompute", "block"], "--recompute block is for"),
    "unknown razor mode": (["--razor-mode", "thesis"], "--razor-mode"),
    "keep when dense": (["--mode", "full", "--keep", "0.5"], "--keep 0.5 would do nothing"),
    "dense twice": (
        ["--model", "vit-mini", "--mode", "full", "--compare-dense"],
        "--compare-dense True would do nothing",
    ),
    "norms of a vit": (["--model", "vit-mini", "--freeze-bn"], "vit-mini has no batch norm"),
    "patches of a cnn": (["--model", "resnet18", "--patch-size", "4"], "resnet18 has no patches"),
    "momentum of adam": (["--optim", "adam", "--momentum", "0.5"], "--momentum 0.5 would do nothing"),
    "best of nothing": (["--validate", "none", "--select", "best"], "--select best needs pictures to validate on"),
    "size of digits": (["--size", "64"], "the digits come with scikit-learn"),
    "no data": (["--data", "pets"], "--data pets needs --data-dir"),
    "no such set": (["--data", "mnist"], "--data"),
    "unknown flag": (["--keap", "0.1"], "did you mean --keep?"),
    "unknown preset": (["vit-cifar"], "did you mean vit-cifar10?"),
    "a preset without weights": (["vit-pets", "--data-dir", "."], "fine-tunes pretrained weights: give --weights"),
    "patches that do not fill": (["--model", "vit-mini", "--patch-size", "3"], "do not fill images of 8"),
    "no weights": (["--weights", "nowhere"], "nowhere holds no ViT"),
    "no weights of a cnn": (["--model", "resnet18", "--weights", "nowhere.pth"], "nowhere.pth is not there"),
    "no such run": (["--resume", "nowhere"], "nowhere is not a run"),
    "no rate": (["--learning-rate", "0"], "--learning-rate must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    words, expected = REFUSED[name]
    assert_refused(razor(tmp_path, *words), expected)
    assert not (tmp_path / "runs").exists()


def test_pictures_of_several_sizes_need_a_size(tmp_path, pictures):
    done = razor(tmp_path, "--data", "folder", "--data-dir", str(pictures))
    assert_refused(done, "--image-size is missing")


def test_an_npz_of_the_wrong_shape(tmp_path):
    wrong = {"Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel": np.zeros((96, 7), np.float32)}
    google_file(tmp_path / "a.npz", build_vit("mini", image_size=8, patch_size=2, classes=10), **wrong)
    done = razor(tmp_path, "--weights", "a.npz", "--image-size", "8")
    assert_refused(done, "vit.layers.1.mlp.fc1.weight is (7, 96), not (384, 96)")
    assert not (tmp_path / "runs").exists()


def test_the_help_names_the_presets(tmp_path):
    done = razor(tmp_path, "--help")
    assert done.returncode == 0
    assert all(name in done.stdout.replace("\n", " ") for name in ("vit-cifar100", "cnn-pets", "resnet18-cifar10"))


# -- the official exceptions, words and network ---------------------------------------------------------------------


def test_the_first_and_the_last_can_be_left_to_pytorch():
    """Then the head and the last norm have dense gradients, to the bit of the kernels; the blocks have Back Razor's."""
    made = build_classifier("vit-mini", 10, image_size=28)
    torch.manual_seed(0)
    batch = (torch.randn(8, 3, 28, 28), torch.arange(8))

    def gradients(config):
        names = first_and_last(made.model, made.head) if config.dense_first_last else ()
        made.model.zero_grad()
        with saving_of(config, names)():
            loss = classification_loss(made.model, batch)
        loss.backward()
        return {n: p.grad.clone() for n, p in made.model.named_parameters()}

    dense = gradients(TrainConfig(mode="full"))
    ours = gradients(TrainConfig(keep=0.1, dense_first_last=True))
    plain = gradients(TrainConfig(keep=0.1))
    for name in ("classifier.weight", "vit.layernorm.weight", "vit.layernorm.bias"):
        torch.testing.assert_close(ours[name], dense[name], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(plain["vit.layernorm.weight"], dense["vit.layernorm.weight"], rtol=1e-4)
    inside = next(n for n in dense if "mlp.fc1.weight" in n)
    assert not torch.allclose(ours[inside], dense[inside], rtol=1e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--quantize", "--new_backrazor"], {"razor_mode": "pruned", "values": "int8", "mode": "backrazor"}),
        (["--back_prune_ratio", "0.95"], {"keep": 0.05}),
        (["--dense-first-last"], {"dense_first_last": True}),
        (["--transfer_learning_method", "full_noBN", "--backRazor"], {"mode": "backrazor", "freeze_bn": True}),
        (["--transfer_learning_method", "tinytl-lite_residual"], {"mode": "lite-residual"}),
    ],
)
def test_the_official_words_are_understood(words, expected):
    words, _ = translate([*words, "--data", "cifar10"], TRAIN, prog=PROG)
    preset, rest = (PRESETS[words[0]], words[1:]) if not words[0].startswith("-") else (TrainConfig(), words)
    config = parse(TrainConfig, rest, prog=PROG, description="", default=preset)
    assert {name: getattr(config, name) for name in expected} == expected


def test_what_the_lite_residual_needs_is_one_sentence():
    with pytest.raises(UserError, match="is of TinyTL's network: give --model proxyless_mobile"):
        check(TrainConfig(model="resnet18", mode="lite-residual"), TrainConfig())
    with pytest.raises(UserError, match="finetune takes the same flags"):
        translate(["--lora_rank", "4"], TRAIN, prog=PROG)
    with pytest.raises(UserError, match="--dense-first-last True would do nothing: --mode full leaves everything"):
        check(TrainConfig(mode="full", dense_first_last=True), TrainConfig())
