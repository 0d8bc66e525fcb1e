"""GLUE: every task's file layout, its metrics against scikit-learn and scipy, and what is refused."""

import sys
import types

import numpy as np
import pytest
from memtrain_common.data.text import glue
from memtrain_common.errors import UserError

HEADS = {
    "sst2": ("SST-2", "sentence\tlabel", "a\t1", (("a",), 1)),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "0\tq\ts\tnot_entailment", (("q", "s"), 1)),
    "mrpc": ("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t5\t6\ta\tb", (("a", "b"), 1)),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", (("a", "b"), 0)),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore", "0\ta\tb\t2.5", (("a", "b"), 2.5)),
    "mnli": ("MNLI", "index\tsentence1\tsentence2\tgold_label", "0\ta\tb\tcontradiction", (("a", "b"), 2)),
    "qqp": ("QQP", "id\tquestion1\tquestion2\tis_duplicate", '0\t"a\tb\t1', (('"a', "b"), 1)),
    "cola": ("CoLA", None, "gj04\t0\t*\tA sentence.", (("A sentence.",), 0)),
}


@pytest.mark.parametrize("task", glue.TASKS)
def test_every_layout_is_read(task, tmp_path):
    folder, head, line, (texts, label) = HEADS[task]
    (tmp_path / folder).mkdir()
    names = ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"] if task == "mnli" else ["train.tsv", "dev.tsv"]
    for name in names:
        text = "\r\n".join(x for x in (head, line, "") if x is not None)
        (tmp_path / folder / name).write_text(text, encoding="utf-8", newline="")
    found = glue.load_glue(task, tmp_path)
    assert set(found) == set(glue.splits(task))
    for rows in found.values():
        assert rows.texts == (texts,)
        assert rows.labels.tolist() == [label]
    assert glue.load_glue(task, tmp_path / folder)["train"].texts == (texts,)  # the task's folder itself will do


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("sst2", "sentence\tlabel\nfine\t1\nhalf", "line 3: 1 columns"),
        ("sst2", "sentence\tlabel\nfine\t2\n", "line 2: the label '2'"),
        ("sst2", "text\tlabel\nfine\t1\n", "no column 'sentence'"),
        ("sst2", "sentence\tlabel\n", "no rows"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tsix\n", "line 2: the score 'six'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t6\n", "not between 0 and 5"),
    ],
)
def test_bad_files_are_refused_by_line(task, text, expected, tmp_path):
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(UserError, match=expected):
        glue.read_split(task, tmp_path, "train")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"CoLA/train\.tsv"):
        glue.load_glue("cola", tmp_path)


def test_metrics_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    predicted = np.where(rng.random(200) < 0.7, labels, 1 - labels)
    assert glue.matthews(predicted, labels) == pytest.approx(metrics.matthews_corrcoef(labels, predicted))
    assert glue.f1(predicted, labels) == pytest.approx(metrics.f1_score(labels, predicted))
    assert glue.accuracy(predicted, labels) == pytest.approx(metrics.accuracy_score(labels, predicted))
    scores, guesses = rng.integers(0, 11, 200) / 2, rng.integers(0, 30, 200) / 10  # with ties
    assert glue.pearson(guesses, scores) == pytest.approx(stats.pearsonr(guesses, scores)[0])
    assert glue.spearman(guesses, scores) == pytest.approx(stats.spearmanr(guesses, scores)[0])
    assert glue.matthews(np.zeros(5), np.array([0, 1, 0, 1, 1])) == 0.0
    assert glue.f1(np.zeros(5), np.zeros(5)) == 0.0


def test_a_constant_side_has_no_correlation_though_its_mean_is_rounded():
    assert glue.pearson(np.full(3, 0.1), np.full(3, 3.3)) == 0.0
    assert glue.pearson(np.full(3, 0.1, np.float32), np.array([1.0, 2.0, 4.0])) == 0.0
    assert glue.pearson(np.array([1.0, 2.0, 4.0]), np.full(3, 0.1)) == 0.0


def test_reported_metrics_by_task():
    logits = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    found = glue.glue_metrics(
        "mnli",
        {"dev": logits, "dev_mismatched": logits},
        {"dev": np.array([1, 0]), "dev_mismatched": np.array([1, 2])},
    )
    assert found == {"accuracy": 1.0, "accuracy_mismatched": 0.5}
    scored = glue.glue_metrics("stsb", {"dev": np.array([[1.0], [2.0], [4.0]])}, {"dev": np.array([0.0, 1.0, 5.0])})
    assert scored["spearman"] == pytest.approx(1)


def test_names_go_to_the_datasets_package(monkeypatch):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return [{"premise": "a", "hypothesis": "b", "label": 2}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = glue.load_glue("mnli", None)
    assert [s for _, _, s in asked] == ["train", "validation_matched", "validation_mismatched"]
    assert found["train"].texts == (("a", "b"),)

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(UserError, match=r"no route.*--data-dir"):
        glue.load_glue("cola", None)


def test_the_real_files(real_data):
    sizes = {"cola": (8551, 1043), "rte": (2490, 277), "sst2": (67349, 872)}
    for task, (train, dev) in sizes.items():
        found = glue.load_glue(task, real_data / "glue")
        assert (len(found["train"]), len(found["dev"])) == (train, dev)


def test_a_tab_within_a_sentence_is_refused(tmp_path):
    (tmp_path / "MRPC").mkdir()
    head = HEADS["mrpc"][1]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "MRPC" / name).write_text(f"{head}\n1\t5\t6\ta\twith tab\tb\n")
    with pytest.raises(UserError, match="line 2: 6 columns instead of 5"):
        glue.load_glue("mrpc", tmp_path)


def test_incomplete_rows_of_qqp_are_left_out_and_said(tmp_path):
    """The official file has a few; of another task such a row is an error."""
    (tmp_path / "QQP").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "QQP" / name).write_text("id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t1\n1\tc\n2\td\te\t0\n")
    with pytest.warns(UserWarning, match="1 rows of fewer than 4 columns are left out"):
        found = glue.load_glue("qqp", tmp_path)
    assert found["train"].texts == (("a", "b"), ("d", "e"))
