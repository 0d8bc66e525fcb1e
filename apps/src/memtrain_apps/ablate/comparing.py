"""What a report says beside each combination's own numbers: pairs with a baseline, a choice in less memory, CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from memtrain_common.console import format_bytes
from memtrain_common.measuring.intervals import mean_and_ci

from .results import CATEGORIES, Summary

PLAIN = ["full", "all", "adamw"]


@dataclass(frozen=True)
class Paired:
    """Differences of score from the baseline's run of the same seed. What a seed does to both drops out, so that their
    interval is mostly narrower than that of either score."""

    mean: float
    half: float
    """Half of the 95 % confidence interval (Student's t over seeds); 0 of a single pair."""
    pairs: int

    @property
    def tells_apart(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.pairs > 1 and abs(self.mean) > self.half


def baseline_of(trained: Sequence[Summary]) -> Summary | None:
    """Full training with everything saved, by AdamW, if it was trained; otherwise the best."""
    plain = [s for s in trained if list(s.axes.values()) == PLAIN]
    return min(plain or trained, key=lambda s: s.rank, default=None)


def paired(s: Summary, baseline: Summary) -> Paired | None:
    """None where no seed was trained to its end by both."""
    there = dict(zip((r["seed"] for r in baseline.runs), baseline.scores, strict=True))
    differences = [
        v - there[r["seed"]] for r, v in zip(s.runs, s.scores, strict=True) if r["seed"] in there
    ]  # fmt: skip
    return Paired(*mean_and_ci(differences), len(differences)) if differences else None


def paired_text(s: Summary, baseline: Summary) -> str:
    """ "−4.7 ± 1.9 points"; "baseline" of itself."""
    if s is baseline:
        return "baseline"
    found = paired(s, baseline)
    if found is None:
        return "no common seed"
    if s.metric == "accuracy":
        text, half, unit = f"{100 * found.mean:+.1f}", f"{100 * found.half:.1f}", " points"
    else:
        text, half, unit = f"{found.mean:+.3g}", f"{found.half:.2g}", ""
    return text.replace("-", "−") + (f" ± {half}" if found.pairs > 1 else "") + unit


def choices(trained: Sequence[Summary], baseline: Summary) -> list[str]:
    """What one would choose at half and at a quarter of the baseline's memory: the best score within it."""
    lines = []
    for part, words in ((2, "half"), (4, "a quarter")):
        limit = baseline.memory_bytes / part
        within = [s for s in trained if s.memory_bytes <= limit]
        head = f"At {words} of the memory of {baseline.number} {baseline.label} ({format_bytes(limit)})"
        if not within:
            lines.append(f"{head} nothing here trains.")
            continue
        best = min(within, key=lambda s: s.rank)
        found = paired(best, baseline)
        doubt = "" if found is None or found.tells_apart else ", a difference that these seeds do not tell from none"
        lines.append(
            f"{head} choose {best.number} {best.label}: {best.metric} {best.score_text} in "
            f"{format_bytes(best.memory_bytes)}, {paired_text(best, baseline)} from the baseline{doubt}."
        )
    return lines


def orders(trained: Sequence[Summary]) -> dict[str, dict[int, int]]:
    """Way of sorting -> a combination's number -> its place."""
    ways: dict[str, Any] = {
        "score": lambda s: s.rank,
        "memory": lambda s: s.memory_bytes,
        "time": lambda s: s.seconds,
        "trained": lambda s: -s.trained,
        "name": lambda s: s.label,
    }
    return {
        way: {s.number: place for place, s in enumerate(sorted(trained, key=lambda s: (key(s), s.number)))}
        for way, key in ways.items()
    }


def used(found: Sequence[Summary], axis: str, values: Sequence[str]) -> list[str]:
    """The choices of an axis that a report can be filtered by: those that occur, if there are two."""
    there = [v for v in values if any(s.axes[axis] == v for s in found)]
    return there if len(there) > 1 else []


def csv_link(found: Sequence[Summary]) -> str:
    """A data link to a table of every arm: bytes as numbers, nothing rounded."""
    out = io.StringIO()
    table = csv.writer(out)
    measured, predicted = ([f"{kind} {c} bytes" for c in CATEGORIES] for kind in ("measured", "predicted"))
    table.writerow([
        "number", "arm", "train", "save", "optim", "seed", "status", "metric", "val", "test", "trained parameters",
        "seconds", "joules", *measured, *predicted, "command",
    ])  # fmt: skip
    for s in found:
        for r in s.results:
            ledgers = [(r.get(kind) or {}).get(c, "") for kind in ("measured", "predicted") for c in CATEGORIES]
            plain = [
                r.get(k, "") for k in ("status", "metric", "val", "test", "trained_parameters", "seconds", "joules")
            ]
            table.writerow([s.number, r["name"], *s.axes.values(), r["seed"], *plain, *ledgers, r["command"]])
    return "data:text/csv;charset=utf-8," + quote(out.getvalue())
