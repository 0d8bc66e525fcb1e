"""Documents from every format are the same documents, in order; and every kind of broken file is one sentence."""

import csv
import gzip
import json

import pytest
from memtrain_common.data.text.documents import Source, find_sources, fingerprints, split_of
from memtrain_common.errors import UserError

TEXTS = ['One.\nTwo, "three"', "naïve — 日本\r\n", "x" * 200_000, ""]


def write_all(folder):
    """The same rows as CSV, TSV, JSON Lines (plain and gzipped) and parquet."""
    import pyarrow
    import pyarrow.parquet

    for suffix, dialect in ((".csv", "excel"), (".tsv", "excel-tab")):
        with (folder / f"a{suffix}").open("w", newline="") as file:
            writer = csv.writer(file, dialect)
            writer.writerows([["id", "body"], *([str(i), t] for i, t in enumerate(TEXTS))])
    lines = "".join(json.dumps({"id": i, "body": t}) + "\n" for i, t in enumerate(TEXTS))
    (folder / "a.jsonl").write_text(lines + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    table = pyarrow.table({"id": list(range(len(TEXTS))), "body": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)


def test_every_format_gives_the_same_documents(tmp_path):
    write_all(tmp_path)
    (tmp_path / "README.md").write_text("what this is")
    sources = find_sources(tmp_path, "body")
    assert [s.name for s in sources] == ["a.csv", "a.jsonl", "a.parquet", "a.tsv", "b.jsonl.gz"]
    for source in sources:
        found = list(source.documents())
        assert [text for text, _ in found] == [*TEXTS[:3], None], source.name
        positions = [position for _, position in found]
        assert positions == sorted(positions)
        assert positions[-1] <= source.size


def test_text_files_are_documents(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"two\r\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("one")
    (tmp_path / ".hidden.txt").write_text("no")
    found = [text for source in find_sources(tmp_path, "text") for text, _ in source.documents()]
    assert found == ["two\r\n", "one"]
    assert [s.name for s in find_sources(tmp_path / "b.txt", "text")] == ["b.txt"]


def test_half_a_surrogate_pair_becomes_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    ((text, _),) = find_sources(tmp_path, "text")[0].documents()
    assert text == "a � b"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00003.parquet", "train"), ("validation_subset_1000.csv", "val"), ("dev.tsv", "val"),
        ("data/test.jsonl", "test"), ("training/0.jsonl", "train"), ("train_and_test.csv", None), ("trainer.csv", None),
        ("articles.csv", None),
    ],
)  # fmt: skip
def test_a_name_tells_its_split(name, split):
    assert split_of(name) == split


def broken_parquet(path):
    path.write_bytes(b"PAR1 and then nothing")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"id,body\n1,x\n", ["a.csv has no column 'text', only 'id', 'body'", "--column"]),
        ("a.csv", b"text\n\xff\xfe\n", ["a.csv is not UTF-8"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2 is not JSON"]),
        ("a.jsonl", b'["text"]\n', ["a.jsonl, line 1 is not an object"]),
        ("a.jsonl", b'{"body": "a"}\n', ["a.jsonl, line 1 has no column 'text', only 'body'"]),
        ("a.jsonl", b'{"text": 5}\n', ["'text' is int, not text"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}\n', mtime=0)[:-6], ["a.jsonl.gz is not a whole gzip file"]),
        ("a.parquet", b"PAR1 and then nothing", ["a.parquet is not a whole parquet file"]),
        ("a.txt", b"abc\xff", ["a.txt is not UTF-8"]),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    (source,) = find_sources(tmp_path, "text")
    with pytest.raises(UserError) as error:
        list(source.documents())
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_to_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_sources(tmp_path / "nowhere", "text")
    (tmp_path / "a.bin").write_bytes(b"1")
    with pytest.raises(UserError, match=r"holds only a\.bin"):
        find_sources(tmp_path, "text")


def test_rows_of_the_hub_are_documents():
    rows = [{"body": "a"}, {"body": None}, {"body": "b"}]
    source = Source("someone/something train", len(rows), "train", None, "body", rows)
    assert list(source.documents()) == [("a", 1), (None, 2), ("b", 3)]
    assert fingerprints([source])[0] == source.earlier_fingerprint() == {"name": "someone/something train", "rows": 3}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", 'text\tlabel\none\t0\n"two\t1\nthree\t0\nsay "hi"\t1\n', "is not TSV .*quote the texts"),
        ("a.tsv", 'text\tlabel\n"two\t1\nthree\t0\nthe end"\t1\n', "line 4 ends a text that a quotation mark began"),
        ("a.tsv", 'text\tlabel\n"Great" film\t1\n', "is not TSV"),
        ("a.csv", "text,label\nhello, world,1\n", "line 2 has 3 cells, and the heading 2"),
        ("a.csv", "label,text\n1\n", "line 2 has fewer cells, and the heading 2"),
    ],
)
def test_rows_that_would_lose_text_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    [source] = find_sources(tmp_path, "text")
    with pytest.raises(UserError, match=said):
        list(source.documents())


def test_empty_cells_at_the_end_of_a_line_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nhello,1,\nthere,0,,\n")
    [source] = find_sources(tmp_path, "text")
    assert [text for text, _ in source.documents()] == ["hello", "there"]
