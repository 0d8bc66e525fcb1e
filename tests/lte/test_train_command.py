"""lte-train as a person meets it: a short run, its folder and summary, kills and signals, and every kind of mistake."""

import dataclasses
import inspect
import json
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from lte.cli import configure, train
from lte.tasks.train_config import PRESETS, TrainConfig, check, lte_config
from memtrain_common.data.text.corpus import Crops, load_corpus
from memtrain_common.errors import UserError
from memtrain_common.files import read_json
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.loop import mean_loss
from safetensors.torch import load_file
from support import (
    Command,
    assert_refused,
    newest_checkpoint,
    pause_at,
    rows,
    run_command,
    run_installed,
    run_ranks,
)

TINY = [
    "lte-train", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4",
    "--lte-heads", "2", "--lora-r", "4", "--lora-alpha", "8", "--lte-merge-steps", "3", "--warmup-iters", "2",
    "--eval-interval", "20", "--eval-iters", "2", "--log-interval", "2", "--dropout", "0.1", "--tracker", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(3000)))
    return str(folder)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing disturbed, by the installed console script."""
    cwd = tmp_path_factory.mktemp("whole")
    words = [
        *TINY,
        "--data-dir",
        text,
        "--max-iters",
        "60",
        "--out",
        "run",
        "--compare-full",
        "--tracker",
        "tensorboard",
    ]
    done = run_installed(words, cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run", done


@pytest.mark.slow
def test_the_folder_holds_everything(whole):
    run, _ = whole
    names = {p.name for p in run.iterdir()} - {"energy.csv", ".lock"}
    assert names == {
        "config.json", "metrics.jsonl", "log.txt", "memory.json", "loss.png", "memory.png", "tensorboard",
        "checkpoints", "full", "result.json", "cost.csv",
    }  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["lora_r"] == 4
    assert config["config"]["lr_decay_iters"] == 60
    assert config["data"]["train_tokens"] + config["data"]["val_tokens"] == config["data"]["bytes"]
    ledger = json.loads((run / "memory.json").read_text())
    assert set(ledger["totals"]) == {"weights", "gradients", "optimizer", "activations", "buffers"}
    assert all(ledger["totals"].values())


@pytest.mark.slow
def test_the_summary_says_what_was_asked(whole):
    run, done = whole
    log = (run / "log.txt").read_text()
    assert done.stdout == log
    last = rows(run)[-1]["loss"]
    full = rows(run / "full")[-1]["loss"]
    assert re.search(rf"LTE +{last:.4f}", log)
    assert re.search(
        rf"full training, same batches +{full:.4f} +LTE {re.escape(format(100 * (last / full - 1), '+.1f'))} %", log
    )
    for word in ("nats per byte", "unigram entropy", "bigram entropy", "weights", "activations", "tokens/s", "energy"):
        assert word in log
    sample = [line for line in log.splitlines() if line.startswith("  | ")]
    assert sum(len(line) - 4 for line in sample) > 100
    assert log.splitlines()[-1] == "run folder run"


@pytest.mark.slow
def test_trained_parameters_are_counted_right(whole):
    run, _ = whole
    weights = load_file(newest_checkpoint(run) / "model.safetensors")
    heads = sum(t.numel() for n, t in weights.items() if "lora_" in n)
    rest = sum(t.numel() for n, t in weights.items() if "wte" in n or "wpe" in n or ".ln_" in n)
    assert f"{heads + rest:,} of " in (run / "log.txt").read_text()


@pytest.mark.slow
def test_it_learns_and_what_it_saved_is_what_it_evaluated(whole, text):
    """The last validation loss again, from the checkpoint's file alone and a plain GPT with merged weights."""
    run, _ = whole
    losses = [r["loss"] for r in rows(run) if r["split"] == "val"]
    assert losses[-1] < losses[0] - 1.0
    config = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=16)
    weights = load_file(newest_checkpoint(run) / "model.safetensors")
    merged = {n: t for n, t in weights.items() if "lora_" not in n and "merged_" not in n}
    for name in [n.removesuffix(".lora_A") for n in weights if n.endswith(".lora_A")]:
        A, B, A0, B0 = (weights[f"{name}.{part}"] for part in ("lora_A", "lora_B", "merged_A", "merged_B"))
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + 8 / 4 * (B @ A - B0 @ A0).mean(0)
    plain = GPT(config)
    plain.load_state_dict({**merged, "lm_head.weight": plain.lm_head.weight, **_tied(merged)})
    crops = Crops(load_corpus(text), batch_size=4, block_size=16, seed=0)
    with torch.no_grad():
        again = mean_loss(plain.eval(), next_token_loss, crops.validation(2))["loss"]
    assert again == pytest.approx(losses[-1], abs=1e-5)


def _tied(weights):
    """The embedding and the head are one tensor; the file has it under one of the two names."""
    (shared,) = (weights[n] for n in ("transformer.wte.weight", "lm_head.weight") if n in weights)
    return {"transformer.wte.weight": shared, "lm_head.weight": shared}


def same_run(a, b):
    assert rows(a) == rows(b)
    ours, theirs = newest_checkpoint(a), newest_checkpoint(b)
    assert ours.name == theirs.name
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    one, other = (load_file(p / "training.safetensors") for p in (ours, theirs))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(0, 30, 54), (18, 21), (2, 36, 39, 58)])
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(whole, text, tmp_path, steps):
    """SIGKILL at several steps of training; --resume goes on each time; the bytes are those of the whole run."""
    words = [*TINY, "--data-dir", text, "--max-iters", "60", "--out", "run"]
    for step in steps:
        process = Command(words, tmp_path, before=pause_at(step))
        assert process.end_by(signal.SIGKILL).returncode == -signal.SIGKILL
        words = ["lte-train", "--resume", "run"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    same_run(whole[0], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_one_line(whole, text, tmp_path, signum):
    words = [*TINY, "--data-dir", text, "--max-iters", "60", "--out", "run"]
    done = Command(words, tmp_path, before=pause_at(10)).end_by(signum)
    assert done.returncode == 128 + signum
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert re.fullmatch(
        rf"lte-train: stopped by {signum.name} at step \d+; checkpoint run/.*; resume with --resume run", lines[0]
    )
    done = run_command(["lte-train", "--resume", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    same_run(whole[0], tmp_path / "run")


@pytest.mark.slow
def test_a_flipped_byte_is_refused_and_the_checkpoint_before_is_taken(text, tmp_path):
    done = run_command([*TINY, "--data-dir", text, "--max-iters", "40", "--out", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    expected = rows(run)
    weights = newest_checkpoint(run) / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-5] + bytes([before[-5] ^ 16]) + before[-4:])
    done = run_command(["lte-train", "--resume", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "passed over checkpoint run/checkpoints/step-00000040: model.safetensors does not have the SHA-256"
        in done.stdout
    )
    assert "resumed from run/checkpoints/step-00000020" in done.stdout
    assert rows(run) == expected
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ["--parallel", "ddp"],
        [],
        [
            "--lte-replicas",
            "embeddings",
            "--lte-vectors",
            "norms",
            "--lte-reset",
            "all",
            "--lte-merge-density",
            "0.05",
            "--lte-merge-in-turn",
        ],
    ],
    ids=["ddp", "heads", "heads with copies, vectors and resets"],
)
@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(text, tmp_path, words):
    words = [*TINY, "--data-dir", text, "--max-iters", "60", "--dropout", "0.0", *words, "--out"]
    one = run_command([*words, str(tmp_path / "one")], tmp_path)
    assert one.returncode == 0, one.stderr
    run_ranks(2, train, [*words[1:], str(tmp_path / "two")])
    a, b = ([r["loss"] for r in rows(tmp_path / name)] for name in ("one", "two"))
    assert len(a) == len(b)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-5
    log = (tmp_path / "two" / "log.txt").read_text()
    assert log.count("validation loss, nats per byte") == 1
    trained = re.compile(r"trained +([\d,]+) of ([\d,]+) parameters")
    assert trained.search(log)[0] == trained.search((tmp_path / "one" / "log.txt").read_text())[0]
    if "ddp" not in words:
        sent = json.loads((tmp_path / "two" / "communication.json").read_text())
        assert sent["tokens"] == 60 * 4 * 16
        training = sum(sent["bytes_sent"].get(k, 0) for k in ("merges", "shared"))
        assert sent["bytes_per_token"] == pytest.approx(training / sent["tokens"], abs=1e-3)
        assert f"{sent['bytes_per_token']:,.1f} bytes a token" in log
        assert ("shared" in sent["bytes_sent"]) == ("--lte-replicas" not in words)
        run_ranks(2, train, ["--resume", str(tmp_path / "two"), "--max-iters", "64"])
        assert rows(tmp_path / "two")[-1]["step"] == 64


def test_processes_that_cannot_share_the_heads_are_refused(text, tmp_path):
    words = [*TINY[1:], "--data-dir", text, "--max-iters", "4", "--out", str(tmp_path / "run")]

    def refused():
        with pytest.raises(UserError, match="--lte-heads 2 cannot be shared equally by 3 processes: give a multiple"):
            train(words)
        with pytest.raises(UserError, match="--batch-size 4 must be divisible by --lte-heads 2 times 3 processes"):
            train([*words, "--parallel", "ddp"])
        with pytest.raises(UserError, match="--lte-mode sequential gives every head the whole batch"):
            train([*words, "--lte-mode", "sequential"])

    run_ranks(3, refused)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "4bit"])
def test_a_run_goes_on_with_a_multiple_of_its_heads(text, tmp_path, base):
    """In 4 bits, layers that kept all heads' merged factors keep a sum from four heads on."""
    words = [*TINY, "--data-dir", text, "--lte-base", base, "--max-iters", "20", "--out", "run"]
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_command(["lte-train", "--resume", "run", "--lte-heads", "3"], tmp_path)
    assert_refused(done, "run was begun with --lte-heads 2, which can become a multiple of it but not 3")
    done = run_command(["lte-train", "--resume", "run", "--lte-heads", "4", "--max-iters", "40"], tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_file(newest_checkpoint(tmp_path / "run") / "model.safetensors")
    assert weights["transformer.h.0.mlp.c_fc.lora_A"].shape == (4, 4, 16)
    losses = [r["loss"] for r in rows(tmp_path / "run") if r["split"] == "val"]
    assert losses[-1] < losses[-2]


@pytest.mark.slow
def test_no_steps_and_a_corpus_of_one_character(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("a" * 2000)
    words = [*TINY, "--data-dir", "x", "--tokenizer", "chars", "--compare-full", "--max-iters"]
    for steps in ("0", "4"):
        done = run_command([*words, steps, "--out", steps], tmp_path)
        assert done.returncode == 0, done.stderr
        again = run_command(["lte-train", "--resume", steps], tmp_path)
        assert again.returncode == 0, again.stderr
    assert "full" in done.stdout


@pytest.mark.slow
def test_the_text_may_have_moved_and_the_reader_may_leave(text, tmp_path):
    """A resumed run finds the same text elsewhere; a pipe that closes (`| head`) does not end a training."""
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "b.txt").write_bytes(next(Path(text).iterdir()).read_bytes())

    def closed_pipe():
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)

    done = run_command([*TINY, "--data-dir", text, "--max-iters", "10", "--out", "run"], tmp_path, before=closed_pipe)
    assert done.returncode == 0, done.stderr
    assert "run folder run" in (tmp_path / "run" / "log.txt").read_text()
    done = run_command(["lte-train", "--resume", "run", "--data-dir", "moved", "--max-iters", "14"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run")[-1]["step"] == 14


# -- mistakes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lte-head", "3"], ["unknown flag --lte-head", "did you mean --lte-heads?"]),
        (["--batch-size", "10"], ["--batch-size 10 must be divisible by --lte-heads 4"]),
        (["--lora-r", "0"], ["--lora-r must be at least 1, got 0"]),
        (["--lte-heads", "0"], ["--lte-heads must be at least 1, got 0"]),
        (["--max-iters", "-5"], ["--max-iters must be at least 0, got -5"]),
        (["--learning-rate", "nan"], ["--learning-rate must be positive"]),
        (["--n-embd", "30"], ["--n-embd 30 must be a multiple of --n-head 4"]),
        (["--dropout", "1.0"], ["--dropout must be below 1"]),
        (["--skip-attn", "--skip-mlp"], ["leave no layer for heads"]),
        (["--lte-trainable", "norm"], ["--lte-trainable takes any of embeddings norms biases skipped, got norm"]),
        (["babygpt"], ["unknown preset 'babygpt'", "shakespeare-char"]),
        (["--resume", "nowhere"], ["nowhere is not a run"]),
        (["--resume"], ["--resume needs a value"]),
        (["--resume", "a", "--resume", "b"], ["--resume was given 2 times"]),
        (["shakespeare-char", "--resume", "a"], ["leave out the preset 'shakespeare-char'"]),
        (["shakespeare-char"], ["the preset shakespeare-char needs --data-dir"]),
        (["--lora-alpha", "inf"], ["--lora-alpha must be positive and finite"]),
        (["--min-lr-ratio", "5"], ["--min-lr-ratio must be at most 1"]),
        (["--seed", "99999999999999999999999"], ["--seed must be from 0"]),
        (["--lte-replicas", "biases"], ["--lte-replicas takes any of embeddings norms skipped, got biases"]),
        (["--lte-trainable", "norms", "--lte-replicas", "embeddings"], ["take what is trainable: add embeddings"]),
        (["--lte-outer-momentum", "1"], ["--lte-outer-momentum must be below 1"]),
        (["--lte-merge-density", "0"], ["merge_density must be above 0 and at most 1"]),
        (
            ["--lte-merge-density-replicas", "0.1"],
            ["--lte-… flags: merge_density_replicas is for sparse merges of copies"],
        ),
        (["--lte-merge-bits", "2"], ["--lte-merge-bits is for a --lte-merge-density below 1"]),
        (["--lte-merge-delay", "2"], ["--lte-… flags: merge_delay is for sparse merges: give a merge_density below 1"]),
        (
            ["--lte-merge-delay", "2", "--lte-merge-density", "0.1"],
            ["--lte-merge-delay 2 must be at most --lte-merge-steps 1"],
        ),
        (
            [
                "--lte-merge-delay",
                "2",
                "--lte-merge-density",
                "0.1",
                "--lte-merge-steps",
                "8",
                "--lte-restart-warmup-iters",
                "3",
            ],
            ["--lte-restart-warmup-iters warms up after each merge, and --lte-merge-delay merges later"],
        ),
        (["--lte-merge-in-turn"], ["--lte-merge-in-turn spreads the layers over --lte-merge-steps, which is 1"]),
        (["--lte-restart-warmup-iters", "5"], ["--lte-restart-warmup-iters 5 must be below --lte-merge-steps 1"]),
        (["--tokenizer-dir", "x"], ["--tokenizer-dir is for --tokenizer gpt2"]),
    ],
)
def test_wrong_flags_are_one_sentence(words, expected):
    with pytest.raises(UserError) as error:
        configure(words)
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_wrong_flags_leave_nothing_behind(tmp_path):
    assert_refused(run_command(["lte-train", "--batch-size", "10"], tmp_path), "lte-train: error:", "divisible")
    frozen = ["lte-train", "--method", "full", "--n-layer", "1", "--freeze-n", "9"]
    assert_refused(run_command(frozen, tmp_path), "--freeze-n 9 is more than the model's 1 blocks")
    assert_refused(run_command(["lte-train", "--epochs", "inf"], tmp_path), "--epochs must be finite")
    untraced = ["lte-bench", "--profile", "nowhere/trace.json"]
    assert_refused(run_command(untraced, tmp_path), "--profile nowhere/trace.json has no folder to be in")
    assert_refused(run_command(["lte-sample", "x", "--temperature", "1e-40"], tmp_path), "at least 1e-6")
    assert_refused(run_command(["lte-sample", "x", "--seed", str(2**63 - 1)], tmp_path), "--seed must be at most")
    assert_refused(run_command(["lte-train", "--data-dir", "nowhere"], tmp_path), "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    assert_refused(run_command(["lte-train", "--data-dir", "empty"], tmp_path), "holds nothing")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_reader_of_the_help_may_leave_early(tmp_path):
    def closed_pipe():
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)

    done = run_command(["lte-train", "--help"], tmp_path, before=closed_pipe)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_another_runs_folder_and_another_configuration_are_refused(whole, text):
    run, _ = whole
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    cwd = run.parent
    again = run_command([*TINY, "--data-dir", text, "--max-iters", "60", "--out", "run"], cwd)
    assert_refused(again, "run holds another run", "--resume run")
    other = run_command(["lte-train", "--resume", "run", "--n-layer", "2"], cwd)
    assert_refused(other, "run was begun with --n-layer 1, not 2")
    moved = run_command(["lte-train", "--resume", "run", "--out", "elsewhere"], cwd)
    assert_refused(moved, "a resumed run stays in its folder")
    shorter = run_command(["lte-train", "--resume", "run", "--max-iters", "10"], cwd)
    assert_refused(shorter, "may only go on for longer")
    inner = run_command(["lte-train", "--resume", "run/full"], cwd)
    assert_refused(inner, "is the comparison within a run: --resume run")
    faster = run_command(["lte-train", "--resume", "run", "--full-learning-rate", "1"], cwd)
    assert_refused(faster, "was begun with --full-learning-rate 0.003, not 1.0")
    (cwd / "other").mkdir(exist_ok=True)
    (cwd / "other" / "b.txt").write_text("something else entirely " * 100)
    data = read_json(run / "config.json")
    data["config"]["data_dir"] = str(cwd / "other")
    (cwd / "copy").mkdir()
    (cwd / "copy" / "config.json").write_text(json.dumps(data))
    assert_refused(run_command(["lte-train", "--resume", "copy"], cwd), "was trained on other data", "and now other")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_loses_nothing(text, tmp_path):
    """A limit on the size of files stands for the full disk; the checkpoint of step 20 does not fit."""

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    words = [*TINY, "--data-dir", text, "--max-iters", "40", "--out", "run", "--n-embd", "64", "--sample-tokens", "0"]
    done = run_command(words, tmp_path, before=small_disk)
    assert_refused(done, "could not save the checkpoint of step 20", "earlier checkpoints are intact")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert run_command(["lte-train", "--resume", "run"], tmp_path).returncode == 0


# -- the pieces


def test_presets_are_valid_and_say_what_nanogpt_says():
    for preset in PRESETS.values():
        check(preset)
    char = configure(["shakespeare-char", "--data-dir", "x", "--lte-heads", "8"])
    assert (char.n_layer, char.n_head, char.n_embd, char.block_size, char.batch_size) == (6, 6, 384, 256, 64)
    assert (char.dropout, char.max_iters, char.lte_heads) == (0.2, 5000, 8)
    cpu = configure(["shakespeare-char-cpu", "--data-dir", "x"])
    assert (cpu.n_layer, cpu.n_embd, cpu.block_size, cpu.batch_size, cpu.max_iters) == (4, 128, 64, 12, 2000)


def test_skip_flags_choose_the_layers():
    assert lte_config(TrainConfig(skip_attn=True)).targets == ("mlp.c_fc", "mlp.c_proj")
    assert lte_config(TrainConfig(skip_mlp=True)).targets == ("attn.c_attn", "attn.c_proj")


def test_every_flag_has_a_help_text():
    source = "".join(inspect.getsource(c) for c in TrainConfig.__mro__ if c is not object)
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf'    {field.name}: .*\n    """', source), field.name


def test_the_flags_of_merges_reach_the_heads():
    settings = {
        "reset": "none", "replicas": ("norms",), "outer_momentum": 0.3, "outer_lr": 0.7, "merge_density": 0.1,
        "merge_density_replicas": 0.2, "merge_bits": 1, "merge_delay": 2,
    }  # fmt: skip
    flags = [w for name, value in settings.items() for w in (f"--lte-{name.replace('_', '-')}", *_words(value))]
    found = lte_config(configure([*flags, "--lte-merge-steps", "4"]))
    assert {name: getattr(found, name) for name in settings} == settings
    assert lte_config(configure([])).merge_density_replicas is None


def _words(value):
    return value if isinstance(value, tuple) else [str(value)]
