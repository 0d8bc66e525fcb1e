"""The search for learning rates of the studies on real models: it ends, and only where the best is surrounded."""

import math
import random

import pytest


@pytest.fixture
def rates(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import real_rates

    return real_rates


def hill(rng, of, width):
    """A score with one top, somewhere in ten powers of the rate and six of the head's."""
    top = rng.uniform(-6, 1), rng.uniform(-5, 0)

    def score(rates):
        x, y = math.log10(rates.rate) - top[0], math.log10(rates.head) - top[1]
        return of * -(x * x / width + y * y)

    return top, score


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_finds_the_top_of_a_hill(rates, seed, least):
    rng = random.Random(seed)
    top, score = hill(rng, -1 if least else 1, width=rng.uniform(0.3, 3))
    start = rng.randint(-5, -1)
    first = [1 * 10**start, 3 * 10**start, 10 * 10**start][: rng.randint(1, 3)]
    tried = {}
    best = rates.search(first, tried, score, heads=True, least=least)
    assert tried[best] == (min if least else max)(tried.values())
    assert abs(math.log10(best.rate) - top[0]) < 0.27, "half of a step of 1, 3, 10"
    assert abs(math.log10(best.head) - top[1]) <= 0.5, "half of a step of ten"


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_on_any_landscape_and_the_best_has_neighbours_on_all_sides(rates, seed):
    rng, heads = random.Random(seed), bool(seed % 2)
    tried = {}
    best = rates.search([1e-3, 1e-2], tried, lambda _: rng.choice([50.0, 61.2, rng.uniform(60, 80)]), heads, False)
    assert all(tried[best] >= score for score in tried.values())
    beside = [t.rate for t in tried if t.head == best.head]
    assert min(beside) < best.rate < max(beside)
    if heads:
        slower_and_faster = [t.head for t in tried if t.rate == best.rate]
        assert min(slower_and_faster) < best.head < max(slower_and_faster)
    else:
        assert {t.head for t in tried} == {rates.HEAD_RATE}


def test_a_pair_that_served_one_seed_by_luck_is_not_taken(rates):
    lucky, steady, third, poor = (rates.Rates(rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2))
    tried = {poor: 50.0, lucky: 79.0, steady: 77.0, third: 76.0}
    by_seed = {lucky: (51.0, 52.0), steady: (76.0, 75.0), third: (77.0, 73.0)}
    further, asked = {steady: [76.0]}, []

    def score(of, seed):
        asked.append((of, seed))
        return by_seed[of][seed - 1]

    assert rates.confirmed(tried, further, score, least=False) == steady
    assert set(asked) == {(lucky, 1), (lucky, 2), (steady, 2), (third, 1), (third, 2)}
    assert rates.confirmed(tried, further, score, least=False) == steady
    assert len(asked) == 5, "nothing is tried twice"


def test_what_was_tried_is_not_tried_again_and_of_equals_the_first_is_taken(rates):
    tried, asked = {rates.Rates(0.01): 61.2}, []

    def score(of):
        asked.append(of)
        return 61.2

    assert rates.search([0.01, 0.03], tried, score, heads=True, least=False) == rates.Rates(0.01)
    assert rates.Rates(0.01) not in asked
    assert len(asked) == len(set(asked))


def test_rates_are_read_as_they_are_written(rates):
    for pair in (rates.Rates(3e-5), rates.Rates(0.01, 0.1), rates.Rates(1e-4, 1e-4)):
        assert rates.Rates.read(str(pair)) == pair
    assert rates.Rates(0.03).written() == {"learning_rate": 0.03}
    assert rates.Rates(0.03, 0.01).written() == {"learning_rate": 0.03, "head_learning_rate": 0.01}
