"""The report from made-up results: numbers by hand, the Pareto front by brute force, labels that keep clear."""

import itertools
import random
import re
import statistics
import xml.etree.ElementTree as ElementTree

import pytest
from ablation_results import CONFIG, MIB, page, result
from memtrain_apps.ablate.charts import Box, byte_ticks, place_labels, text_width, ticks
from memtrain_apps.ablate.report import render
from memtrain_apps.ablate.results import CATEGORIES, summarise


def test_mean_and_interval_over_seeds_are_students():
    values = [0.90, 0.94, 0.92]
    (s,) = summarise([result("full", seed=i, test=v) for i, v in enumerate(values)])
    half = 4.303 * statistics.stdev(values) / 3**0.5
    assert s.interval == pytest.approx((0.92, half), rel=1e-3)
    assert s.score_text == f"92.0 ± {100 * half:.1f} %"
    (alone,) = summarise([result("full")])
    assert alone.score_text == "90.0 %"


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_front_is_what_nothing_else_beats(metric):
    rng = random.Random(3)
    trains = ["full", "head", "bitfit", "lora", "melo", "lora-xs", "lte"]
    records = [
        result(t, s, test=rng.choice([0.5, 0.6, 0.7, 0.8, 0.9]), memory=rng.randrange(1, 9) * MIB, metric=metric)
        for t in trains
        for s in ("all", "backrazor", "checkpoint")
    ]
    found = summarise(records)
    sign = 1 if metric == "accuracy" else -1
    points = [(-s.memory_bytes, sign * s.score) for s in found]
    for s, p in zip(found, points, strict=True):
        beaten = any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
        assert s.on_front is not beaten
    assert [s.number for s in found] == list(range(1, len(found) + 1))
    assert [s.memory_bytes for s in found] == sorted(s.memory_bytes for s in found)
    best = min(found, key=lambda s: s.rank)
    assert sign * best.score == max(sign * s.score for s in found)


def test_errors_of_predictions_by_category():
    record = result("full")
    record["predicted"] = {**record["predicted"], "activations": round(record["measured"]["activations"] * 1.02)}
    (s,) = summarise([record])
    assert s.error_of("activations") == pytest.approx(0.02, rel=1e-3)
    assert s.prediction_error == pytest.approx(0.01, rel=1e-3)
    assert s.error_of("buffers") is None
    assert "+2.00 %" in render([s], CONFIG)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.98), (-3, 470), (1e-4, 2.1e-4), (12, 12.5)])
@pytest.mark.parametrize("most", [3, 5, 7])
def test_ticks_are_round_inside_and_few(low, high, most):
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    gaps = {round(b - a, 12) for a, b in itertools.pairwise(found)}
    assert len(gaps) <= 1
    assert all(re.fullmatch(r"[125]0*", f"{gap:.0e}".split("e")[0]) for gap in gaps), gaps


def test_ticks_of_bytes_are_round_in_their_unit():
    assert byte_ticks(0, 40 * MIB, 5, log=False) == [i * 10 * MIB for i in range(5)]
    assert byte_ticks(3 * MIB, 70 * MIB, 9, log=True) == [2**i * MIB for i in range(2, 7)]


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_points_cover_neither_each_other_nor_a_mark(seed):
    rng = random.Random(seed)
    inside = Box(40, 30, 900, 420)
    anchors = [(rng.uniform(80, 900), rng.uniform(60, 420)) for _ in range(16)]
    placed = place_labels(anchors, [[f"{i} lora, rank 8 · all · adamw", str(i)] for i in range(16)], inside)
    for (a, text), (b, _) in itertools.combinations(placed, 2):
        assert a.overlap(b) == 0, text
    for box, text in placed:
        assert box.within(inside)
        assert box.width >= text_width(text)
        assert all(box.overlap(Box(x - 5, y - 5, 10, 10)) == 0 for x, y in anchors)


def test_the_page_is_one_file_with_every_figure_and_every_arm():
    text = render(summarise(page()), {**CONFIG, "config": {"pretrain": {"epochs": 2, "labels": [0, 1]}}})
    assert not re.search(r"<script|@import|<link(?! rel=\"icon\" href=\"data:,\")|https?://|url\(", text)
    drawings = [ElementTree.fromstring(d.replace("&nbsp;", " ")) for d in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    figures = [d for d in drawings if d.get("role") in ("img", "group")]
    assert len(figures) == 4  # the scatter for wide and for narrow screens, and a panel for each train with curves
    for figure in figures:
        assert figure.find("title").text
        assert figure.find("desc").text
    marks = [sum("mark" in (e.get("class") or "").split() for e in f.iter()) for f in figures[:2]]
    assert marks == [2, 2]
    for record in page():
        assert record["command"] in text
    assert "finetune --tracker none --epochs 2 --labels 0 1" in text  # the run before all arms
    assert "you tried to allocate &lt;b&gt;9&lt;/b&gt; bytes" in text
    assert "limit 4.0 MiB; predicted peak of a step 9.0 MiB" in text
    for words in ("Out of memory", "Refused", "Diverged", "Energy is unavailable", "96.0 ± 2.5 %"):
        assert words in text
    assert "nan" not in text
    assert set(re.findall(r'class="block c-(\w+)"', text)) == set(CATEGORIES)


def test_a_page_without_any_trained_arm_says_what_became_of_them():
    text = render(summarise([r for r in page() if r["status"] != "done"]), {})
    assert "Out of memory" in text
    assert "Accuracy against memory" not in text


def test_joules_are_shown_where_a_counter_told_them():
    record = result("full", joules=123.4, energy_source="NVML gpu 0", device="cuda:0", peak_bytes={"training": 9 * MIB})
    text = render(summarise([record]), CONFIG)
    assert "123 J" in text
    assert "NVML gpu 0" in text
    assert "CUDA peak" in text
    assert "Energy is unavailable" not in text
