"""backrazor-glue as a person meets it: learning, resuming, modes, the official preset, mistakes."""

import json
import shutil

import pytest
import torch
from backrazor.tasks.glue_flags import PRESETS, GlueConfig, check
from memtrain_common.commands.configure import with_new_names
from memtrain_common.runs import checkpoint
from support import assert_refused, rows, run_command

PROG = "backrazor-glue"
TINY = ["--task", "sst2", "--tracker", "none", "--num-train-epochs", "5", "--per-device-train-batch-size", "4",
        "--gradient-accumulation-steps", "2", "--log-interval", "5", "--eval-steps", "20", "--max-seq-length", "16",
        "--learning-rate", "1e-2"]  # fmt: skip


def glue(cwd, *words):
    return run_command([PROG, *words], cwd)


@pytest.fixture(scope="module")
def words(encoder, glue_dir):
    return [*TINY, "--model", encoder, "--data-dir", glue_dir]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    done = glue(cwd, *words, "--razor-mode", "pruned", "--out", "run")
    assert done.returncode == 0, done.stderr
    return cwd / "run", done


@pytest.mark.slow
def test_it_learns_and_says_what_it_saved(whole):
    run, done = whole
    validation = [r for r in rows(run) if r["split"] == "val"]
    assert [r["step"] for r in validation] == [0, 20, 40, 50]
    assert validation[-1]["accuracy"] > max(0.8, validation[0]["accuracy"])
    result = json.loads((run / "result.json").read_text())
    assert result["scores"]["dev"]["accuracy"] == validation[-1]["accuracy"]
    dense, kept = result["own"]["dense_activation_bytes"], result["measured"]["activations"]
    assert dense > 3 * kept
    assert "Back Razor, keep 0.2" in done.stdout
    assert done.stdout == (run / "log.txt").read_text()


@pytest.mark.slow
def test_the_baseline_holds_what_was_predicted_of_it(words, whole, tmp_path):
    done = glue(tmp_path, *words, "--mode", "full", "--out", "full", "--num-train-epochs", "1")
    assert done.returncode == 0, done.stderr
    predicted = json.loads((whole[0] / "result.json").read_text())["own"]["dense_activation_bytes"]
    measured = json.loads((tmp_path / "full" / "memory.json").read_text())["totals"]["activations"]
    assert measured == predicted


@pytest.mark.slow
def test_resuming_gives_the_bytes_of_never_having_stopped(whole, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(whole[0], cut)
    steps = sorted((cut / "checkpoints").glob("step-*"))
    for late in steps[1:]:
        (late / "manifest.json").write_text("damaged")
    done = glue(tmp_path, "--resume", "cut")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert rows(cut) == rows(whole[0])
    states = [checkpoint.load(max((run / "checkpoints").glob("step-*")))["model"] for run in (cut, whole[0])]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


@pytest.mark.slow
def test_the_best_is_reported_where_asked_for(words, tmp_path):
    done = glue(tmp_path, *words, "--select", "best", "--eval-steps", "5", "--num-train-epochs", "2", "--out", "run")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"]["dev"]["accuracy"] == max(
        r["accuracy"] for r in rows(tmp_path / "run") if r["split"] == "val"
    )
    assert result["scores"]["dev"]["accuracy"] == result["best"]["value"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bitfit", "head"])
def test_what_the_other_modes_move(words, encoder, tmp_path, mode):
    from safetensors.torch import load_file

    begun = load_file(f"{encoder}/model.safetensors")
    done = glue(tmp_path, *words, "--mode", mode, "--num-train-epochs", "1", "--out", "run")
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(max((tmp_path / "run" / "checkpoints").glob("step-*")))["model"]
    moved = {n for n, t in state.items() if n in begun and not torch.equal(t, begun[n])}
    assert all(n.endswith(".bias") for n in moved)
    assert bool(moved) == (mode == "bitfit")


@pytest.mark.slow
def test_real_rte_with_the_real_vocabulary(tmp_path, real_data):
    """Random weights of a small BERT: it runs on the benchmark's own files, padded to the full length."""
    import transformers

    folder = tmp_path / "bert"
    tokenizer = transformers.BertTokenizerFast(vocab=str(real_data / "tokenizers" / "bert-base-uncased" / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    where = ["--model", "bert", "--data-dir", str(real_data / "glue"), "--max-seq-length", "128"]
    few = ["--max-train-samples", "16", "--max-eval-samples", "12", "--num-train-epochs", "1"]
    done = glue(tmp_path, "official", *where, *few, "--gradient-accumulation-steps", "1", "--tracker", "none",
                "--out", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16 training rows, 12 development rows" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"]["dev"]["accuracy"] * 12 == pytest.approx(round(result["scores"]["dev"]["accuracy"] * 12))
    # 8 rows of 128 tokens, 32 wide: what a norm alone saves of them is 128 KiB
    assert result["own"]["dense_activation_bytes"] > 10 * 8 * 128 * 32 * 4


def test_the_official_preset_is_the_official_run():
    official = PRESETS["official"]
    assert check(official, official) == official
    assert (official.task, official.keep, official.learning_rate, official.epochs) == ("rte", 0.2, 2e-5, 10)
    assert official.per_device_train_batch_size * official.gradient_accumulation_steps == 32
    assert (official.max_length, official.seed, official.pad_to_max_length) == (512, 5, True)
    assert PRESETS["official-baseline"].mode == "full"


REFUSED = {
    "no task": (["--model", "bert"], "--task is missing"),
    "no model": (["--task", "rte"], "--model is missing"),
    "unknown task": (["--task", "wnli", "--model", "bert"], "--task must be one of"),
    "keep 0": (["--task", "rte", "--model", "x", "--keep", "0"], "--keep must be above 0"),
    "keep when dense": (["--task", "rte", "--model", "x", "--mode", "full", "--keep", "0.3"], "would do nothing"),
    "no such folder": (["--task", "rte", "--model", "./nowhere", "--data-dir", "."], "there is no folder ./nowhere"),
    "no such run": (["--resume", "nowhere"], "nowhere is not a run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    words, expected = REFUSED[name]
    assert_refused(glue(tmp_path, *words), expected)
    assert not (tmp_path / "runs").exists()


def test_flags_and_fields_are_as_the_official_code_calls_them():
    official = ("num_train_epochs", "per_device_train_batch_size", "max_seq_length", "learning_rate", "seed")
    for name in official:
        assert hasattr(GlueConfig(), GlueConfig.ALIASES.get(name, name))
    words = with_new_names(["--num-train-epochs", "3", "--max_seq_length=64", "--eval-steps", "5"], GlueConfig)
    assert words == ["--epochs", "3", "--max-length=64", "--eval-interval", "5"]
