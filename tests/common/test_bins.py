"""Token bins: ours and nanoGPT's, mapped and checked; a vocabulary pickle is read without being run."""

import contextlib
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from memtrain_common.data.text.bins import describe_tokenizer, tokenizer_of
from memtrain_common.data.text.corpus import Crops, load_corpus
from memtrain_common.data.text.nanogpt_meta import read_meta_pickle, write_meta_pickle
from memtrain_common.data.text.tokenizers import CharTokenizer
from memtrain_common.errors import UserError

WORDS = "the quick brown fox, naïve 日本 jumps\n"


def bins(folder, train=(1, 2, 3, 4, 5, 6), val=(7, 8, 9), **meta):
    """A folder of bins; with any ``meta``, its meta.json as lte-prepare writes it."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for name, tokens in (("train", train), ("val", val)):
        raw = np.array(tokens, "<u2").tobytes()
        (folder / f"{name}.bin").write_bytes(raw)
        splits[name] = {"tokens": len(tokens), "text_bytes": 4 * len(tokens), "sha256": hashlib.sha256(raw).hexdigest()}
    if meta:
        (folder / "meta.json").write_text(json.dumps({"splits": splits, "characters": None, **meta}))
    return folder


def test_nanogpts_own_bins_are_gpt2s_tokens_without_any_vocabulary_file(tmp_path):
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 50257, 1000), rng.integers(0, 50257, 101)
    corpus = load_corpus(str(bins(tmp_path / "openwebtext", train, val)))
    assert (corpus.name, corpus.tokenizer.name, corpus.tokenizer.vocab_size) == ("openwebtext", "gpt2", 50257)
    assert isinstance(corpus.train, np.memmap)
    assert corpus.n_bytes == 0
    assert np.array_equal(corpus.train, train)
    x, y = Crops(corpus, batch_size=4, block_size=16, seed=0)(3)
    assert torch.equal(x[:, 1:], y[:, :-1])
    rows = np.lib.stride_tricks.sliding_window_view(train, 16)
    assert all((rows == row.numpy()).all(1).any() for row in x)


def test_the_hash_is_of_the_tokens(tmp_path):
    a = load_corpus(str(bins(tmp_path / "a"))).sha256
    assert a == load_corpus(str(bins(tmp_path / "b"))).sha256
    assert a != load_corpus(str(bins(tmp_path / "c", val=(7, 8, 10)))).sha256


def test_meta_json_brings_the_tokenizer(tmp_path):
    letters = "".join(sorted(set(WORDS)))
    tokens = [letters.index(c) for c in WORDS]
    folder = bins(tmp_path / "x", tokens, tokens, tokenizer="chars", vocab_size=len(letters), characters=letters)
    corpus = load_corpus(str(folder))
    assert corpus.tokenizer.decode(corpus.val).decode() == WORDS
    assert corpus.describe()["characters"] == letters
    assert corpus.bytes_per_token == 4
    with pytest.raises(UserError, match="hold chars tokens, not gpt2"):
        load_corpus(str(folder), "gpt2")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_vocabulary_as_nanogpt_pickles_it(tmp_path, protocol):
    """nanoGPT's prepare.py makes the two dicts from one list, so the second refers to the first's strings."""
    letters = sorted(set(WORDS)) + [chr(c) for c in range(0x4E00, 0x4E00 + 300)]
    meta = {
        "vocab_size": len(letters),
        "itos": dict(enumerate(letters)),
        "stoi": {c: i for i, c in enumerate(letters)},
    }
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta, protocol=protocol))
    assert read_meta_pickle(path) == "".join(letters)
    write_meta_pickle(path, "".join(letters))
    assert pickle.loads(path.read_bytes()) == meta


def test_the_letters_keep_the_order_of_their_tokens(tmp_path):
    """In nanoGPT's meta.pkl, in meta.json, and in what a run remembers; a text's own are sorted."""
    letters = "".join(dict.fromkeys(WORDS))
    assert letters != "".join(sorted(letters))
    tokens = [letters.index(c) for c in WORDS]
    described = {"tokenizer": "chars", "vocab_size": len(letters), "characters": letters}
    pickled = bins(tmp_path / "pickled", tokens, tokens)
    write_meta_pickle(pickled / "meta.pkl", letters)
    for folder in (pickled, bins(tmp_path / "meta", tokens, tokens, **described)):
        corpus = load_corpus(str(folder))
        assert describe_tokenizer(corpus.tokenizer) == described
        for coder in (corpus.tokenizer, tokenizer_of(corpus.describe())):
            assert coder.decode(corpus.train).decode() == WORDS
            assert coder.encode(WORDS.encode()).tolist() == tokens
    assert CharTokenizer.of_text(WORDS).characters == "".join(sorted(letters))


def test_a_vocabulary_that_says_two_things_is_refused(tmp_path):
    twice = bins(tmp_path / "twice", tokenizer="chars", vocab_size=10, characters="abcdefghia")
    more = bins(tmp_path / "more", tokenizer="chars", vocab_size=10, characters="abcdefghi")
    for folder in (twice, more):
        with pytest.raises(UserError, match=r"meta\.json is not what lte-prepare writes"):
            load_corpus(str(folder))
    for itos, stoi in (({0: "a", 1: "a"}, {"a": 1}), ({0: "a", 1: "b"}, {"a": 1, "b": 0})):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "itos": itos, "stoi": stoi}))
        with pytest.raises(UserError, match="not a vocabulary as nanoGPT writes it"):
            read_meta_pickle(tmp_path / "meta.pkl")
    with pytest.raises(ValueError, match="each character once"):
        CharTokenizer("aba")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned-by-meta",)


@pytest.mark.parametrize(
    "value", [Evil(), {"vocab_size": Evil()}, {"vocab_size": 2, "itos": {0: "a"}, "stoi": {}}, [1], 5, {"itos": {0: 1}}]
)
def test_any_other_pickle_is_refused_and_not_run(tmp_path, value):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match="not a vocabulary as nanoGPT writes it"):
        read_meta_pickle(path)
    assert not os.path.exists("/tmp/pwned-by-meta")
    path.write_bytes(pickle.dumps(value)[:-3])
    with pytest.raises(UserError):
        read_meta_pickle(path)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_pickle_never_shows_a_traceback(tmp_path, seed):
    path = tmp_path / "meta.pkl"
    write_meta_pickle(path, "".join(sorted(set(WORDS))))
    raw = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for _ in range(3):
        raw[rng.integers(len(raw))] = rng.integers(256)
    path.write_bytes(raw)
    with contextlib.suppress(UserError):
        read_meta_pickle(path)


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8"])
def test_wider_tokens_are_not_read_as_twice_as_many(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("memtrain_common.data.text.bins._CHUNK", 8)
    tokens = np.random.default_rng(0).integers(1, 50257, 40)
    folder = bins(tmp_path / "x", tokens, tokens)
    (folder / "val.bin").write_bytes(tokens.astype(dtype).tobytes())
    with pytest.raises(UserError, match=r"val\.bin has a 0 at every second place.*numpy\.uint16"):
        load_corpus(str(folder))


def test_zeros_at_every_second_place_may_be_meant(tmp_path):
    """UTF-16 as bytes, which lte-prepare has counted; and nanoGPT's zeros in a part of the text alone."""
    utf16 = [*"the quick brown fox".encode("utf-16-le")]
    folder = bins(tmp_path / "counted", utf16, utf16, tokenizer="bytes", vocab_size=256)
    assert load_corpus(str(folder)).train.tolist() == utf16
    folder = bins(tmp_path / "part", [*utf16, 1, 1], [1, 1, *utf16])
    assert load_corpus(str(folder)).val.tolist() == [1, 1, *utf16]


def damaged(folder, **change):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **change}))


def test_bad_bins_are_one_sentence(tmp_path):
    good = {"tokenizer": "gpt2", "vocab_size": 50257}
    odd = bins(tmp_path / "odd")
    (odd / "train.bin").write_bytes(b"\1\2\3")
    beyond = bins(tmp_path / "beyond", val=(5, 6, 50257, 7))
    padded = bins(tmp_path / "padded", train=(5, 60000), **good)
    lacks = bins(tmp_path / "lacks")
    (lacks / "val.bin").unlink()
    empty = bins(tmp_path / "empty", val=())
    other = bins(tmp_path / "other", **good)
    (other / "train.bin").write_bytes(np.arange(9, dtype="<u2").tobytes())
    flipped = bins(tmp_path / "flipped", **good)
    (flipped / "train.bin").write_bytes(np.array([1, 2, 3, 4, 5, 7], "<u2").tobytes())
    unfinished = bins(tmp_path / "unfinished", **good)
    (unfinished / ".preparing").mkdir()
    strange = bins(tmp_path / "strange", **good)
    damaged(strange, tokenizer="sentencepiece")
    no_letters = bins(tmp_path / "no_letters", tokenizer="chars", vocab_size=9)
    for folder, *expected in (
        (odd, "train.bin has 3 bytes, an odd number"),
        (beyond, "val.bin holds the token 50257 at position 2, beyond the vocabulary of 50257 (gpt2)"),
        (padded, "train.bin holds the token 60000 at position 1"),
        (lacks, "val.bin is missing"),
        (empty, "val.bin is empty"),
        (other, "holds 9 tokens and meta.json beside it says 6"),
        (flipped, "does not have the SHA-256 that meta.json recorded"),
        (unfinished, "not prepared to its end", "which goes on"),
        (strange, "meta.json is not what lte-prepare writes"),
        (no_letters, "meta.json is not what lte-prepare writes"),
    ):
        with pytest.raises(UserError) as error:
            load_corpus(str(folder))
        for part in expected:
            assert part in str(error.value)
