"""Corpora, tokenizers and crops, on made-up folders and on the real files."""

import shutil

import numpy as np
import pytest
from memtrain_common.data.text.corpus import Corpus, Crops, load_corpus, ngram_entropies
from memtrain_common.data.text.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, default_prompt
from memtrain_common.errors import UserError


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_txt", ".txt").replace("_bin", ".bin")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


@pytest.mark.slow
def test_the_embedded_corpus_is_the_same_every_time():
    a, b = load_corpus(), load_corpus()
    assert a.sha256 == b.sha256
    assert len(a.train) > 5_000_000
    assert 0.05 < len(a.val) / len(a.train) < 0.25
    assert load_corpus(tokenizer="chars").tokenizer.vocab_size > 128  # all of it is text, not all ASCII
    assert b"def " in a.tokenizer.decode(a.val[:100_000])


def test_a_tenth_of_the_embedded_files_is_for_validation(tmp_path, monkeypatch):
    """By a hash of each name: of 2,000 files 200, give or take four times the deviation of 13."""
    for i in range(2000):
        (tmp_path / f"m{i}.py").write_text("x" * 9)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = load_corpus()
    assert len(corpus.train) + len(corpus.val) == 2000 * 10 - 2
    assert 148 <= len(corpus.val) / 10 <= 252


def test_a_folder_is_read_in_order_and_split_at_the_end(tmp_path):
    folder = write(tmp_path, b_txt="klmnopqrs", a__x_txt="0123456789", ignored_bin=b"\xff\xfe")
    corpus = load_corpus(folder)
    assert bytes(corpus.train) + bytes(corpus.val) == b"0123456789\nklmnopqrs"
    assert (len(corpus.train), len(corpus.val)) == (18, 2)


def test_characters(tmp_path):
    text = "naïve déjà vu, " * 20
    corpus = load_corpus(write(tmp_path, t_txt=text), "chars")
    assert corpus.tokenizer.vocab_size == len(set(text))
    joined = np.concatenate([corpus.train, corpus.val])
    assert corpus.tokenizer.decode(joined).decode() == text
    assert corpus.bytes_per_token == len(text.encode()) / len(text)
    with pytest.raises(UserError, match="'z' is not in the vocabulary"):
        corpus.tokenizer.encode(b"z")
    with pytest.raises(UserError, match="'一' is not in the vocabulary"):
        corpus.tokenizer.encode("一".encode())


def test_tinyshakespeare_has_nanogpts_numbers(real_data, tmp_path):
    shutil.copy(real_data / "text" / "tinyshakespeare.txt", tmp_path / "input.txt")
    corpus = load_corpus(str(tmp_path), "chars")
    assert (len(corpus.train), len(corpus.val), corpus.tokenizer.vocab_size) == (1_003_854, 111_540, 65)


@pytest.mark.slow
def test_shakespeare_in_gpt2_tokens_has_nanogpts_numbers(real_data, tmp_path):
    shutil.copy(real_data / "text" / "tinyshakespeare.txt", tmp_path / "input.txt")
    corpus = load_corpus(str(tmp_path), "gpt2", str(real_data / "tokenizers" / "gpt2"))
    assert (len(corpus.train), len(corpus.val), corpus.tokenizer.vocab_size) == (301_966, 36_059, 50_257)
    whole = (real_data / "text" / "tinyshakespeare.txt").read_bytes()
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == whole


@pytest.mark.slow
def test_gpt2_tokens_of_a_known_sentence(real_data):
    tokenizer = GPT2Tokenizer(real_data / "tokenizers" / "gpt2")
    assert tokenizer.encode(b"Hello world").tolist() == [15496, 995]
    assert tokenizer.encode(b"<|endoftext|>").tolist() != [50256]  # text cannot smuggle in the special token
    assert tokenizer.decode(np.array([50256])) == b"<|endoftext|>"


def test_hidden_files_and_folders_are_not_data(tmp_path):
    folder = write(tmp_path, a_txt="0123456789", **{".git__x_txt": "secret"})
    (tmp_path / "loop").symlink_to(tmp_path)
    corpus = load_corpus(folder)
    assert bytes(corpus.train) + bytes(corpus.val) == b"0123456789"


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds nothing"):
        load_corpus(str(tmp_path))
    with pytest.raises(UserError, match=r"holds only picture\.bin"):
        load_corpus(write(tmp_path / "b", picture_bin=b"x"))
    with pytest.raises(UserError, match=r"1 text files in .* are empty"):
        load_corpus(write(tmp_path / "e", empty_txt="\n"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_corpus(write(tmp_path / "u", latin_txt=b"caf\xe9 " * 9), "chars")
    with pytest.raises(UserError, match=r"encoder\.json is missing"):
        load_corpus(write(tmp_path / "g", t_txt="text"), "gpt2", str(tmp_path))
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ t\n")
    with pytest.raises(UserError, match="do not belong together"):
        load_corpus(str(tmp_path / "g"), "gpt2", str(tmp_path))


def corpus_of(n_train, n_val):
    tokens = np.arange(n_train + n_val, dtype=np.uint16)
    return Corpus("numbers", tokens[:n_train], tokens[n_train:], ByteTokenizer(), n_train + n_val, "")


def test_targets_are_inputs_moved_by_one_and_stay_in_their_split():
    crops = Crops(corpus_of(50, 20), batch_size=64, block_size=7, seed=0)
    seen = set()
    for i in range(20):
        x, y = crops(i)
        assert x.shape == y.shape == (64, 7)
        assert (y == x + 1).all()
        seen |= set(x[:, 0].tolist())
    assert seen == set(range(43))  # 43 + 7 = 50: the last target is the last token
    assert all((crops(3)[k] == crops(3)[k]).all() for k in (0, 1))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(world):
    whole = Crops(corpus_of(50, 20), batch_size=8, block_size=3, seed=5)
    shares = [
        Crops(corpus_of(50, 20), batch_size=8, block_size=3, seed=5, rank=r, world_size=world) for r in range(world)
    ]
    for i in range(3):
        together = sorted(row for share in shares for row in share(i)[0].tolist())
        assert together == sorted(whole(i)[0].tolist())


def test_validation_is_spread_over_the_split_and_fixed():
    crops = Crops(corpus_of(50, 2000), batch_size=4, block_size=10, seed=0)
    first = [x for x, _ in crops.validation(5)]
    assert [b.shape for b in first] == [(4, 10)] * 5
    starts = [int(row[0]) for b in first for row in b]
    assert starts[0] == 50
    assert starts[-1] == 50 + 2000 - 11
    assert starts == sorted(set(starts))
    short = list(Crops(corpus_of(50, 26), batch_size=4, block_size=10, seed=0).validation(100))
    assert [len(x) for x, _ in short] == [2]  # 26 tokens hold two blocks with targets
    middle = list(Crops(corpus_of(50, 66), batch_size=4, block_size=10, seed=0).validation(100))
    assert [len(x) for x, _ in middle] == [4]  # six blocks: batches of equal size, or their mean would be no mean


def test_a_corpus_shorter_than_a_block_is_refused():
    with pytest.raises(UserError, match="split of 7 tokens, too few for a block of 7"):
        Crops(corpus_of(50, 7), batch_size=1, block_size=7, seed=0)


def test_entropies_against_a_count_by_hand():
    # aabab: unigrams a 3/5, b 2/5; pairs aa ab ba ab; after a: a 1/3, b 2/3; after b: a always
    tokens = np.frombuffer(b"aabab", np.uint8)
    h1 = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    h2 = 0.75 * -(1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3))
    assert ngram_entropies(tokens) == pytest.approx((h1, h2), abs=1e-12)
    wide = np.array([7, 7, 60_000, 7, 60_000], np.uint16)  # too wide for a table: the same entropies by sorting
    assert ngram_entropies(wide) == pytest.approx((h1, h2), abs=1e-12)


def test_the_prompt_is_a_newline_where_the_corpus_has_one():
    assert default_prompt(ByteTokenizer()).tolist() == [10]
    assert default_prompt(CharTokenizer("ab")).tolist() == [0]
