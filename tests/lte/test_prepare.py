"""lte-prepare: bins that decode to the documents, whatever was killed in between; and every kind of mistake."""

import csv
import io
import json
import os
import pickle
import re
import signal
import sys
import types
import urllib.request
from pathlib import Path

import lte.tasks.preparing
import memtrain_common.data.text.pieces
import numpy as np
import pytest
from lte.tasks.prepare import prepare
from lte.tasks.prepare_flags import DATASETS, resolve
from memtrain_common.data.text.corpus import load_corpus
from memtrain_common.data.text.documents import find_sources
from memtrain_common.data.text.pieces import Cutting
from memtrain_common.data.text.tokenizers import GPT2Tokenizer
from memtrain_common.errors import UserError
from memtrain_common.files import read_json
from support import Command, assert_refused, both, pause_when, run_command

END = 50256


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "meta.json"}


def jsonl(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


@pytest.fixture
def vocabulary(real_data):
    return str(real_data / "tokenizers" / "gpt2")


# -- real files


@pytest.mark.slow
def test_the_bins_of_real_articles_decode_to_the_articles(real_data, vocabulary, tmp_path):
    """All 1,000, in order, every tenth from the second on for validation, <|endoftext|> after each."""
    out = tmp_path / "cnn"
    folder = str(real_data / "cnn_dailymail")
    prepare(["cnn-dailymail", "--data-dir", folder, "--tokenizer-dir", vocabulary, "--out", str(out)])
    with (real_data / "cnn_dailymail" / "validation_subset_1000.csv").open(newline="") as file:
        articles = [row["article"] for row in csv.DictReader(file)]
    coder = GPT2Tokenizer(real_data / "tokenizers" / "gpt2")
    decoded = {}
    for split in ("train", "val"):
        tokens = np.fromfile(out / f"{split}.bin", np.uint16)
        assert tokens[-1] == END
        documents = np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]
        decoded[split] = [coder.decode(d[:-1]).decode() for d in documents]
    assert len(articles) == 1000
    assert decoded["val"] == articles[1::10]
    assert decoded["train"] == [a for i, a in enumerate(articles) if i % 10 != 1]
    meta = json.loads((out / "meta.json").read_text())
    assert meta["separator"] == "eot"
    assert meta["splits"]["val"]["documents"] == 100
    assert meta["splits"]["val"]["text_bytes"] == sum(len(a.encode()) for a in articles[1::10])
    corpus = load_corpus(str(out))  # without naming the vocabulary again: its files lie beside the bins
    assert corpus.tokenizer.decode(corpus.val[:-1]).decode() == "<|endoftext|>".join(articles[1::10])


@pytest.mark.slow
def test_shakespeare_has_nanogpts_numbers_of_tokens(real_data, vocabulary, tmp_path):
    folder = str(real_data / "text")
    prepare(["shakespeare", "--data-dir", folder, "--tokenizer-dir", vocabulary, "--out", str(tmp_path / "bpe")])
    prepare(["shakespeare_char", "--data-dir", folder, "--out", str(tmp_path / "char")])
    for name, train, val, vocab in (("bpe", 301_966, 36_059, 50257), ("char", 1_003_854, 111_540, 65)):
        corpus = load_corpus(str(tmp_path / name))
        assert (len(corpus.train), len(corpus.val), corpus.tokenizer.vocab_size) == (train, val, vocab)
    text = (real_data / "text" / "tinyshakespeare.txt").read_text()
    tokens = np.concatenate([np.fromfile(tmp_path / "char" / f"{s}.bin", np.uint16) for s in ("train", "val")])
    meta = pickle.loads((tmp_path / "char" / "meta.pkl").read_bytes())  # as nanoGPT reads it
    assert "".join(meta["itos"][t] for t in tokens.tolist()) == text
    assert meta["stoi"]["e"] == tokens[text.index("e")]


@pytest.mark.slow
def test_a_text_cut_at_seams_has_the_tokens_of_the_whole(real_data, monkeypatch):
    """Pieces of a few hundred characters of tinyshakespeare, and of text with every kind of white space."""
    coder = GPT2Tokenizer(real_data / "tokenizers" / "gpt2")
    rng = np.random.default_rng(0)
    alphabet = ["\n", "\n", "\n\n", " \n", "\n ", "\t", " ", "  ", "a", "Bc", "'s", "'", "12", "é", "日本", ".", "😀",
                "\u2028", "\x85", "\x1c", "\r\n"]  # fmt: skip
    noise = "".join(alphabet[i] for i in rng.integers(0, len(alphabet), 20_000))
    text = (real_data / "text" / "tinyshakespeare.txt").read_text()[:200_000] + noise
    monkeypatch.setattr(memtrain_common.data.text.pieces, "PIECE", 300)
    source = types.SimpleNamespace(size=1, split="train", documents=lambda: iter([(text, 1)]))
    pieces = list(Cutting((source,), 0.1, "nothing", single=False).pieces())
    assert len(pieces) > 300
    parts = [part for piece in pieces for part in piece.parts]
    assert "".join(part.text for part in parts) == text
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True]
    tokens = np.concatenate([coder.encode(part.text.encode()) for part in parts])
    assert np.array_equal(tokens, coder.encode(text.encode()))


@pytest.mark.slow
def test_tokens_are_tiktokens_and_special_words_are_text(real_data):
    import tiktoken

    coder = GPT2Tokenizer(real_data / "tokenizers" / "gpt2")
    assert isinstance(coder._encoding, tiktoken.Encoding)
    text = "before <|endoftext|> after, naïve 日本\n"
    assert coder.encode(text.encode()).tolist() == coder._encoding.encode_ordinary(text)
    assert END not in coder.encode(text.encode())
    for texts in (["one", "two\n", "three"], ["with " + text, "without"]):
        expected = [t for one in texts for t in (*coder._encoding.encode_ordinary(one), END)]
        assert coder.encode_documents(texts).tolist() == expected
    assert coder.end_of_text == END


@pytest.mark.slow
def test_a_source_preset_trains_on_the_articles(real_data, vocabulary, tmp_path):
    """By nanoGPT-LTE's words, from lte-prepare's default folder; the summary counts in tokens and in bytes."""
    folder = str(real_data / "cnn_dailymail")
    done = run_command(["lte-prepare", "cnn_dailymail", "--data-dir", folder, "--tokenizer-dir", vocabulary], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 " not in done.stdout.splitlines()[1][:3]
    words = ["lte-train", "gpt2-news", "--n_layer=1", "--n_head=2", "--n_embd=8", "--block_size=16", "--batch_size=4",
             "--lora_r=2", "--max_iters=12", "--lr_decay_iters=12", "--warmup_iters=1", "--learning_rate=0.03",
             "--eval_interval=6", "--eval_batches=4", "--wandb_log=False", "--out_dir=run", "--sample-tokens=8",
             "--tracker=none"]  # fmt: skip
    done = run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cnn_dailymail, 723,200 training tokens (gpt2)" in done.stdout
    assert "LTE, nats per byte" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["vocab_size"], config["lte_heads"], config["lte_merge_steps"], config["skip_mlp"]) == (
        50304, 4, 10, True,
    )  # fmt: skip
    losses = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    val = [r["loss"] for r in losses if r["split"] == "val"]
    assert val[-1] < val[0] - 0.05


# -- kills


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """120 documents of odd lengths, some of them longer than a piece."""
    rng = np.random.default_rng(1)
    words = ["lorem", "ipsum", "dolor", "sit", "amet\nconsectetur", "adipiscing", "elit\n"]
    texts = [" ".join(words[i] for i in rng.integers(0, len(words), int(n))) for n in rng.integers(1, 900, 120)]
    folder = tmp_path_factory.mktemp("many")
    jsonl(folder / "a.jsonl", texts[:50])
    jsonl(folder / "b.jsonl", texts[50:])
    return folder


def in_pieces():
    """What a large data set is to a test: many pieces, and an entry of the journal after each."""
    memtrain_common.data.text.pieces.PIECE = 3000
    lte.tasks.preparing._FLUSH_SECONDS = -1.0


def pause_after(pieces):
    """In pieces, and the command pauses itself when the journal tells of so many and the bins hold one more."""
    written = pause_when(os, "fsync", lambda fd: pieces_done(Path("out")) >= pieces)
    return both(in_pieces, written)


WORDS = ["--tokenizer", "bytes", "--workers", "2"]


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare([str(many), *WORDS, "--out", str(out)])
    return out


def pieces_done(out):
    try:
        return json.loads((out / ".preparing" / "journal.json").read_text())["pieces"]
    except (OSError, ValueError):
        return -1


@pytest.mark.slow
@pytest.mark.parametrize("moments", [(0,), (5, 30), (20, 21, 60)])
def test_killed_again_and_again_the_bins_are_the_same(many, undisturbed, tmp_path, moments):
    words = ["lte-prepare", str(many), *WORDS, "--out", "out"]
    out = tmp_path / "out"
    for moment in moments:
        done = Command(words, tmp_path, before=pause_after(moment)).end_by(signal.SIGKILL)
        assert done.returncode == -signal.SIGKILL
        with pytest.raises(UserError, match="not prepared to its end"):
            load_corpus(str(out))
    before = pieces_done(out)
    assert before >= moments[-1]
    done = run_command(words, tmp_path, before=in_pieces)
    assert done.returncode == 0, done.stderr
    assert f"going on with out after {before} pieces" in done.stdout
    assert contents(out) == contents(undisturbed)
    ours, theirs = (json.loads((p / "meta.json").read_text()) for p in (out, undisturbed))
    assert ours["splits"] == theirs["splits"]


@pytest.mark.slow
def test_a_signal_says_where_it_stopped_and_the_command_goes_on(many, undisturbed, tmp_path):
    words = ["lte-prepare", str(many), *WORDS, "--out", "out"]
    done = Command(words, tmp_path, before=pause_after(5)).end_by(signal.SIGTERM)
    assert done.returncode == 128 + signal.SIGTERM
    pieces = pieces_done(tmp_path / "out")
    assert done.stderr == f"lte-prepare: stopped by SIGTERM after {pieces} pieces; the same command goes on\n"
    other = run_command([*words, "--separator", "nothing"], tmp_path, before=in_pieces)
    assert_refused(other, "was begun with separator 'newline', not 'nothing'", "or remove out/.preparing")
    assert pieces_done(tmp_path / "out") == pieces
    assert run_command(words, tmp_path, before=in_pieces).returncode == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_killed_while_files_are_moved_into_place(many, undisturbed, tmp_path, monkeypatch):
    """After each single step of the end; the next call ends it."""
    words = [str(many), *WORDS, "--out", str(tmp_path / "out")]
    for survives in (0, 1, 1):  # moves before the kill
        real, count = lte.tasks.preparing.os.replace, iter(range(100))

        def replace(a, b, real=real, count=count, survives=survives):
            if str(b).startswith(str(tmp_path / "out")) and ".preparing" not in str(b) and next(count) >= survives:
                raise KeyboardInterrupt
            real(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(lte.tasks.preparing.os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                prepare(words)
    prepare(words)
    assert contents(tmp_path / "out") == contents(undisturbed)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_change_in_the_middle_of_a_long_file_is_noticed(tmp_path, capsys, earlier):
    """By all bytes; a preparation of an earlier version, which kept hashes of the ends alone, by these."""
    text = (b"0123456789abcde\n" * 2**17) + b"x"  # 2 MiB and one byte
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / "long.txt"
    path.write_bytes(text)
    words = [str(path.parent), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    prepare(words)
    if earlier:
        meta = read_json(tmp_path / "out" / "meta.json")
        (source,) = find_sources(path.parent, "text")
        meta["plan"]["sources"] = [{**source.earlier_fingerprint(), "split": None}]
        (tmp_path / "out" / "meta.json").write_text(json.dumps(meta))
    path.write_bytes(text[: 2**20] + b"X" + text[2**20 + 1 :])  # within neither the first nor the last MiB
    if not earlier:
        with pytest.raises(UserError, match=r"was prepared from other files, long\.txt the first"):
            prepare(words)
        return
    prepare(words)
    assert "prepared already" in capsys.readouterr().out
    path.write_bytes(b"X" + text[1:])
    with pytest.raises(UserError, match=r"was prepared from other files, long\.txt the first"):
        prepare(words)


def test_given_again_it_says_so_and_other_files_are_refused(many, undisturbed, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.iterdir()}
    prepare([str(many), *WORDS, "--out", str(undisturbed)])
    assert "prepared already" in capsys.readouterr().out
    with pytest.raises(UserError, match="was prepared with tokenizer 'bytes', not 'chars'"):
        prepare([str(many), "--tokenizer", "chars", "--out", str(undisturbed)])
    changed = tmp_path / "changed"
    jsonl(changed / "a.jsonl", ["something", "else"])
    with pytest.raises(UserError, match=r"was prepared from other files, .*\.jsonl the first"):
        prepare([str(changed), *WORDS, "--out", str(undisturbed)])
    assert {p: p.stat().st_mtime_ns for p in undisturbed.iterdir()} == before
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "train.bin").write_bytes(b"ab")
    with pytest.raises(UserError, match="holds bins that lte-prepare did not make"):
        prepare([str(many), *WORDS, "--out", str(theirs)])
    assert (theirs / "train.bin").read_bytes() == b"ab"


# -- splits and separators


def test_files_that_name_their_splits_keep_them(tmp_path):
    folder = tmp_path / "set"
    for split in ("train", "validation", "test"):
        jsonl(folder / f"{split}-00000-of-00001.jsonl", [f"{split} {i}" for i in range(3)])
    prepare([str(folder), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    for ours, theirs in (("train", "train"), ("val", "validation"), ("test", "test")):
        tokens = np.fromfile(tmp_path / "out" / f"{ours}.bin", np.uint16)
        assert tokens.astype(np.uint8).tobytes().decode() == "".join(f"{theirs} {i}\n" for i in range(3))
    jsonl(folder / "more.jsonl", ["x"])
    with pytest.raises(UserError, match=r"more\.jsonl names no split, and other files do"):
        prepare([str(folder), "--tokenizer", "bytes", "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def files(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_txt", ".txt").replace("_py", ".py").replace("_md", ".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def bytes_of(out):
    return {p.stem: np.fromfile(p, np.uint16).astype(np.uint8).tobytes().decode() for p in out.glob("*.bin")}


@pytest.mark.parametrize(
    "texts",
    [
        {"test_txt": "the test", "train_txt": "to train on", "val_txt": "held out"},
        {"ptb.test_txt": "the test", "ptb.train_txt": "to train on", "ptb.valid_txt": "held out"},
        {"test__a_txt": "the test", "train__a_txt": "to train on", "dev__a_txt": "held out"},
    ],
)
def test_texts_that_name_their_splits_keep_them(tmp_path, texts):
    """In the order of names the test would come first, and be trained on."""
    prepare([files(tmp_path / "set", **texts), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    assert bytes_of(tmp_path / "out") == {"train": "to train on", "val": "held out", "test": "the test"}


def test_without_a_val_the_end_of_the_text_that_is_trained_on_is_held_out(tmp_path):
    folder = files(tmp_path / "set", test_txt="the test", train_txt="0123456789" * 10)
    prepare([folder, "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    assert bytes_of(tmp_path / "out") == {"train": "0123456789" * 9, "val": "0123456789", "test": "the test"}


@pytest.mark.parametrize(
    ("texts", "refusal"),
    [
        ({"test_txt": "a", "val_txt": "b"}, "test.txt is of the split test by its name, and no file is of train"),
        ({"book_txt": "a", "val_txt": "b"}, "val.txt is of the split val by its name, and no file is of train"),
        ({"train_txt": "a", "test_txt": "b", "README_md": "c"}, "README.md names no split, and other files do"),
        ({"train_notes_txt": "a", "book_txt": "b"}, ""),
        ({"the_test_of_time_txt": "a", "book_txt": "b"}, ""),
        ({"train_py": "a", "test_py": "b", "model_py": "c"}, ""),
        ({"only_training_txt": "a" * 10}, ""),
        ({"index_md": "a", "training_md": "b", "validation_md": "c"}, ""),
        ({"train_notes_txt": "a", "test_plan_md": "b", "index_md": "c"}, ""),
    ],
)
def test_what_some_names_say_of_splits_is_kept_refused_or_chance(tmp_path, texts, refusal):
    words = [files(tmp_path / "set", **texts), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    if refusal:
        with pytest.raises(UserError, match=re.escape(refusal)):
            prepare(words)
        assert not (tmp_path / "out").exists()
    else:
        prepare(words)
        assert set(bytes_of(tmp_path / "out")) == {"train", "val"}


def test_tables_of_a_test_and_a_validation_alone_are_refused(tmp_path):
    for split in ("test", "val"):
        jsonl(tmp_path / "set" / f"{split}.jsonl", ["one", "two"])
    with pytest.raises(UserError, match=r"test\.jsonl is of the split test by its name, and no file is of train"):
        prepare([str(tmp_path / "set"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    (tmp_path / "set" / "test.jsonl").unlink()  # a file of one split alone is data like any other
    prepare([str(tmp_path / "set"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    assert bytes_of(tmp_path / "out") == {"train": "one\n", "val": "two\n"}


def test_a_byte_order_mark_is_no_character(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffhéllo wörld".encode())
    prepare([str(tmp_path / "a.txt"), "--tokenizer", "chars", "--out", str(tmp_path / "out")])
    assert read_json(tmp_path / "out" / "meta.json")["characters"] == "".join(sorted(set("héllo wörld")))


@pytest.mark.parametrize(("n", "share"), [(2, 0.1), (7, 0.5), (100, 0.07), (1001, 0.0005), (1000, 0.1)])
def test_the_share_for_validation_is_spread_evenly(tmp_path, n, share):
    path = jsonl(tmp_path / "a.jsonl", [str(i) for i in range(n)])
    cutting = Cutting(tuple(find_sources(path, "text")), share, "nothing", single=False)
    held = [int(p.text) for piece in cutting.pieces() for p in piece.parts if p.split == "val"]
    assert held[0] == 1
    assert abs(len(held) - n * share) < 1
    gaps = np.diff(held)
    assert all(abs(gap - 1 / share) < 1 for gap in gaps)


def test_characters_and_newlines(tmp_path):
    jsonl(tmp_path / "set" / "a.jsonl", ["héllo", "日本", "héllo"])
    prepare([str(tmp_path / "set"), "--tokenizer", "chars", "--out", str(tmp_path / "out")])
    corpus = load_corpus(str(tmp_path / "out"))
    assert corpus.tokenizer.characters == "\nhloé日本"
    assert corpus.tokenizer.decode(corpus.train).decode() == "héllo\nhéllo\n"
    assert corpus.tokenizer.decode(corpus.val).decode() == "日本\n"


def test_one_text_is_cut_at_its_end_as_nanogpt_does(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(997)))
    prepare([str(tmp_path / "a.txt"), "--tokenizer", "chars", "--out", str(tmp_path / "out")])
    text = (tmp_path / "a.txt").read_text()
    corpus = load_corpus(str(tmp_path / "out"))
    assert corpus.tokenizer.decode(corpus.train).decode() == text[: int(997 * 0.9)]
    assert corpus.tokenizer.decode(corpus.val).decode() == text[int(997 * 0.9) :]


# -- the hub and the web


@pytest.mark.slow
def test_known_sets_come_from_the_hub(tmp_path, monkeypatch, vocabulary):
    asked = []

    def load_dataset(name, subset, *, split, **more):
        asked.append((name, subset, split, more))
        return [{"text": f"{split} {i}", "article": f"article {split} {i}"} for i in range(4001)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    prepare(["openwebtext", "--tokenizer-dir", vocabulary])
    corpus = load_corpus("data/openwebtext")
    assert np.count_nonzero(corpus.train == END) == 3999
    assert np.count_nonzero(corpus.val == END) == 2  # documents 1 and 2001
    prepare(["cnn-dailymail", "--tokenizer-dir", vocabulary])
    meta = json.loads((tmp_path / "data" / "cnn_dailymail" / "meta.json").read_text())
    assert [meta["splits"][s]["documents"] for s in ("train", "val", "test")] == [4001] * 3
    assert asked == [
        ("Skylion007/openwebtext", None, "train", {"revision": "refs/convert/parquet"}),
        *(("abisee/cnn_dailymail", "3.0.0", split, {}) for split in ("train", "validation", "test")),
    ]

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(UserError, match=r"could not be loaded by name \(no route\): give its files by --data-dir"):
        prepare(["openwebtext", "--out", "else", "--tokenizer-dir", vocabulary])
    assert not (tmp_path / "else").exists()


def test_tiny_shakespeare_is_downloaded_and_its_hash_checked(real_data, tmp_path, monkeypatch):
    raw = (real_data / "text" / "tinyshakespeare.txt").read_bytes()
    monkeypatch.chdir(tmp_path)

    def offline(url, timeout):
        raise OSError("no route")

    for answer, expected in (
        (lambda url, timeout: io.BytesIO(raw[:-1]), "is not the text that was expected"),
        (offline, "could not be downloaded"),
    ):
        monkeypatch.setattr(urllib.request, "urlopen", answer)
        with pytest.raises(UserError, match=expected):
            prepare(["shakespeare-char"])
        assert not (tmp_path / "data" / "shakespeare_char").exists()
    urls = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: urls.append(url) or io.BytesIO(raw))
    prepare(["shakespeare-char"])
    assert urls == [DATASETS["shakespeare"].url]
    assert (tmp_path / "data" / "shakespeare_char" / "input.txt").read_bytes() == raw
    assert len(load_corpus("data/shakespeare_char").train) == 1_003_854


# -- mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["name a data set (openwebtext", "or a folder"]),
        (["nowhere"], ["nowhere is neither a folder nor one of openwebtext"]),
        (["--dataset", "enwik8"], ["unknown data set 'enwik8'"]),
        (["shakespeare", "--val-fraction", "1.5"], ["--val-fraction must be above 0 and below 1"]),
        (["shakespeare", "--workers", "-1"], ["--workers must be at least 0"]),
        (["shakespeare-char", "--separator", "eot"], ["--separator eot needs --tokenizer gpt2"]),
        (["shakespeare-char", "--tokenizer-dir", "x"], ["--tokenizer-dir is for --tokenizer gpt2"]),
        (["shakespeare", "--colum", "x"], ["unknown flag --colum", "did you mean --column?"]),
    ],
)
def test_wrong_flags_are_one_sentence(words, expected):
    with pytest.raises(UserError) as error:
        resolve(words)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.slow
def test_bad_input_leaves_nothing_behind(tmp_path, real_data):
    jsonl(tmp_path / "set" / "a.jsonl", ["one", "two"], column="body")
    jsonl(tmp_path / "one" / "a.jsonl", ["alone"])
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for words, *expected in (
        (["set"], "has no column 'text', only 'body'"),
        (["set", "--column", "body", "--out", "file"], "file is a file"),
        (["set", "--column", "body", "--out", "set/bins"], "the bins would lie in the data folder"),
        (["one"], "1 documents leave none for validation at --val-fraction 0.1"),
        (["set", "--data-dir", "elsewhere"], "set and --data-dir name the files twice"),
    ):
        done = run_command(["lte-prepare", *words, "--tokenizer", "bytes"], tmp_path)
        assert_refused(done, *expected)
        assert sorted(tmp_path.rglob("*")) == before, words
    done = run_command(["lte-prepare", "set", "--column", "body", "--tokenizer-dir", "set"], tmp_path)
    assert_refused(done, "set/encoder.json is missing")


def test_two_at_a_time_are_refused(many, tmp_path):
    words = ["lte-prepare", str(many), *WORDS, "--out", "out"]
    first = Command(words, tmp_path, before=pause_after(1))
    first.wait_until_paused()
    assert_refused(run_command(words, tmp_path), "is in use by another process")
    first.send_signal(signal.SIGCONT)
    assert first.wait().returncode == 0
