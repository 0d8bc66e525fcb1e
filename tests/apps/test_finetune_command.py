"""finetune and pretrain as a person meets them: a run and its files, resume, the saved model, every kind of mistake."""

import json
import shlex
import shutil
import signal
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from memtrain_apps.compose.axes import USED_BY, Axes
from memtrain_apps.compose.compose import saving
from memtrain_apps.run.config import FINETUNE_PRESETS, PRETRAIN_PRESETS, FinetuneConfig, checked, refuse_unused
from memtrain_apps.run.finetune import workload_of
from memtrain_apps.run.pictures import unseen_edge
from memtrain_apps.run.predicting import predict_run
from memtrain_apps.run.training import run, too_little
from memtrain_apps.run.workload import Workload
from memtrain_common.commands import session
from memtrain_common.commands.run_flags import StepFlags
from memtrain_common.data.images.batches import Normalize, evaluation_batches
from memtrain_common.data.images.sets import load_images
from memtrain_common.data.text.glue_batches import prepare_glue
from memtrain_common.errors import UserError
from memtrain_common.measuring.fake_numbers import NotPredictedError
from memtrain_common.models.cifar_resnet import CifarResNet
from memtrain_common.models.classifiers import logits_of
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.models.vit import load_vit
from memtrain_common.training.distributed import World
from memtrain_common.training.task import Task
from PIL import Image
from safetensors.torch import load_file
from support import (
    Command,
    assert_refused,
    newest_checkpoint,
    pause_at,
    ranks_of,
    rows,
    run_command,
    run_installed,
    run_on,
)

FAST = ["--tracker", "none", "--log-interval", "5", "--threads", "1"]
DIGITS = ["finetune", "--epochs", "1", "--labels", "5", "6", "7", "--batch-size", "32", *FAST]
RAZOR = ["--train", "lora", "--save", "backrazor", "--rank", "4", "--keep", "0.2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """LoRA with Back Razor, which the fork could not: a run that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    done = run_command([*DIGITS, *RAZOR, "--lr", "3e-3", "--out", "run"], cwd, pictures=True)
    assert done.returncode == 0, done.stderr
    return cwd / "run", done


@pytest.mark.slow
def test_a_run_says_what_it_cost_and_keeps_it(whole):
    run, done = whole
    result = json.loads((run / "result.json").read_text())
    assert result["own"]["axes"] == {"train": "lora", "save": "backrazor", "optim": "adamw"}
    assert result["own"]["settings"] == {
        "rank": 4, "alpha": 0.0, "adapt": "all", "dropout": 0.0, "keep": 0.2, "razor_mode": "low-bit",
        "recompute": "auto", "razor_blocks": "",
    }  # fmt: skip
    for category, n_bytes in result["measured"].items():
        assert abs(result["own"]["predicted"][category] - n_bytes) <= 0.002 * n_bytes
    assert 0 < result["trained_parameters"] < 0.2 * result["parameters"]
    assert f"test  {result['scores']['test']['accuracy']:.4f}" in done.stdout
    assert done.stdout == (run / "log.txt").read_text()
    assert done.stderr.count("\n") <= 1, done.stderr  # the progress bar, and no library's remarks
    for picture in ("loss.png", "memory.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_saved_model_is_plain_and_gives_the_tested_accuracy(whole, tmp_path):
    run, _ = whole
    again = run_command(
        [
            *DIGITS,
            "--train",
            "head",
            "--weights",
            str(run / "model"),
            "--lr",
            "1e-12",
            "--epochs",
            "0.01",
            "--out",
            "again",
        ],
        tmp_path,
    )
    assert again.returncode == 0, again.stderr
    before, after = (json.loads((r / "result.json").read_text()) for r in (run, tmp_path / "again"))
    assert after["scores"]["test"]["accuracy"] == pytest.approx(before["scores"]["test"]["accuracy"], abs=0.005)
    assert not any("lora" in name for name in load_file(run / "model" / "model.safetensors"))


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    words = [*DIGITS, *RAZOR, "--lr", "3e-3", "--out", "run", "--eval-epochs", "0.3", "--no-save-model"]
    words = [w for w in words if w != "7"]  # fewer pictures
    straight = run_command(["straight" if w == "run" else w for w in words], tmp_path)
    assert straight.returncode == 0, straight.stderr
    killed = Command(words, tmp_path, before=pause_at(5)).end_by(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    resumed = run_command(["finetune", "--resume", "run"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    keep = ("step", "split", "loss", "accuracy", "lr")
    assert [{k: r.get(k) for k in keep} for r in rows(tmp_path / "run")] == [
        {k: r.get(k) for k in keep} for r in rows(tmp_path / "straight")
    ]
    a, b = (newest_checkpoint(tmp_path / n) / "model.safetensors" for n in ("run", "straight"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_memory_is_explained_without_training(tmp_path):
    words = ["pretrain", "--n-layer", "1", "--n-embd", "32", "--n-head", "2", "--train", "lora", "--dropout", "0.1"]
    done = run_command([*words, "--explain-memory", "--threads", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "activations" in done.stdout.split("what dominates: ")[1].split("\n")[0]
    assert "--save backrazor" in done.stdout
    assert "--dropout 0 (it keeps a copy of every adapted layer's input)" in done.stdout
    assert "transformer.h.0" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_pretraining_lowers_the_loss_and_predicts_its_memory(model, tmp_path):
    words = [
        "pretrain",
        "--model",
        model,
        "--optim",
        "galore-adamw",
        "--save",
        "backrazor",
        "--n-layer",
        "2",
        "--n-head",
        "2",
    ]
    words += [
        "--n-embd",
        "32",
        "--block-size",
        "32",
        "--max-iters",
        "30",
        "--lr",
        "1e-2",
        "--galore-rank",
        "8",
        "--out",
        "run",
    ]
    done = run_command([*words, *FAST], tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [r["loss"] for r in rows(tmp_path / "run") if r["split"] == "val"]
    assert losses[-1] < losses[0] - 0.5
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["own"]["predicted"] == result["measured"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_glue_and_instructions_run_from_local_files(tmp_path, real_data):
    transformers = pytest.importorskip("transformers")
    vocabulary = real_data / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    encoder = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    encoder.save_pretrained(tmp_path / "encoder")
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(tmp_path / "encoder")
    words = [
        "finetune",
        "--data",
        "glue:rte",
        "--data-dir",
        str(real_data / "glue"),
        "--model",
        "encoder",
        "--max-length",
        "16",
    ]
    words += ["--train", "lora-xs", "--save", "backrazor", "--rank", "4", "--epochs", "0.05", "--out", "rte", *FAST]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "rte" / "result.json").read_text())["metric"] == "accuracy"
    assert (tmp_path / "rte" / "model" / "tokenizer.json").is_file()


REFUSED = {
    ("--train", "head", "--optim", "galore-adamw"): ("galore-adamw would project nothing", "choose optim adamw"),
    ("--train", "lora-xs", "--optim", "galore-adamw", "--rank", "4", "--galore-rank", "4"): ("rank 4", "below it"),
    ("--train", "bitfit", "--keep", "0.1"): ("--keep would do nothing with --save all", "backrazor"),
    ("--train", "lora-xs", "--init-batches", "4"): ("--init-batches would do nothing with --init svd", "gradient"),
    ("--train", "lora-xs", "--first-step", "1e-4"): ("--first-step would do nothing with --init svd", "gradient"),
    ("--train", "head", "--learning-rate", "0.1", "--head-lr", "0.2"): ("--lr and --head-lr are one rate",),
    ("--train", "lora", "--init", "random"): ("--init would do nothing with --train lora", "lora-xs"),
    ("--save", "backrazor", "--keep", "0"): ("--keep must be above 0",),
    ("--save", "offload", "--device", "cpu"): ("offload would do nothing on the CPU",),
    ("--train", "lora-xs", "--optim", "adamw8bit"): ("keep nothing in 8 bits", "choose optim adamw"),
    ("--train", "lte", "--batch-size", "30"): ("--batch-size 30", "--heads 4"),
    ("--train", "lora", "--rank", "0"): ("--rank must be at least 1",),
    ("--labels", "3", "3"): ("--labels 3 3", "0 to 9"),
    ("--labels", "3", "12"): ("0 to 9",),
    ("--data", "digit"): ("digit",),
    ("--model", "resnet18", "--train", "lora", "--adapt", "attention"): ("no matrices of attention",),
    ("--model", "vit"): ("'vit'", "vit-mini"),
    ("--train", "melo", "--model", "resnet20"): ("melo",),
    ("--epochs", "0"): ("--epochs and --max-iters are both 0",),
    ("--data", "glue:rte"): ("--model",),
    ("--data", "glue:wnli", "--model", "x"): ("glue:wnli", "glue:rte"),
    ("--weights", "nowhere"): ("nowhere",),
    ("--resume", "nowhere"): ("nowhere is not a run",),
    ("--seed", "99999999999999999999"): ("--seed must be from 0 to 2^63",),
    # flags that only other data read
    ("--data", "glue:sst2", "--model", "x", "--recipe", "vit"): ("--augment is for pictures",),
    ("--max-length", "7"): ("--max-length is for text, and --data digits are pictures: leave it out",),
    ("--size", "64"): ("--size is the size of MedMNIST's files, and --data digits has none",),
    ("--no-verify",): ("--verify compares MedMNIST's files with their MD5",),
    ("--data", "cifar10", "--data-dir", ".", "--bad-images", "skip"): ("--bad-images is for files of pictures",),
    **{
        ("--data", "glue:sst2", "--model", "x", *words): (f"{words[0].replace('no-', '')} is for pictures",)
        for words in (("--augment", "flip"), ("--size", "64"), ("--no-verify",), ("--bad-images", "skip"),
                      ("--labels", "1", "2"), ("--image-size", "32"), ("--weights", "w"))
    },
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_mistakes_are_one_sentence(words, tmp_path):
    done = run_command(["finetune", *words, *FAST, *(() if "--resume" in words else ("--out", "run"))], tmp_path)
    assert_refused(done, *REFUSED[words])


@pytest.mark.slow
def test_the_model_decides_what_pretraining_can_do(tmp_path):
    for words, expected in (
        (("--train", "head"), "has none"),
        (("--train", "melo"), "melo"),
        (("--train", "bitfit"), "no bias"),
    ):
        assert_refused(run_command(["pretrain", *words, "--out", words[1], *FAST], tmp_path), expected)
        assert not (tmp_path / words[1]).exists()  # the name is free for what can be trained
    (tmp_path / "mine").mkdir()
    assert_refused(run_command(["pretrain", "--train", "head", "--out", "mine", *FAST], tmp_path), "has none")
    assert list((tmp_path / "mine").iterdir()) == []
    assert_refused(run_command(["pretrain", "--train", "head", *FAST], tmp_path), "has none")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("save", ["checkpoint:9", "backrazor:1-9"])
def test_blocks_that_are_not_there_are_refused_before_there_is_a_folder(save, tmp_path):
    words = ["pretrain", "--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--save", save, "--out", "run"]
    done = run_command(words, tmp_path)
    assert done.returncode == 2, done.stdout
    assert f"--save {save} names no blocks of the 2 that there are" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("presets", [FINETUNE_PRESETS, PRETRAIN_PRESETS], ids=["finetune", "pretrain"])
def test_presets_pass_their_own_checks(presets):
    plain = {f.name: f.default for f in fields(Axes)}
    for config in presets.values():
        checked(config)
        refuse_unused(
            config, {n for n in USED_BY if getattr(config, n) != plain[n]} - {"rank", "alpha", "adapt", "dropout"}
        )


def test_the_flags_of_the_axes_come_from_one_place():
    names = {f.name for f in fields(FinetuneConfig)}
    assert {f.name for f in fields(Axes)} <= names
    assert {f.name for f in fields(Axes)} - set(USED_BY) == {"train", "save", "optim"}


@pytest.mark.slow
def test_the_installed_commands_show_their_help_without_torch(tmp_path):
    for name in ("finetune", "pretrain"):
        done = run_installed([name, "--help"], tmp_path)
        assert done.returncode == 0
        assert "--train" in done.stdout
        assert "torch" not in done.stderr


@pytest.mark.slow
def test_saved_weights_of_lte_are_the_merged_ones(tmp_path):
    words = [*DIGITS, "--train", "lte", "--heads", "2", "--merge-steps", "2", "--lr", "3e-3", "--out", "run"]
    words += ["--max-iters", "3"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    saved, _ = load_vit(tmp_path / "run" / "model", image_size=0, classes=3)
    state = load_file(newest_checkpoint(tmp_path / "run") / "model.safetensors")
    name = "vit.layers.0.attention.q_proj"
    weight = saved.get_parameter(f"{name}.weight")
    assert weight.shape == state[f"{name}.weight"].shape
    assert not torch.equal(weight, state[f"{name}.weight"])  # deltas that were not merged yet are in it
    assert not any("lora" in n for n in load_file(tmp_path / "run" / "model" / "model.safetensors"))


@pytest.mark.slow
def test_a_run_of_lte_from_when_norms_were_trained_goes_on_so(tmp_path):
    """Its config.json has no ``lte_rest``; the resumed run equals the uninterrupted one."""
    words = [
        *DIGITS,
        "--train",
        "lte",
        "--heads",
        "2",
        "--lte-rest",
        "trained",
        "--max-iters",
        "4",
        "--eval-epochs",
        "0.1",
    ]
    for name in ("whole", "older"):
        assert run_command([*words, "--out", name], tmp_path).returncode == 0
    for checkpoint in sorted((tmp_path / "older").glob("checkpoints/step-*"))[1:]:
        shutil.rmtree(checkpoint)
    shutil.rmtree(tmp_path / "older" / "model")
    (tmp_path / "older" / "result.json").unlink()
    config = tmp_path / "older" / "config.json"
    content = json.loads(config.read_text())
    assert content["config"].pop("lte_rest") == "trained"
    del content["seal"], content["sha256_of_the_rest"]
    config.write_text(json.dumps(content))
    done = run_command(["finetune", "--resume", "older"], tmp_path)
    assert done.returncode == 0, done.stderr
    states = [load_file(newest_checkpoint(tmp_path / n) / "model.safetensors") for n in ("whole", "older")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][n], value) for n, value in states[0].items())


class Unnumbered(torch.nn.Module):
    """Two layers by names, as timm's DenseNet has its blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def a_workload(model, batch, loss):
    return Workload(Task(model, lambda i: batch, loss), lambda m, split: {"loss": 1.0}, "loss", False, 1, 1,
                    {"name": "mine", "sha256": ""})  # fmt: skip


def unnumbered():
    return a_workload(Unnumbered(), torch.ones(3, 4), lambda m, x: m(x).square().mean())


def of_one_block():
    gpt = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=4))
    return a_workload(gpt, (torch.ones(2, 4).long(), torch.ones(2, 4).long()), next_token_loss)


@pytest.mark.parametrize(("make", "save"), [(unnumbered, "all"), (of_one_block, "all"), (of_one_block, "checkpoint")])
def test_few_blocks_or_none_are_refused_only_where_something_asks_for_them(make, save, tmp_path, monkeypatch):
    """What is trained is what was predicted; DenseNet, and every model of one block, was refused under each choice."""
    monkeypatch.setattr(session, "draw", lambda *args, **kwargs: "")
    config = FinetuneConfig(device="cpu", tracker="none", save_model=False, save=save, out=str(tmp_path / "run"))
    result = run(config, lambda *_: make(), ["--out", "run"], "finetune")
    assert result["steps"] == 1
    assert result["measured"] == result["predicted"]


def test_a_model_without_numbered_blocks_is_neither_checkpointed_nor_sharded(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Unnumbered has no numbered blocks to checkpoint: choose save all"):
        saving(Unnumbered(), Axes(save="checkpoint"))
    with pytest.raises(UserError, match="Unnumbered has no numbered blocks that Back Razor could leave out"):
        saving(Unnumbered(), Axes(save="backrazor", razor_blocks="1"))
    monkeypatch.setattr(session, "launch", lambda *_, **__: (World(0, 2, 0, 2), torch.device("cpu")))
    config = FinetuneConfig(device="cpu", tracker="none", parallel="fsdp", out=str(tmp_path / "run"))
    for explains in (False, True):  # what is explained is what would be trained
        with pytest.raises(UserError, match="no numbered blocks that fsdp could gather one after another: choose"):
            run(replace(config, explain_memory=explains), lambda *_: unnumbered(), [], "finetune")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora", "lora-xs"])
def test_a_model_in_shards_is_trained_stopped_resumed_and_written_whole(tmp_path, train):
    """FSDP2 on two gloo processes, killed in the middle, beside one process: the same model to 1e-5."""
    words = [*DIGITS, "--train", train, "--optim", "sgd", "--lr", "0.1", "--max-iters", "4", "--eval-epochs", "0.1"]
    words += ["--log-interval", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    done = run_command([*words, "--out", "run"], one)
    assert done.returncode == 0, done.stderr
    last = rows(one / "run")[-1]["step"]
    shared = [*words, "--parallel", "fsdp", "--out", "run"]
    ranks = ranks_of(2, shared, two, pause_at(last // 2 + 1))
    ranks[0].wait_until_paused()
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    assert not (two / "run" / "model").exists()
    assert 0 < int(newest_checkpoint(two / "run").name.partition("-")[2]) < last
    for end in run_on(2, ["finetune", "--resume", "run"], two):
        assert end.returncode == 0, end.stderr
    expected, found = (load_file(f / "run" / "model" / "model.safetensors") for f in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    model, kept = load_vit(two / "run" / "model", image_size=0, classes=3)
    assert kept
    assert model.classifier.out_features == 3


def test_fractions_of_epochs_are_not_rounded_up_twice():
    assert StepFlags(epochs=1.1).total_steps(100, 10) == 11
    assert StepFlags(epochs=1.11).total_steps(100, 10) == 12
    assert StepFlags(epochs=1e-9).total_steps(100, 10) == 1


@pytest.mark.slow
def test_a_budget_takes_back_razors_settings(tmp_path):
    words = [*DIGITS, "--max-iters", "1", "--budget", "12MiB", "--keep", "0.2", "--out", "run", "--no-save-model"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["keep"] == 0.2
    assert "--budget 12MiB: --save" in done.stdout
    assert done.stdout == (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_damaged_pictures_may_be_left_out(tmp_path):
    for c in "ab":
        (tmp_path / "set" / c).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(tmp_path / "set" / c / f"{i}.png")
    (tmp_path / "set" / "a" / "3.png").write_bytes(b"no picture")
    words = ["finetune", "--data", "folder", "--data-dir", "set", "--image-size", "16", "--max-iters", "1", *FAST]
    assert_refused(run_command(words, tmp_path), "3.png is not a picture", "--bad-images skip")
    done = run_command([*words, "--bad-images", "skip", "--out", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left out 1 damaged picture" in done.stdout
    assert done.stdout == (tmp_path / "run" / "log.txt").read_text()


def test_rows_without_a_response_are_counted(language_model, tmp_path):
    rows = [{"instruction": "1 plus 2?", "output": "3"}] * 4 + [{"instruction": "1 plus " * 40, "output": "3"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = FinetuneConfig(data=str(tmp_path / "rows.json"), model=language_model, max_length=100)
    assert workload_of(config, World()).notes == (
        "left out 1 of 5 rows, which have no response within --max-length 100 tokens",
    )


class Counting(torch.nn.Module):
    """Of as many rows as there are different numbers, which fake tensors do not have."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)[: len(x.unique(dim=0))]


def test_a_step_that_depends_on_numbers_is_not_predicted_and_said_so():
    workload = Workload(
        Task(Counting(), lambda i: torch.randn(3, 4), lambda m, b: m(b).square().mean()),
        lambda m, split: {}, "loss", False, 1, 1, {},
    )  # fmt: skip
    with pytest.raises(NotPredictedError, match="memory of Counting cannot be predicted"):
        predict_run(workload, FinetuneConfig(), Axes(), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--n-embd", "128", "--n-head", "3"], "--n-embd 128 must be a multiple of --n-head 3"),
        (["--model", "llama", "--n-embd", "12", "--n-head", "4"], "--n-embd 12 must be a multiple of twice --n-head 4"),
    ],
)
def test_heads_share_a_models_width(words, expected, tmp_path):
    assert_refused(run_command(["pretrain", *words, "--out", "run", *FAST], tmp_path), expected)


@pytest.mark.slow
def test_a_run_that_had_ended_keeps_what_was_measured(whole, tmp_path):
    run, _ = whole
    shutil.copytree(run, tmp_path / "run")
    before = json.loads((run / "result.json").read_text())
    assert before["peak_bytes"]["training"] > 0
    done = run_command(["finetune", "--resume", "run"], tmp_path, pictures=True)
    assert done.returncode == 0, done.stderr
    assert "unavailable" not in next(line for line in done.stdout.splitlines() if "peak memory" in line)
    after = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {k: (before[k], after[k]) for k in before if before[k] != after[k]} == {}
    other = "last" if before["step"] != before["steps"] else "best"
    words = ["finetune", "--resume", "run", "--select", other]
    assert run_command(words, tmp_path, pictures=True).returncode == 0
    now = json.loads((tmp_path / "run" / "result.json").read_text())
    same = (now["step"], now["scores"]) == (before["step"], before["scores"])
    assert now["command"] == (before["command"] if same else shlex.join(words))


@pytest.mark.slow
def test_the_folder_of_a_model_of_pictures_holds_what_it_must_be_given(tmp_path):
    transformers = pytest.importorskip("transformers")
    for i, c in enumerate(("cat", "dog")):
        (tmp_path / "set" / c).mkdir(parents=True)
        for j in range(12):
            noise = np.random.default_rng(12 * i + j).integers(0, 256, (20, 26, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "set" / c / f"{j}.png")
    torch.manual_seed(0)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "size": {"shortest_edge": 28}}
    small = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, num_labels=3
    )
    transformers.Dinov2ForImageClassification(small).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    words = ["finetune", "--data", "folder", "--data-dir", "set", "--model", "base", "--image-size", "24",
             "--train", "head", "--max-iters", "2", "--batch-size", "4", "--out", "run", *FAST]  # fmt: skip
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "patches of 7 pixels fill 21 of a picture's 24: its edge is not seen; give --image-size 21 or 28" in done.stdout
    )
    saved = tmp_path / "run" / "model"
    model = transformers.AutoModelForImageClassification.from_pretrained(saved).eval()
    assert model.config.id2label == {0: "cat", 1: "dog"}
    processor = transformers.AutoImageProcessor.from_pretrained(saved, use_fast=False)
    split = load_images("folder", str(tmp_path / "set")).splits["test"]
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    ((pixels, labels),) = evaluation_batches(split, 24, normalize=normalize, batch=99)
    theirs = processor([Image.fromarray(split.images[i]) for i in range(len(split))], return_tensors="pt")
    torch.testing.assert_close(theirs["pixel_values"], pixels, atol=2 / 255 / 0.2, rtol=0)  # both round to bytes
    right = (model(pixels).logits.argmax(-1) == labels).float().mean().item()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert right == pytest.approx(result["scores"]["test"]["accuracy"], abs=1e-6)


def test_words_that_a_row_needs(encoder, glue_dir, language_model, tmp_path):
    transformers = pytest.importorskip("transformers")

    def refused(words, *expected):
        assert_refused(run_command(["finetune", *words, "--out", "run", *FAST], tmp_path), *expected)

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad")
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    for task, most, what in (("sst2", 2, "a sentence beside the tokenizer's 2"), ("stsb", 4, "each sentence beside")):
        with pytest.raises(UserError, match=f"--max-length {most} leaves no word of {what}.* at least {most + 1}"):
            prepare_glue(task, glue_dir, tokenizer, max_length=most)
        assert prepare_glue(task, glue_dir, tokenizer, max_length=most + 1).longest == most + 1
    (tmp_path / "one.json").write_text(json.dumps([{"instruction": "1 plus 2?", "output": "3"}]))
    few = ["--data", "one.json", "--model", language_model, "--max-length", "100"]
    refused(
        few, "one.json has 1 rows with a response within --max-length 100 tokens, and at least 2 are needed", "takes"
    )
    (tmp_path / "glue" / "SST-2").mkdir(parents=True)
    for split in ("train", "dev"):
        (tmp_path / "glue" / "SST-2" / f"{split}.tsv").write_text("")
    empty = ["--data", "glue:sst2", "--data-dir", "glue", "--model", encoder]
    refused(empty, "train.tsv is empty: its first row must name the columns sentence")


@pytest.mark.slow
def test_a_row_longer_than_the_positions_is_refused_before_training(encoder, tmp_path):
    for split in ("train", "dev"):
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        rows = [f"{'good ' * 90}\t1", "bad\t0"]
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    common = ["--model", encoder, "--data-dir", ".", "--max-length", "128", "--max-iters", "1", "--tracker", "none"]
    for words in (
        ["finetune", "--data", "glue:sst2", "--train", "head", *common],
        ["lora-xs", "glue", "--task", "sst2", "--rank", "4", *common],
        ["backrazor-glue", "--task", "sst2", *common],
    ):
        done = run_command([*words, "--out", "run"], tmp_path)
        assert_refused(done, "--max-length 128 lets a row of", "more than the 64 positions of", "give at most 64")


def test_text_is_not_read_by_a_model_of_pictures(tmp_path, glue_dir):
    transformers = pytest.importorskip("transformers")
    small = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    transformers.Dinov2ForImageClassification(small).save_pretrained(tmp_path / "base")
    words = ["finetune", "--data", "glue:sst2", "--data-dir", glue_dir, "--model", "base", "--out", "run"]
    assert_refused(
        run_command(words, tmp_path), "base holds a 'dinov2' model, which looks at pictures: choose a --model"
    )


def test_only_an_edge_that_is_cut_off_is_spoken_of():
    """Held to what the model does: where nothing is said, the last column of a picture changes the answer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = dict(image_size=28, num_labels=2)
    vit = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=7)
    swin = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, patch_size=4)
    models = (
        transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**vit, **size)),
        transformers.SwinForImageClassification(transformers.SwinConfig(**swin, **size)),
        CifarResNet(3, 2),
    )
    for model in models:
        for pixels in (28, 30):
            x = torch.randn(1, 3, pixels, pixels, requires_grad=True)
            logits_of(model.eval(), x).square().sum().backward()
            cut = not x.grad[..., -1].any()
            assert bool(unseen_edge(model.train(), pixels)) is cut, (type(model), pixels)
            assert model.training


def test_a_step_that_needs_more_than_is_left_is_said_before():
    model = torch.nn.Linear(300, 200)
    task = Task(model, lambda i: torch.randn(50, 300), lambda m, b: m(b).square().mean())
    workload = Workload(task, lambda m, s: {}, "loss", False, 3, 3, {"name": "x", "sha256": ""}, unit="samples")
    config = checked(FinetuneConfig(save_model=False, lr=1e-3))
    found = predict_run(workload, config, config, device=torch.device("cpu"))
    need = found.peak_bytes - 4 * (300 * 200 + 200)
    assert need > 3 * 4 * 300 * 200  # gradients and two moments
    assert too_little(found, need) == too_little(found, None) == ""
    assert "is predicted to need" in (said := too_little(found, need - 1))
    assert "besides the weights, and " in said
