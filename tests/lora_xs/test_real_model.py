"""A real pretrained language model of 1 MB: stories260K, read as a transformers Llama."""

import copy
import os
from pathlib import Path

import pytest
import torch
from lora_xs import CAUSAL_LM_TARGETS, LoRAXSConfig, inject, load_adapter, save_adapter, trained
from memtrain_common.errors import UserError
from memtrain_common.llama2c import Llama2cTokenizer, load_llama2c

DATA = os.environ.get("MEMTRAIN_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="MEMTRAIN_DATA is not set: no real weights here")


@pytest.fixture(scope="module")
def stories():
    pytest.importorskip("transformers")
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


def test_a_model_file_cut_short_is_refused(tmp_path):
    raw = (Path(DATA) / "weights/stories260K/stories260K.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(raw[:100_000])
    with pytest.raises(UserError, match="cut short"):
        load_llama2c(tmp_path / "short.bin")
