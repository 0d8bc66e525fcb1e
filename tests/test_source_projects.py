"""docs/source-projects.md is true: every command on its right runs, and those on its left are understood."""

import contextlib
import io
import json
import os
import re
import shlex
import sys
import traceback
from importlib import metadata
from unittest import mock

import numpy as np
import pytest
import torch
from image_files import image_folder
from memtrain_common.data.text.nanogpt_meta import write_meta_pickle
from memtrain_common.errors import UserError
from memtrain_common.models.classifiers import build_classifier
from memtrain_common.models.gpt import GPT, GPTConfig
from memtrain_common.models.gpt_files import PlainGPT, write_gpt2
from support import ROOT, Command, Forked, load_libraries, run_command, without_pictures

from tests.lte.nanogpt_configs import FILES

PAGE = (ROOT / "docs" / "source-projects.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", PAGE, re.MULTILINE)
HERE = list(dict.fromkeys(here for _, here in ROWS))
SECTIONS = {
    title: [here for here in HERE if f"| `{here}` |" in text]
    for title, text in (part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
}

ONE_STEP = ["--max-iters", "1", "--tracker", "none", "--device", "cpu"]
PICTURES = ["--data", "folder", "--data-dir", "pictures", "--batch-size", "8", "--image-size", "32", "--workers", "0"]
GPT_SIZE = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "8", "--batch-size", "4"]
LTE = [*ONE_STEP, *GPT_SIZE, "--gradient-accumulation-steps", "1", "--eval-iters", "1", "--sample-tokens", "0",
       "--lte-heads", "2", "--lora-r", "2", "--no-compile"]  # fmt: skip
GRID = ["--grid-ranks", "2", "--grid-learning-rates", "1e-3", "--grid-head-learning-rates", "1e-3", "--grid-seeds", "0"]
GLUE = [*ONE_STEP, "--task", "sst2", "--model", "encoder", "--data-dir", "glue", "--max-length", "12"]
ANSWERS = ["--adapter", "adapter-lm", "--model", "llama", "--max-new-tokens", "2", "--limit", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, encoder, glue_dir, language_model, sums):
    """A working folder with a small file for each name that the page's commands have."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "config").mkdir()
    for name, text in FILES.items():
        (folder / "config" / f"{name}.py").write_text(text)
    letters = "\n !abcdefghijklmnopqrstuvwxyz"
    draw = np.random.default_rng(0)
    for name in ("shakespeare_char", "shakespeare", "openwebtext", "cnn_dailymail"):
        data = folder / "data" / name
        data.mkdir(parents=True)
        for split in ("train", "val"):
            draw.integers(0, len(letters), 200).astype("<u2").tofile(data / f"{split}.bin")
    write_meta_pickle(folder / "data" / "shakespeare_char" / "meta.pkl", letters)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("".join(draw.choice(list(letters), 900)))
    (folder / "prompt.txt").write_text("ab")
    torch.manual_seed(0)
    for name, vocabulary in (("gpt2-tiny", 50257), ("letters", len(letters))):
        shape = GPTConfig(block_size=16, vocab_size=vocabulary, n_layer=1, n_head=2, n_embd=16, dropout=0.0, bias=True)
        plain = PlainGPT(shape, dict(GPT(shape).state_dict()))
        if name == "letters":
            groups = [{"params": [p for p in plain.model().parameters() if (p.dim() > 1) == matrices],
                       "weight_decay": 0.1 * matrices} for matrices in (True, False)]  # fmt: skip
            content = {"model": plain.weights, "model_args": vars(shape), "iter_num": 0, "best_val_loss": 1e9,
                       "config": {"dataset": "shakespeare_char"},
                       "optimizer": torch.optim.AdamW(groups).state_dict()}  # fmt: skip
            for out in ("out", "out-shakespeare-char"):
                (folder / out).mkdir()
                torch.save(content, folder / out / "ckpt.pt")
        else:
            write_gpt2(folder / name, plain)
    image_folder(folder / "pictures", 4, size=32)
    import transformers

    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                    image_size=32, patch_size=16, num_labels=2)  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
    for name in ("resnet18", "resnet20", "proxyless_mobile"):
        torch.save(build_classifier(name, 2).model.state_dict(), folder / f"{name}.pth")
    (folder / "boolq").mkdir()
    item = {"instruction": "1 plus 2?", "input": "", "output": "the correct answer is true", "answer": "true"}
    (folder / "boolq" / "test.json").write_text(json.dumps([item]))
    for name, target in (("encoder", encoder), ("glue", glue_dir), ("llama", language_model), ("sums.jsonl", sums)):
        (folder / name).symlink_to(target)
    for words in (
        ["lora-xs", "glue", *GLUE, "--rank", "2", "--out", "first"],
        ["lora-xs", "instruct", *ONE_STEP, "--model", "llama", "--data", "sums.jsonl", "--rank", "2", "--out", "lm",
         "--batch-size", "2", "--gradient-accumulation-steps", "1"],
        *(["lte-train", *LTE, "--data-dir", "data/shakespeare_char", "--out", f"runs/{run}"] for run in "AB"),
    ):  # fmt: skip
        done = run_command(words, folder, before=lightly)
        assert done.returncode == 0, (words, done.stderr)
    (folder / "adapter").symlink_to(folder / "first" / "adapter")
    (folder / "adapter-lm").symlink_to(folder / "lm" / "adapter")
    return folder


def lightly():
    """Nothing is drawn, and nothing waits for the disk."""
    without_pictures()
    os.fsync = lambda _: None


def tiny(words):
    """A command of the page, made small: its own words, with names replaced and flags added behind."""
    command, rest = words[0], words[1:]
    if command == "torchrun":
        return tiny(words[words.index("--no-python") + 1 :])
    if command == "lte-prepare":
        return [*words, "--data-dir", "text", *([] if "shakespeare-char" in words else ["--tokenizer-dir", "gpt2"])]
    if command == "lte-sample":
        rest = ["letters" if w == "gpt2-xl" else w for w in rest]
        rest = ["out" if w == "letters" else w for w in rest]
        return [command, *rest, "--num_samples=1", "--max_new_tokens=2", "--device=cpu", "--start=ab"]
    if command == "lte-bench":
        return [*words, *LTE[6:], "--device", "cpu", "--steps", "2", "--warmup-steps", "0"]
    if "--figures" in words:
        return words
    if command == "lte-train":
        weights = any(w.startswith("config/") and "init_from = 'gpt2" in FILES[w[7:-3]].replace('"', "'") for w in rest)
        weights |= "finetune-gpt2-news" in rest
        data = ["--data-dir", "data/shakespeare_char"] if "DATA" in words else []
        if "--init_from=resume" in rest:
            return [*words, *ONE_STEP, "--dataset=shakespeare_char", "--eval-iters=1", "--batch-size=4",
                    "--gradient-accumulation-steps=1", "--sample-tokens=0"]  # fmt: skip
        rest = [w for w in rest if w not in ("--data-dir", "DATA")]
        return [command, *rest, *LTE, *data, *(["--init-from", "gpt2-tiny"] if weights else [])]
    if command == "backrazor-train" or rest[:1] == ["vit-s-lora"] or command == "finetune":
        if any("vit-" in w or w == "path-lte-galore" for w in rest):
            return [*words, *ONE_STEP, *PICTURES, "--weights", "vit"]
        own = {"cnn-cars": "proxyless_mobile", "resnet18-cifar10": "resnet18"}  # the rest in a network of a tenth
        model = own.get(rest[0], "resnet20")
        return [*words, *ONE_STEP, *PICTURES, "--model", model, "--weights", f"{model}.pth"]
    if command == "backrazor-glue":
        return [*words, *GLUE]
    if command == "galore-vit":
        return [*words, *ONE_STEP, *PICTURES, "--weights", "vit", "--size", "32"]
    if command == "pretrain":
        return [*words, *ONE_STEP, *GPT_SIZE, "--data-dir", "text", "--galore-rank", "2", "--eval-iters", "1"]
    if rest[0] == "glue":
        grid = GRID if "--grid" in rest else ["--rank", "2"]
        adapter = ["--from-adapter", "adapter"] if "CHECKPOINT" in rest else []
        return [*words, *GLUE, *grid, *adapter]
    if rest[0] == "instruct":
        return [*words, *ONE_STEP, "--model", "llama", "--data", "sums.jsonl", "--rank", "2", "--batch-size", "2",
                "--gradient-accumulation-steps", "1", "--val-samples", "2", "--dtype", "float32"]  # fmt: skip
    if rest[0] == "merge":
        return [*words, "--adapter", "adapter-lm", "--model", "llama"]
    data = ["--data-dir", "."] if "commonsense:boolq" in rest else ["--data", "sums.jsonl", "--data-dir", ""]
    return [*words, *ANSWERS, *data]


def run_all(commands, place, cwd):
    """Run commands of the page one after another, each in a folder of its own; exit code 1 if one fails.

    All in one process: what each would load and compile again is there already.
    """
    failed = False
    for number, here in enumerate(commands):
        words = shlex.split(here)
        folder = cwd / str(number)
        folder.mkdir()
        for entry in place.iterdir():
            (folder / entry.name).symlink_to(entry)
        for name in ("out", "runs", "data"):  # where commands write
            (folder / name).unlink()
            (folder / name).mkdir()
            if name != "data" or words[0] != "lte-prepare":
                for entry in (place / name).iterdir():
                    (folder / name / entry.name).symlink_to(entry)
        if words[0] == "lte-train":
            (folder / "out-shakespeare-char").unlink()
        out = ["--out", "new"] if words[0] not in ("lte-sample", "lte-bench", "lte-train", "lora-xs") else []
        sys.argv = [*tiny(words), *out]
        os.chdir(folder)
        (entry,) = metadata.entry_points(group="console_scripts", name=sys.argv[0])
        code: object = 0
        try:
            entry.load()()
        except SystemExit as stop:
            code = stop.code
        except Exception:
            traceback.print_exc()
            code = 1
        if code:
            print(f"FAILED with {code}: {shlex.join(sys.argv)}", file=sys.stderr)
            failed = True
    sys.exit(int(failed))


def of_one_kind(commands):
    """The commands without those that train on pictures and differ from an earlier one in numbers and in the set alone:
    the same code would train the same small model on the same pictures."""
    from backrazor.cli import _train
    from memtrain_apps.cli import _finetune

    parsers = {
        "backrazor-train": (_train, "backrazor.tasks.train.run_training"),
        "finetune": (_finetune, "memtrain_apps.run.finetune.run_finetune"),
    }
    kept, kinds = [], set()
    for here in commands:
        program, *words = shlex.split(here)
        if program in parsers:
            parse, work = parsers[program]
            with mock.patch(work) as began:
                parse(words)
            config = vars(began.call_args.args[0])
            kind = (program, *((n, v) for n, v in config.items() if n != "data" and isinstance(v, str | bool)))
            if kind in kinds:
                continue
            kinds.add(kind)
        kept.append(here)
    return kept


@pytest.mark.slow
def test_what_differs_in_more_than_numbers_is_run():
    kept = of_one_kind(HERE)
    assert len(kept) < len(HERE)
    for words in (
        "backrazor-train vit-aircraft",
        "--mode bitfit",
        "--mode lite-residual+bias",
        "resnet18-cifar10-full",
    ):
        assert any(words in here for here in kept), words


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_what_stands_on_the_right_runs(section, place, tmp_path, request):
    commands = of_one_kind(SECTIONS[section])
    if any(here.startswith("lte-prepare") for here in commands):
        vocabulary = request.getfixturevalue("real_data") / "tokenizers" / "gpt2"
        if not (place / "gpt2").exists():
            (place / "gpt2").symlink_to(vocabulary)
    load_libraries()
    done = Forked(lambda: run_all(commands, place, tmp_path), [], tmp_path, before=lightly).wait()
    assert done.returncode == 0, done.stderr


def understood(words, cwd):
    """What a command says of flags of another project's, before it looks for any file."""
    from backrazor.cli import _glue, _train
    from memtrain_apps.cli import _finetune, _pretrain

    commands = {"backrazor-train": _train, "backrazor-glue": _glue, "finetune": _finetune, "pretrain": _pretrain}
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(Stopped):
        commands[words[0]](words[1:])
    return said.getvalue()


class Stopped(Exception):
    """Flags were parsed and checked."""


LEFT = [(there, here) for there, here in ROWS if " --" in there and here.split()[0] in (
    "backrazor-train", "backrazor-glue", "finetune", "pretrain")]  # fmt: skip


@pytest.mark.parametrize(("there", "here"), LEFT)
def test_what_stands_on_the_left_is_understood(there, here, monkeypatch, tmp_path):
    """Its flags are given to the command beside it, which says them in its own words, and they pass its checks.

    Learning rate, what is kept, the mode, the set and the steps are those of the right-hand side.
    """
    found = []

    def stop(config, argv):
        found.append(config)
        raise Stopped

    for path in ("backrazor.tasks.train.run_training", "backrazor.tasks.glue.run_glue",
                 "memtrain_apps.run.finetune.run_finetune", "memtrain_apps.run.pretrain.run_pretrain"):  # fmt: skip
        monkeypatch.setattr(path, stop)
    program, *right = shlex.split(here)
    words = shlex.split(there)
    flags = words[next(i for i, w in enumerate(words) if w.endswith(".py")) + 1 :]
    said = understood([program, *flags], tmp_path)
    assert said.startswith(f"in this command's words: {program} "), said
    understood([program, *right], tmp_path)
    left, right = found
    for name in ("learning_rate", "lr", "keep", "mode", "data", "task", "max_iters", "epochs", "label_smoothing",
                 "freeze_bn", "fix_bn_stat", "batch_size", "head_lr_factor", "augment", "optim", "train", "save",
                 "rank", "alpha", "dropout", "adapt", "select", "seed", "galore_rank", "gap"):  # fmt: skip
        if name in ("seed", "select", "epochs", "max_iters") and program in ("finetune", "backrazor-train"):
            continue
        dense = name == "keep" and getattr(left, "mode", "") != "backrazor"
        if hasattr(left, name) and not dense:
            assert getattr(left, name) == getattr(right, name), name
    again = shlex.split(said.splitlines()[0].partition(": ")[2])
    assert understood(again, tmp_path) == ""  # the words that it prints are a command of ours
    assert found[-1] == left


LORA_XS = [(there, here) for there, here in ROWS if here.startswith("lora-xs glue") and " --" in there]


@pytest.mark.parametrize(("there", "here"), LORA_XS)
def test_the_glue_scripts_flags_are_understood(there, here, monkeypatch, capsys):
    """Which script it was, of MNLI's start or of random bases, is for the right-hand side to say."""
    from lora_xs.tasks.commands import glue

    found = []
    for path in ("lora_xs.tasks.glue.run_glue", "lora_xs.tasks.glue_grid.run_grid"):
        monkeypatch.setattr(path, lambda config, argv: found.append(config))
    words = shlex.split(there)
    glue(words[next(i for i, w in enumerate(words) if w.endswith(".py")) + 1 :], "glue.")
    assert capsys.readouterr().out.startswith("in this command's words: lora-xs glue ")
    glue(shlex.split(here)[2:], "glue.")
    assert capsys.readouterr().out == ""
    left, right = found
    for name in ("task", "model", "grid", "rank", "alpha", "batch_size", "max_length", "warmup_ratio", "weight_decay"):
        assert getattr(left, name) == getattr(right, name) or (name, right.epochs) == ("warmup_ratio", 50.0), name
    if not left.grid:
        assert (left.learning_rate, left.head_learning_rate) == (right.learning_rate, right.head_learning_rate)


def test_a_grid_is_asked_for_in_the_scripts_words(place, tmp_path):
    words = ["lora-xs", "glue", "--target_task", "sst2", "--model_name_or_path", "encoder", "--data-dir", "glue"]
    done = Command([*words, *ONE_STEP, "--max-length", "12", *GRID, "--out", str(tmp_path / "grid")], place,
                   before=lightly).wait()  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("in this command's words: lora-xs glue --task sst2 --grid --model encoder")


def test_the_page_is_linked_and_every_command_on_it_is_one_of_ours():
    assert {here for commands in SECTIONS.values() for here in commands} == set(HERE)
    assert "docs/source-projects.md" in (ROOT / "README.md").read_text()
    assert len(ROWS) == PAGE.count("\n| `")
    assert {shlex.split(here)[0] for here in HERE} <= {
        "torchrun", "lte-prepare", "lte-train", "lte-sample", "lte-bench", "backrazor-train", "backrazor-glue",
        "finetune", "pretrain", "lora-xs", "galore-vit",
    }  # fmt: skip


def test_the_forks_lora_is_understood_by_itself(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr("memtrain_apps.run.finetune.run_finetune", lambda config, argv: found.append(config))
    words = ["--train_lora_only", "--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.1"]
    said = understood(["finetune", *words], tmp_path)
    assert said == "in this command's words: finetune --train lora --rank 4 --alpha 8 --dropout 0.1\n"
    [config] = found
    assert (config.train, config.rank, config.alpha, config.dropout, config.data) == ("lora", 4, 8.0, 0.1, "digits")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_steps", "200", "--warmup_steps", "50"], "finetune --max-iters 200 --warmup-ratio 0.25\n"),
        (["--train_lora_only", "--warmup_steps", "50"], "give their number too"),
        (["--train_lora_only", "--quantize"], "backrazor-train takes --quantize"),
    ],
)
def test_what_depends_on_another_flag_or_cannot_be_had_is_said(words, expected, monkeypatch, tmp_path):
    monkeypatch.setattr("memtrain_apps.run.finetune.run_finetune", lambda config, argv: None)
    try:
        said = understood(["finetune", *words], tmp_path)
    except UserError as error:
        said = str(error)
    assert expected in said
