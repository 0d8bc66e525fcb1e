"""What arms tell while they run, and what their results say together: over seeds, with the Pareto front."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from memtrain_common.errors import UserError
from memtrain_common.files import parse_json, read_json
from memtrain_common.measuring.intervals import mean_and_ci

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "buffers")
LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass
class Summary:
    """The arms of one combination."""

    number: int
    """From 1; the same in every figure."""
    results: list[dict[str, Any]]
    """All seeds', by seed."""
    on_front: bool = field(default=False)
    """No other combination has less memory and a better score."""
    rank: int = 0
    """0 is the best score."""

    @property
    def first(self) -> dict[str, Any]:
        return self.results[0]

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """Those that were trained to their end."""
        return [r for r in self.results if r["status"] == "done"]

    @property
    def axes(self) -> dict[str, str]:
        return self.first["axes"]

    @cached_property
    def label(self) -> str:
        """ "lora, rank 8 · backrazor, keep 0.1 · adamw"."""
        from ..compose.axes import USED_BY

        parts = []
        for axis, choice in self.axes.items():
            own = [f"{n.replace('_', ' ')} {v}" for n, v in self.first["settings"].items() if USED_BY[n][0] == axis]
            parts.append(", ".join([choice, *own]))
        rate = self.first["combination"].rpartition("+lr")[2] if "+lr" in self.first["combination"] else ""
        return " · ".join(parts) + (f" · lr {rate}" if rate else "")

    # -- over seeds; only for combinations with runs

    @property
    def metric(self) -> str:
        return self.runs[0]["metric"]

    @cached_property
    def scores(self) -> list[float]:
        """On the test split; on the validation split where there is no other."""
        return [r.get("test", r["val"]) for r in self.runs]

    @cached_property
    def score(self) -> float:
        return self.interval[0]

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Mean over seeds, and half of its 95 % confidence interval; the half is 0 for a single seed."""
        return mean_and_ci(self.scores)

    @property
    def score_text(self) -> str:
        mean, half = self.interval
        one = len(self.scores) == 1
        if self.metric == "accuracy":
            return f"{100 * mean:.1f} %" if one else f"{100 * mean:.1f} ± {100 * half:.1f} %"
        return f"{mean:.4g}" if one else f"{mean:.4g} ± {half:.2g}"

    def mean(self, key: str) -> float | None:
        """Of a number over seeds; None where a run does not know it."""
        values = [r[key] for r in self.runs if r.get(key) is not None]
        return statistics.fmean(values) if values and len(values) == len(self.runs) else None

    @cached_property
    def measured(self) -> dict[str, float]:
        """Bytes by category."""
        return {c: statistics.fmean(r["measured"][c] for r in self.runs) for c in CATEGORIES}

    @cached_property
    def predicted(self) -> dict[str, float] | None:
        """Bytes by category; known even of arms that ran out of memory."""
        known = [r["predicted"] for r in self.results if r.get("predicted")]
        return {c: statistics.fmean(p[c] for p in known) for c in CATEGORIES} if known else None

    @property
    def memory_bytes(self) -> float:
        """The measured ledger's sum."""
        return sum(self.measured.values())

    @property
    def prediction_error(self) -> float:
        """(predicted − measured) / measured, of the sum."""
        return sum((self.predicted or self.measured).values()) / self.memory_bytes - 1

    def error_of(self, category: str) -> float | None:
        """The same of one category; None where nothing was measured and nothing predicted."""
        measured, predicted = self.measured[category], (self.predicted or self.measured)[category]
        if not measured:
            return None if not predicted else math.inf
        return predicted / measured - 1

    @property
    def trained(self) -> int:
        return self.runs[0]["trained_parameters"]

    @property
    def seconds(self) -> float:
        return statistics.fmean(r["seconds"] for r in self.runs)

    @property
    def rate(self) -> tuple[float, str]:
        """Mean of samples or tokens a second, and which."""
        key = next(k for k in self.runs[0] if k.endswith("_per_second"))
        return statistics.fmean(r[key] for r in self.runs), key.removesuffix("_per_second")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every arm's result in an ablation's folder.

    Raises:
        UserError: if there are none.
    """
    paths = sorted((folder / "results").glob("*.json"))
    if not paths:
        raise UserError(f"{folder} holds no results of an ablation: --report needs a folder that ablate made")
    return [read_arm(p) for p in paths]


STATUSES = ("done", "refused", "diverged", "out of memory", "killed", "failed")


def read_arm(path: Path) -> dict[str, Any]:
    """One arm's result, with everything that the table and the report need.

    Raises:
        UserError: naming the file, if it is damaged.
    """
    try:
        record = read_json(path)
        wrong = _wrong(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
    if wrong:
        raise UserError(f"{path} is not an arm's result ({wrong}): remove it, and run the arm by ablate --resume")
    return record


def _wrong(record: dict[str, Any]) -> str:
    """What does not hold of a result; empty where all does."""
    from ..compose.axes import OPTIM, SAVE, TRAIN, USED_BY

    texts = [record[k] for k in ("name", "combination", "command")]
    if not all(isinstance(t, str) for t in texts) or not isinstance(record["seed"], int):
        return "name, combination and command are texts, seed is a number"
    for axis, choices in {"train": TRAIN, "save": SAVE, "optim": OPTIM}.items():
        if record["axes"][axis] not in choices:
            return f"its {axis} is {record['axes'][axis]!r}"
    if set(record["axes"]) != {"train", "save", "optim"}:
        return "it has other axes than train, save and optim"
    unknown = next((n for n in record["settings"] if n not in USED_BY), None)
    if unknown is not None:
        return f"its settings have {unknown!r}"
    if record["status"] not in STATUSES:
        return f"its status is {record['status']!r}"
    ledgers = [record["predicted"]] if record.get("predicted") else []
    if record["status"] == "done":
        numbers = {k: record[k] for k in ("val", "test", "seconds", "trained_parameters") if k in record or k != "test"}
        odd = next((k for k, v in numbers.items() if not _is_number(v)), None)
        if odd is not None:
            return f"its {odd} is {numbers[odd]!r}"
        if not isinstance(record["metric"], str):
            return "its metric is no text"
        ledgers.append(record["measured"])
    if not all(_is_number(ledger[c]) for ledger in ledgers for c in CATEGORIES):
        return "a ledger holds something else than numbers"
    for row in record.get("curve", []):
        if not _is_number(row["step"]) or not _is_number(row.get("loss") or 0):
            return "its curve holds something else than numbers"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def summarise(results: Sequence[dict[str, Any]]) -> list[Summary]:
    """By combination: those with runs by memory, then the rest; numbered, ranked, with the Pareto front marked."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: (r["combination"], r["seed"])):
        groups.setdefault(result["combination"], []).append(result)
    found = [Summary(0, group) for group in groups.values()]
    trained = sorted((s for s in found if s.runs), key=lambda s: (s.memory_bytes, s.first["combination"]))
    found = [*trained, *(s for s in found if not s.runs)]
    for number, summary in enumerate(found, start=1):
        summary.number = number
    better = -1 if trained and trained[0].metric in LOWER_IS_BETTER else 1
    for rank, summary in enumerate(sorted(trained, key=lambda s: (-better * s.score, s.memory_bytes))):
        summary.rank = rank
    for s in trained:
        s.on_front = not any(
            (o.memory_bytes <= s.memory_bytes and better * o.score >= better * s.score)
            and (o.memory_bytes < s.memory_bytes or better * o.score > better * s.score)
            for o in trained
        )
    return found


def curve(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that a loss curve needs."""
    keep = ("step", "split", "loss", "accuracy", "seconds")
    rows = []
    path = folder / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = parse_json(line)
            rows.append({k: row[k] for k in keep if k in row})
        except (ValueError, TypeError):  # a kill cut it short
            continue
    return rows


def last_step(folder: Path) -> str:
    """Where a running arm is, for the progress bar."""
    rows = [r for r in curve(folder) if r["split"] == "train"]
    return f"step {rows[-1]['step']}" if rows else "begins"
