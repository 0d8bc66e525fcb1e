"""A real pretrained language model of 1 MB: stories260K, read as a transformers Llama."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from lora_xs import CAUSAL_LM_TARGETS, LoRAXSConfig, inject, load_adapter, save_adapter, trained
from memtrain_common.errors import UserError
from memtrain_common.models.llama2c import Llama2cTokenizer, load_llama2c, save_llama2c
from support import rows, run_command

DATA = os.environ.get("MEMTRAIN_DATA")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not DATA, reason="MEMTRAIN_DATA is not set: no real weights here")


@pytest.fixture(scope="module")
def stories():
    return load_llama2c(Path(DATA) / "weights/stories260K/stories260K.bin")


def loss(model, ids):
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def encode(line):
    return Llama2cTokenizer(Path(DATA) / "weights/stories260K/tok512.bin").encode(line)


def text():
    """The beginning of Tiny Shakespeare in the model's own tokens."""
    lines = (Path(DATA) / "text/tinyshakespeare.txt").read_text()[:60_000].splitlines()
    tokenizer = Llama2cTokenizer(Path(DATA) / "weights/stories260K/tok512.bin")
    return torch.tensor([token for line in lines if line for token in tokenizer.encode(line)])


def test_the_weights_were_read_right(stories):
    """A story is far likelier than its words in another order; ln 512 = 6.2 would be chance."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert loss(stories, torch.tensor([encode(story)])) < 1.5
    words = story.split()
    assert loss(stories, torch.tensor([encode(" ".join(words[::-1]))])) > 3


@pytest.mark.slow
def test_lora_xs_lowers_the_loss_and_reloads(stories, tmp_path):
    ids = text()
    held_out = ids[-5_000:].view(-1, 100)
    train = ids[: (len(ids) - 6_000) // 800 * 800].view(-1, 8, 100)
    model = inject(copy.deepcopy(stories), LoRAXSConfig(8, targets=CAUSAL_LM_TARGETS))
    before = loss(model, held_out)
    optimizer = torch.optim.AdamW(trained(model)["R"], lr=4e-3)
    for batch in train:
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    after = loss(model, held_out)
    assert after < before - 0.3
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(stories), tmp_path)
    assert torch.equal(again(held_out[:4]).logits, model(held_out[:4]).logits)


@pytest.fixture(scope="module")
def stories_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories") / "model"
    weights = Path(DATA) / "weights/stories260K"
    save_llama2c(weights / "stories260K.bin", weights / "tok512.bin", folder)
    return str(folder)


def test_as_a_folder_it_is_the_same_model(stories, stories_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories_folder)
    lines = (Path(DATA) / "text/tinyshakespeare.txt").read_text()[:6_000].splitlines()
    for line in filter(None, [*lines, "a £ and é"]):
        ids = tokenizer(line)["input_ids"]
        assert ids == encode(line)
        assert tokenizer.decode(ids, skip_special_tokens=True) == line
    ids = torch.tensor([encode(lines[0])])
    model = transformers.AutoModelForCausalLM.from_pretrained(stories_folder).eval()
    assert torch.equal(model(ids).logits, stories(ids).logits)


MATH = [
    {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "Level 1"},
    {"problem": "Simplify $\\frac{2}{4}$.", "solution": "We get $\\boxed{\\frac{1}{2}}$."},
    {"problem": "Long. " * 200, "solution": "$\\boxed{3}$"},
]


@pytest.mark.slow
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(
    ("data", "source", "limit"),
    [("gsm8k", "gsm8k", 3), ("math", "math", 0), ("commonsense:boolq", "commonsense", 2)],
)
def test_the_whole_path_on_real_files(data, source, limit, official, stories_folder, gsm8k_adapter, tmp_path):
    """Asked as the official evaluation asks, generated, read, compared and kept; a model of 260K parameters knows no
    arithmetic."""
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "test.jsonl").write_text("\n".join(map(json.dumps, MATH)))
    folder = tmp_path / "math" if source == "math" else Path(DATA) / source
    words = ["lora-xs", "eval", "--adapter", gsm8k_adapter, "--data", data, "--data-dir", str(folder),
             "--limit", str(limit), "--max-new-tokens", "12", "--batch-size", "2", "--out", "p.jsonl"]  # fmt: skip
    done = run_command([*words, *(["--official-metric"] if official else [])], tmp_path)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(made) == (limit or len(MATH))
    share = sum(row["correct"] for row in made) / len(made)
    assert f"accuracy   {100 * share:.2f} (" in done.stdout
    if data == "math":
        assert "1 prompts fill the model's 512 tokens" in done.stdout
        assert made[2]["output"] == ""
    for row in made:
        if data == "commonsense:boolq" and official:
            assert row["prompt"].endswith("\n\n                ### Response:\n                ")
            assert "the request. \n\n                ### Instruction:\n" in row["prompt"]
        else:
            # The adapter was trained with Alpaca's prompt, and is asked by it.
            assert row["prompt"].endswith("### Response:" + (" Let's think step by step." if ":" not in data else ""))


@pytest.fixture(scope="module")
def gsm8k_adapter(stories_folder, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("gsm8k")
    words = ["lora-xs", "instruct", "--model", stories_folder, "--data", f"{DATA}/gsm8k/train.jsonl", "--limit", "48",
             "--rank", "8", "--epochs", "2", "--batch-size", "4", "--gradient-accumulation-steps", "2",
             "--val-samples", "8", "--learning-rate", "3e-2", "--eval-interval", "5", "--tracker",
             "none", "--out", "run"]  # fmt: skip
    done = run_command(words, cwd)
    assert done.returncode == 0, done.stderr
    losses = [r["loss"] for r in rows(cwd / "run") if r["split"] == "val"]
    assert losses[-1] < losses[0] - 0.2
    return str(cwd / "run" / "adapter")


def test_a_model_file_cut_short_is_refused(tmp_path):
    raw = (Path(DATA) / "weights/stories260K/stories260K.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(raw[:100_000])
    with pytest.raises(UserError, match="cut short"):
        load_llama2c(tmp_path / "short.bin")
