"""Benchmarks that can be compared later: pairwise timing in one process, and results as JSON that name their making.

A machine is noisy, so a single time says little. Two ways of doing the same are timed alternately, and what is
reported is the ratio of each neighbouring pair, with its spread.
"""

import datetime
import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import device_name, git_commit, versions


@dataclass(frozen=True)
class Ratio:
    """Time of one way over that of another, from pairs that were timed one right after the other."""

    median: float
    low: float
    """First quartile of the pairs' ratios."""
    high: float
    """Third quartile."""
    pairs: int
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.3f} (quartiles {self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"


def pairwise(
    way: Callable[[], Any],
    other: Callable[[], Any],
    *,
    pairs: int,
    warmup: int = 2,
    settle: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time ``way`` against ``other`` alternately, the order swapped from pair to pair; ``clock`` counts seconds.

    With ``settle`` each runs once untimed before it is timed: what a call costs among its like, as a step in a training
    run, and not in the heap and the caches that the other one has left.
    """
    for _ in range(warmup):
        way()
        other()
    ratios = []
    for i in range(pairs):
        first, second = (way, other) if i % 2 == 0 else (other, way)
        a, b = (_seconds(call, clock, settle) for call in (first, second))
        ratios.append(a / b if i % 2 == 0 else b / a)
    return ratio_of(ratios)


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """Median and quartiles of ratios that were measured elsewhere."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, len(ratios), min(ratios), max(ratios))


def _seconds(call: Callable[[], Any], clock: Callable[[], float], settle: bool) -> float:
    if settle:
        call()
    began = clock()
    call()
    return clock() - began


def write_results(path: Path, *, argv: Sequence[str], device: Any, seeds: Sequence[int], **content: Any) -> None:
    """Write a committed result: the command, date, device, versions and seeds, then ``content``."""
    head = {
        "command": shlex.join(argv),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(device),
        "versions": versions(),
        "git_commit": git_commit(),
        "seeds": list(seeds),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **content}, indent=2) + "\n")
