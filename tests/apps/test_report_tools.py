"""What the report offers besides figures: pairs with the baseline, a choice in less memory, sorting, filters, CSV."""

import csv
import io
import random
import re
import statistics
from urllib.parse import unquote

import pytest
from ablation_results import CONFIG, MIB, page, result
from memtrain_apps.ablate.comparing import baseline_of, choices, orders, paired, paired_text
from memtrain_apps.ablate.report import render
from memtrain_apps.ablate.results import CATEGORIES, summarise


def test_pairs_are_of_the_same_seed_and_narrower_than_scores():
    """Seeds move both arms alike: the differences hardly vary."""
    rng = random.Random(1)
    luck = [rng.uniform(-0.2, 0.2) for _ in range(3)]
    noise = [0.001, -0.002, 0.0005]
    base = [result("full", seed=i, test=0.7 + x, memory=32 * MIB) for i, x in enumerate(luck)]
    other = [result("lora", seed=i, test=0.66 + x + e) for i, (x, e) in enumerate(zip(luck, noise, strict=True))]
    found = summarise([*base, *other])
    baseline = baseline_of(found)
    assert baseline.label == "full · all · adamw"
    s = next(s for s in found if s is not baseline)
    pair = paired(s, baseline)
    differences = [-0.04 + e for e in noise]
    assert pair.mean == pytest.approx(statistics.fmean(differences))
    assert pair.half == pytest.approx(4.303 * statistics.stdev(differences) / 3**0.5, rel=1e-3)
    assert pair.tells_apart
    assert pair.half < 0.1 * s.interval[1]
    assert paired_text(s, baseline) == f"−4.0 ± {100 * pair.half:.1f} points"
    assert paired_text(baseline, baseline) == "baseline"


def test_only_common_seeds_are_paired_and_one_pair_tells_nothing():
    found = summarise([
        result("full", seed=0, test=0.9), result("full", seed=1, test=0.5), result("lora", seed=1, test=0.6),
        result("lora", seed=2, test=0.1), result("head", seed=5, test=0.6),
    ])  # fmt: skip
    by_train = {s.axes["train"]: s for s in found}
    pair = paired(by_train["lora"], by_train["full"])
    assert (pair.pairs, pair.mean) == (1, pytest.approx(0.1))
    assert not pair.tells_apart
    assert paired_text(by_train["lora"], by_train["full"]) == "+10.0 points"
    assert paired(by_train["head"], by_train["full"]) is None
    assert paired_text(by_train["head"], by_train["full"]) == "no common seed"


def test_without_plain_training_the_best_is_the_baseline():
    found = summarise([result("head", test=0.6), result("lora", test=0.8), result("bitfit", test=0.7)])
    assert baseline_of(found).axes["train"] == "lora"
    assert baseline_of([]) is None


def test_the_choice_at_half_and_at_a_quarter_of_the_memory():
    """By brute force over random results."""
    rng = random.Random(4)
    trains = ["head", "bitfit", "lora", "melo", "lora-xs", "lte"]
    for _ in range(20):
        records = [result("full", test=0.9, memory=64 * MIB)]
        records += [result(t, test=rng.random(), memory=rng.randrange(12, 70) * MIB) for t in trains]
        found = summarise(records)
        for part, line in zip((2, 4), choices(found, baseline_of(found)), strict=True):
            within = [r for r in records if sum(r["measured"].values()) <= 64 * MIB / part]
            if not within:
                assert "nothing here trains" in line
                continue
            best = max(within, key=lambda r: r["test"])
            assert f"{best['axes']['train']} · all · adamw: accuracy {100 * best['test']:.1f} %" in line
            assert "do not tell from none" in line  # one seed


def test_orders_are_those_of_the_columns():
    found = [s for s in summarise(page()) if s.runs]
    for way, key in (("memory", lambda s: s.memory_bytes), ("score", lambda s: -s.score), ("name", lambda s: s.label)):
        places = orders(found)[way]
        assert sorted(found, key=lambda s: places[s.number]) == sorted(found, key=key)
        assert sorted(places.values()) == list(range(len(found)))


def test_sorting_and_filters_need_neither_script_nor_network():
    text = render(summarise(page()), CONFIG)
    assert "<script" not in text
    assert not re.search(r"\son\w+=", text)
    for way in ("score", "memory", "time", "trained", "name"):
        assert f'id="sort-{way}"' in text
        assert f":root:has(#sort-{way}:checked)" in text
    # every choice that occurs has a box, and a rule that hides its rows, marks and bars
    for choice in ("full", "lora", "lte", "head", "bitfit", "all", "backrazor"):
        assert f'id="show-{choice}" checked' in text
        assert f".is-{choice} {{ display: none" in text
    assert 'id="show-adamw"' not in text  # all have it
    assert len(re.findall(r'<tr class="is-lora is-backrazor is-adamw" style="--score:', text)) == 1
    assert len(re.findall(r'<div class="row is-lora is-backrazor', text)) == 2  # ledger, time


def test_points_name_their_arm_on_hover_and_focus():
    text = render(summarise(page()), CONFIG)
    named = re.findall(r'<g class="arm is-\S+ is-\S+ is-\S+" tabindex="0" role="img" aria-label="([^"]+)">', text)
    assert len(named) == 4  # two combinations, for wide and for narrow screens
    assert all(re.fullmatch(r"\d (full|lora) · \S+ · adamw: accuracy .* %, \d+\.\d MiB", n) for n in named)
    assert ".arm:hover .tip, .arm:focus .tip { display: block; }" in text


def test_the_csv_is_every_arm_unrounded():
    records = page()
    (link,) = re.findall(
        r'download="ablation.csv" href="data:text/csv;charset=utf-8,([^"]+)"', render(summarise(records), CONFIG)
    )
    rows = list(csv.DictReader(io.StringIO(unquote(link))))
    assert len(rows) == len(records)
    by_name = {r["name"]: r for r in records}
    for row in rows:
        record = by_name[row["arm"]]
        assert (row["train"], row["status"], int(row["seed"])) == (
            record["axes"]["train"],
            record["status"],
            record["seed"],
        )
        assert float(row["test"]) == record["test"]
        assert [int(row[f"measured {c} bytes"]) for c in CATEGORIES] == list(record["measured"].values())
        assert row["command"] == record["command"]
