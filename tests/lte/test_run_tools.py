"""What one does with finished runs: start from them, evaluate, sample, export, compare; and time a training."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lte.cli import train
from lte.tasks.bench import bench as run_bench
from lte.tasks.bench_flags import BenchConfig, flops_per_token, peak_flops
from lte.tasks.export import export
from lte.tasks.prepare import prepare
from lte.tasks.sample import sample
from lte.tasks.starting import find_weights, read_run
from matplotlib.image import imread
from memtrain_common.data.text.corpus import Crops, load_corpus
from memtrain_common.data.text.tokenizers import GPT2Tokenizer
from memtrain_common.errors import UserError
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.loop import mean_loss
from safetensors.torch import load_file
from support import assert_refused, newest_checkpoint, rows, run_command

TINY = [
    "--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4", "--lte-heads", "2",
    "--lora-r", "4", "--lora-alpha", "8", "--lte-merge-steps", "3", "--warmup-iters", "1", "--max-iters", "8",
    "--eval-interval", "4", "--eval-iters", "3", "--log-interval", "2", "--tracker", "none", "--sample-tokens", "0",
    "--device", "cpu",
]  # fmt: skip
TEXT = "".join(f"{i} times {i} is {i * i}.\n" for i in range(1500))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Bins of characters, and three runs on them: heads in attention, heads everywhere, none."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "a.txt").write_text(TEXT)
    prepare([str(folder / "a.txt"), "--tokenizer", "chars", "--out", str(folder / "bins")])
    for name, more in (("attn", ["--skip-mlp"]), ("both", []), ("full", ["--method", "full"])):
        train([*TINY, "--data-dir", str(folder / "bins"), "--out", str(folder / name), *more])
    return folder


def loss_of(model, place):
    crops = Crops(load_corpus(str(place / "bins")), batch_size=4, block_size=16, seed=0)
    with torch.no_grad():
        return mean_loss(model.eval(), next_token_loss, crops.validation(3))["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attn", "both", "full"])
def test_a_run_read_back_has_the_loss_that_it_evaluated(place, name):
    trained = read_run(place / name)
    assert trained.step == 8
    assert loss_of(trained.plain.model(), place) == pytest.approx(rows(place / name)[-1]["loss"], abs=1e-5)
    assert set(trained.plain.weights) == set(GPT(trained.plain.config).state_dict())


@pytest.mark.slow
def test_full_training_alone_is_the_comparisons(place, tmp_path):
    """--method full takes --learning-rate; its curve is that of --compare-full at the same rate."""
    words = [*TINY, "--data-dir", str(place / "bins"), "--out", str(tmp_path / "run")]
    train([*words, "--compare-full", "--full-learning-rate", "1e-3"])
    assert [r["loss"] for r in rows(tmp_path / "run" / "full")] == [r["loss"] for r in rows(place / "full")]
    assert read_run(tmp_path / "run" / "full").config.method == "full"
    assert json.loads((tmp_path / "run" / "full" / "result.json").read_text())["steps"] == 8


@pytest.mark.slow
def test_evaluation_alone(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "--data-dir", str(place / "bins"), "--eval_only=True"]
    loss = rows(place / "both")[-1]["loss"]
    train([*words, "--init-from", str(place / "both")])
    assert f"validation loss {loss:.4f} nats per character on 192 characters of bins" in capsys.readouterr().out
    train(["--resume", str(place / "both"), "--eval-only"])
    assert f"validation loss {loss:.4f}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_starts_from_another_runs_weights(place, tmp_path):
    """The first loss is where the other ended; the architecture comes along, the block may be shorter."""
    words = ["--data-dir", str(place / "bins"), "--init-from", str(place / "both"), "--n-layer", "9"]
    train([*TINY, *words, "--out", str(tmp_path / "a")])
    ended = rows(place / "both")[-1]["loss"]
    assert rows(tmp_path / "a")[0]["loss"] == pytest.approx(ended, abs=1e-5)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["config"]["n_layer"] == 2
    before = rows(tmp_path / "a")
    train(["--resume", str(tmp_path / "a"), "--max-iters", "10"])  # without looking at the other run again
    assert rows(tmp_path / "a")[: len(before)] == before
    train([*TINY, *words, "--block-size", "8", "--method", "full", "--max-iters", "0", "--out", str(tmp_path / "b")])
    crops = Crops(load_corpus(str(place / "bins")), batch_size=4, block_size=8, seed=0)
    with torch.no_grad():
        other = mean_loss(read_run(place / "both").plain.model().eval(), next_token_loss, crops.validation(3))["loss"]
    assert rows(tmp_path / "b")[0]["loss"] == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lte", "full"])
def test_frozen_blocks_stay_what_they_were(place, tmp_path, method):
    words = [*TINY, "--data-dir", str(place / "bins"), "--init-from", str(place / "both"), "--weight-decay", "0.5"]
    train([*words, "--freeze_n=1", "--method", method, "--out", str(tmp_path / "run")])
    before, after = read_run(place / "both").plain.weights, read_run(tmp_path / "run").plain.weights
    for name in before:
        frozen = name.startswith(("transformer.h.0.", "transformer.w", "lm_head"))
        assert torch.equal(before[name], after[name]) == frozen, name


@pytest.mark.slow
def test_only_the_best_and_the_last_checkpoint(place, tmp_path):
    """nanoGPT's always_save_checkpoint=False: with a rate that ruins everything, nothing between is saved."""
    words = [*TINY, "--data-dir", str(place / "bins"), "--init-from", str(place / "both"), "--learning_rate=1.0",
             "--rest_learning_rate=1.0", "--max-iters", "10", "--eval-interval", "2"]  # fmt: skip
    train([*words, "--always_save_checkpoint=False", "--out", str(tmp_path / "run")])
    losses = [r["loss"] for r in rows(tmp_path / "run") if r["split"] == "val"]
    assert losses[0] == min(losses)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["best", "nanogpts", "full"])
def test_the_best_weights_are_what_comes_out(place, tmp_path, capsys, monkeypatch, way):
    """--select best, and nanoGPT's always_save_checkpoint=False: the loss that is said, the result, exports, a new run
    and an evaluation alone all have the best evaluation, though the last one is worse."""
    ruin = {"learning_rate": [1e-3] * 4 + [1.0] * 4}
    monkeypatch.setattr("lte.tasks.train.lr_factor", lambda config: lambda step: ruin["learning_rate"][step] / 1e-3)
    flags = {
        "best": ["--select", "best"], "nanogpts": ["--always_save_checkpoint=False"],
        "full": ["--select", "best", "--method", "full"],
    }[way]  # fmt: skip
    run, bins = tmp_path / "run", ["--data-dir", str(place / "bins")]
    train([*TINY, *bins, *flags, "--out", str(run), "--compare-full"][: None if way == "best" else -1])
    losses = {r["step"]: r["loss"] for r in rows(run) if r["split"] == "val"}
    assert losses[4] < losses[0] < losses[8]
    result = json.loads((run / "result.json").read_text())
    assert (result["step"], result["scores"]["val"]["loss"]) == (4, losses[4])
    said = capsys.readouterr().out
    assert re.search(rf"{'full' if way == 'full' else 'LTE'} +{losses[4]:.4f}", said)
    if way == "best":
        assert json.loads((run / "full" / "result.json").read_text())["scores"]["val"]["loss"] < losses[0]
    trained = read_run(run)
    assert (trained.step, trained.newest) == (4, 8)
    assert loss_of(trained.plain.model(), place) == pytest.approx(losses[4], abs=1e-5)
    assert read_run(run, "last").step == 8
    export([str(run), "--out", str(tmp_path / "ckpt.pt")])
    assert "the model of step 4, the best evaluation" in capsys.readouterr().out
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter_num"] == 4
    sample([str(run), "--num_samples=1", "--max_new_tokens=3"])
    assert f"{run}: the model of step 4, the best evaluation" in capsys.readouterr().out
    train([*TINY, *bins, "--init-from", str(run), "--eval-only"])
    train(["--resume", str(run), "--eval-only"])
    said = capsys.readouterr().out
    assert said.count("the model of step 4") == said.count(f"validation loss {losses[4]:.4f}") == 2
    train(["--resume", str(run), "--eval-only", "--select", "last"])
    assert f"validation loss {losses[8]:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_only_got_worse_gives_what_it_began_with(place, tmp_path):
    """Step 0 has no checkpoint: its weights are made again."""
    words = [*TINY, "--data-dir", str(place / "bins"), "--learning_rate=1.0", "--rest_learning_rate=1.0"]
    train([*words, "--select", "best", "--out", str(tmp_path / "run")])
    losses = [r["loss"] for r in rows(tmp_path / "run") if r["split"] == "val"]
    assert losses[0] == min(losses)
    trained = read_run(tmp_path / "run")
    assert trained.step == 0
    assert loss_of(trained.plain.model(), place) == pytest.approx(losses[0], abs=1e-5)


# -- sampling


@pytest.mark.slow
def test_samples_continue_the_prompt_and_can_be_repeated(place, tmp_path, capsys):
    words = [str(place / "both"), "--num_samples=2", "--max_new_tokens=30"]
    sample([*words, "--start=7 times 7"])
    first = capsys.readouterr().out
    pieces = first.split("---------------\n")
    assert len(pieces) == 3
    assert all(p.startswith("7 times 7") and len(p) == 9 + 30 + 1 for p in pieces[:2])
    assert pieces[0] != pieces[1]
    sample([*words, "--start=7 times 7"])
    assert capsys.readouterr().out == first
    (tmp_path / "prompt.txt").write_text("5 times")
    sample([*words, f"--start=FILE:{tmp_path / 'prompt.txt'}", "--top_k=1", "--seed=5"])
    greedy = capsys.readouterr().out.split("---------------\n")
    assert greedy[0] == greedy[1]
    model = read_run(place / "both").plain.model().eval()
    coder = load_corpus(str(place / "bins")).tokenizer
    ids = torch.from_numpy(coder.encode(b"5 times").astype(np.int64))[None]
    for _ in range(30):
        ids = torch.cat([ids, model(ids[:, -16:])[:, -1, : coder.vocab_size].argmax(-1, keepdim=True)], 1)
    assert greedy[0] == coder.decode(ids[0].numpy()).decode() + "\n"


@pytest.mark.slow
def test_what_cannot_be_sampled_is_one_sentence(place, tmp_path):
    export([str(place / "both"), "--out", str(tmp_path / "ckpt.pt")])
    assert_refused(run_command(["lte-sample", "nowhere"], tmp_path), "nowhere is neither scratch")
    assert_refused(run_command(["lte-sample", "ckpt.pt"], tmp_path), "does not say which", "--data-dir")
    run = str(place / "both")
    assert_refused(run_command(["lte-sample", run, "--start=Ä"], tmp_path), "the character 'Ä' is not in the vocab")
    assert_refused(run_command(["lte-sample", run, "--start="], tmp_path), "--start is empty")
    assert_refused(run_command(["lte-sample", run, "--start=FILE:x.txt"], tmp_path), "cannot read --start FILE:x.txt")
    done = run_command(["lte-sample", ".", "--data-dir", str(place / "bins"), "--max_new_tokens=3"], tmp_path)
    assert done.returncode == 0, done.stderr  # the folder of a ckpt.pt, as nanoGPT's out_dir


@pytest.mark.slow
def test_end_of_text_in_a_prompt_is_its_token(real_data):
    from lte.tasks.sample import _encode

    coder = GPT2Tokenizer(real_data / "tokenizers" / "gpt2")
    assert _encode(coder, "<|endoftext|>") == [50256]
    assert _encode(coder, "a<|endoftext|>b") == [64, 50256, 65]


@pytest.mark.slow
def test_gpt2s_files_are_those_of_the_run(tmp_path, capsys, monkeypatch):
    """Nothing is downloaded where a run was trained with --tokenizer-dir; an export takes the files along."""

    def download(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", download)
    files, text = tmp_path / "files", tmp_path / "text"
    for folder in (files, text):
        folder.mkdir()
    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    letters += [chr(256 + i) for i in range(68)]  # GPT-2's signs for the bytes that do not print
    (files / "encoder.json").write_text(json.dumps({c: i for i, c in enumerate([*letters, "ab", "<|endoftext|>"])}))
    (files / "vocab.bpe").write_text("#version: 0.2\na b\n")
    (text / "a.txt").write_text("ab ba\n" * 500)
    run, words = str(tmp_path / "run"), ["--num_samples=1", "--max_new_tokens=3", "--start=ab"]
    gpt2 = ["--tokenizer", "gpt2", "--tokenizer-dir", str(files), "--data-dir", str(text)]
    train([*TINY, *gpt2, "--max-iters", "1", "--method", "full", "--out", run])
    export([run, "--format", "transformers"])
    assert "without a tokenizer" not in capsys.readouterr().out
    for source in (run, f"{run}/gpt2"):
        sample([source, *words])
        assert capsys.readouterr().out.startswith("ab")
    for name in ("encoder.json", "vocab.bpe"):
        (files / name).rename(text / name)
    sample([run, *words])
    (text / "vocab.bpe").unlink()
    with pytest.raises(UserError, match="could not download the GPT-2 vocabulary"):
        sample([run, *words])
    sample([run, *words, "--tokenizer-dir", f"{run}/gpt2"])  # under transformers' names


# -- export


@pytest.mark.slow
def test_the_exports_have_the_runs_loss(place, tmp_path, capsys):
    export([str(place / "attn"), "--out", str(tmp_path / "out" / "ckpt.pt")])
    export([str(place / "attn"), "--format", "transformers", "--out", str(tmp_path / "gpt2")])
    assert "the model of step 8" in capsys.readouterr().out
    expected = rows(place / "attn")[-1]["loss"]
    for source in (tmp_path / "out", tmp_path / "out" / "ckpt.pt", tmp_path / "gpt2"):
        plain, data = find_weights(str(source))
        assert data is None
        assert loss_of(plain.model(), place) == pytest.approx(expected, abs=1e-5)
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert (checkpoint["iter_num"], checkpoint["config"]["dataset"]) == (8, "bins")
    assert checkpoint["best_val_loss"] == pytest.approx(
        min(r["loss"] for r in rows(place / "attn") if r["split"] == "val")
    )
    words = [*TINY, "--data-dir", str(place / "bins"), "--max-iters", "0"]
    train([*words, "--init-from", str(tmp_path / "out"), "--out", str(tmp_path / "again")])
    assert rows(tmp_path / "again")[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_exports_lie_in_the_run_by_default_and_do_not_hide_it(place, capsys):
    run = str(place / "full")
    for format, name in (("nanogpt", "ckpt.pt"), ("transformers", "gpt2")):
        export([run, "--format", format])
        assert (place / "full" / name).exists()
    capsys.readouterr()
    sample([run, "--num_samples=1", "--max_new_tokens=5"])  # by the run's own vocabulary
    assert len(capsys.readouterr().out.split("---------------")[0]) == 1 + 5 + 1


@pytest.mark.slow
def test_an_export_never_replaces_anything(place, tmp_path):
    (tmp_path / "ckpt.pt").write_text("mine")
    run = str(place / "attn")
    for words, *expected in (
        ([run, "--out", "ckpt.pt"], "ckpt.pt is there already"),
        (["nowhere", "--out", "x"], "nowhere is not a run"),
        ([], "name the run to export"),
        ([run, "--tokenizer-dir", "x", "--out", "x"], "--tokenizer-dir is for --format transformers"),
        ([run, "--format", "onnx", "--out", "x"], "onnx"),
        ([run, "--format", "transformers", "--tokenizer-dir", ".", "--out", "x"], "does not hold encoder.json"),
    ):
        assert_refused(run_command(["lte-export", *words], tmp_path), *expected)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_text() == "mine"


# -- weights that do not fit


@pytest.mark.slow
def test_weights_that_do_not_fit_are_one_sentence(place, tmp_path):
    other = tmp_path / "other"
    (tmp_path / "b.txt").write_text("abcdefghij klmnop\n" * 200)
    prepare([str(tmp_path / "b.txt"), "--tokenizer", "chars", "--out", str(other)])
    bins = ["--data-dir", str(place / "bins")]
    start = ["--init-from", str(place / "both")]
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.json").write_text((place / "both" / "config.json").read_text())
    for words, expected in (
        ([*bins, "--init-from", "gpt3"], "--init-from gpt3 is neither scratch, resume, gpt2"),
        ([*start, "--data-dir", str(other)], "was trained on other characters"),
        ([*start, "--data-dir", str(tmp_path), "--tokenizer", "bytes"], "reads chars tokens and"),
        ([*bins, *start, "--block-size", "32"], "--block-size 32 is longer than the 16 positions"),
        ([*bins, *start, "--freeze-n", "2"], "--freeze-n 2 leaves none of the 2 blocks"),
        ([*bins, "--vocab-size", "5"], "--vocab-size 5 is below the"),
        ([*bins, "--init-from", str(tmp_path / "untrained")], "has no intact checkpoint"),
    ):
        with pytest.raises(UserError) as error:
            train([*TINY, *words, "--out", str(tmp_path / "run")])
        assert expected in str(error.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--eval-only"], ["--data-changed", "ok"]])
def test_a_run_is_not_resumed_on_other_letters(place, tmp_path, how):
    """Its tokens would be other letters of the other text, or bytes."""
    other = tmp_path / "other"
    (tmp_path / "b.txt").write_text("abcdefghij klmno\n" * 200)
    prepare([str(tmp_path / "b.txt"), "--tokenizer", "chars", "--out", str(other)])
    shutil.copytree(place / "full", tmp_path / "chars")
    alone = "--eval-only" in how
    for run, words, expected in (
        ("chars", [], "trained on other characters than other has" if alone else "the tokens are other characters"),
        ("bytes", [], "reads bytes tokens and other has chars" if alone else "the tokens are chars and were bytes"),
    ):
        if run == "bytes":
            text = tmp_path / "text"
            text.mkdir()
            (text / "a.txt").write_text(TEXT)
            train(
                [*TINY, "--max-iters", "1", "--method", "full", "--data-dir", str(text), "--out", str(tmp_path / run)]
            )
        with pytest.raises(UserError, match=expected):
            train(["--resume", str(tmp_path / run), "--data-dir", str(other), *words, *how])
    shutil.copytree(place / "bins", tmp_path / "moved")
    train(["--resume", str(tmp_path / "chars"), "--data-dir", str(tmp_path / "moved"), *how])


@pytest.mark.slow
def test_evaluation_alone_says_the_tokens_that_it_looked_at(place, tmp_path, capsys):
    """Of few tokens there are fewer rows than batches ask for: 40 have two blocks of 16 with their targets."""
    letters = "".join(sorted(set(TEXT)))
    tokens = np.array([letters.index(c) for c in TEXT[:400]], "<u2")
    (tmp_path / "few").mkdir()
    for split, part in (("train", tokens), ("val", tokens[:40])):
        part.tofile(tmp_path / "few" / f"{split}.bin")
    shutil.copy(place / "bins" / "meta.pkl", tmp_path / "few")
    train(["--resume", str(place / "full"), "--data-dir", str(tmp_path / "few"), "--eval-only"])
    assert "on 32 characters of few" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(place, tmp_path, capsys):
    """read_run takes the newest that verifies; what reads a run says which was damaged, once."""
    shutil.copytree(place / "both", tmp_path / "run")
    weights = newest_checkpoint(tmp_path / "run") / "model.safetensors"
    assert load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert read_run(tmp_path / "run").step == 4
    capsys.readouterr()
    said = f"passed over checkpoint {weights.parent}: model.safetensors does not have the SHA-256"
    run = str(tmp_path / "run")
    words = [*TINY, "--data-dir", str(place / "bins")]
    for command, argv in (
        (sample, [run, "--num_samples=1", "--max_new_tokens=2"]),
        (export, [run, "--out", str(tmp_path / "ckpt.pt")]),
        (train, ["--resume", run, "--eval-only"]),
        (train, [*words, "--init-from", run, "--eval-only"]),
        (train, [*words, "--init-from", run, "--max-iters", "0", "--out", str(tmp_path / "next")]),
    ):
        command(argv)
        assert capsys.readouterr().out.count(said) == 1, (command, argv)
    weights.parent.with_name("step-00000004").joinpath("manifest.json").unlink()
    with pytest.raises(UserError, match=r"no intact checkpoint \(passed over .*manifest\.json is missing\)"):
        read_run(tmp_path / "run")


# -- figures


@pytest.mark.slow
def test_figures_show_the_runs(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(place / name) for name in ("full", "attn", "both")]
    train(["--figures", *runs, "--out", "figs"])
    table = capsys.readouterr().out.splitlines()
    expected = {"full": "none (full)", "attn": "attention", "both": "attention + MLP"}
    for line, (name, replaced) in zip(table[1:], expected.items(), strict=False):
        summary = json.loads((place / name / "result.json").read_text())
        assert line.split()[0] == name
        assert replaced in line
        assert f"{summary['evaluation']['loss']:.4f}" in line
        ledger = json.loads((place / name / "memory.json").read_text())["totals"]
        assert f"{sum(ledger.values()) / 2**10:.1f} KiB" in line
    summary = json.loads((place / "both" / "result.json").read_text())
    weights = load_file(newest_checkpoint(place / "both") / "model.safetensors")
    heads = sum(t.numel() for n, t in weights.items() if "lora_" in n)
    rest = sum(t.numel() for n, t in weights.items() if "wte" in n or "wpe" in n or "ln_" in n)
    assert summary["trained_parameters"] == heads + rest
    for name in ("val_loss", "memory_time", "replaced_layers"):
        picture = imread(Path("figs") / f"{name}.png")
        assert picture.shape[0] > 300
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20, name


@pytest.mark.slow
def test_figures_of_what_does_not_compare_are_refused(place, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((place / "both" / "config.json").read_text())
    for words, *expected in (
        (["--figures"], "--figures needs run folders"),
        (["--figures", "nowhere"], "nowhere is not a run"),
        (["--figures", "half"], "half has no result.json: it is not finished", "--resume half"),
        (["--figures", str(place / "full"), str(place / "full")], "a run twice"),
    ):
        assert_refused(run_command(["lte-train", *words], tmp_path), *expected)
    assert [p.name for p in tmp_path.iterdir()] == ["half"]


# -- bench


@pytest.mark.slow
def test_a_bench_says_tokens_flops_and_memory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        *TINY,
        "--steps",
        "4",
        "--warmup-steps",
        "1",
        "--compare-full",
        "--peak-tflops",
        "0.001",
        "--profile",
        "t.json",
    ]
    run_bench(words)
    said = capsys.readouterr().out
    assert "validation" not in said
    for word in ("step, ms (median)", "tokens/s", "MFU", "activations", "MFU by nanoGPT's formula, of 0.001 TFLOP/s"):
        assert word in said
    assert re.search(r"trained parameters +\S+ +\S+", said)
    milliseconds = float(re.search(r"step, ms \(median\) +(\S+)", said)[1])
    utilisation = float(re.search(r"MFU +(\S+) %", said)[1])
    flops = flops_per_token(GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16)))
    assert utilisation == pytest.approx(100 * 64 * flops / (milliseconds / 1e3) / 1e9, rel=0.02)
    assert json.loads(Path("t.json").read_text())["traceEvents"]
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_flops_and_peaks():
    """nanoGPT's README: GPT-2 small on OpenWebText, block 1024; its estimate_mfu by hand."""
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False))
    n = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert flops_per_token(model) == 6 * n + 12 * 12 * 12 * 64 * 1024
    config = BenchConfig()
    assert peak_flops(config, "NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops(config, "NVIDIA H200") == 989e12
    assert peak_flops(config, "Some processor") is None
    assert math.isclose(peak_flops(dataclasses.replace(config, peak_tflops=2.5), "Some processor"), 2.5e12)
