"""The lines at a run's end that every command has: what was trained, peaks, speed, joules; ledgers side by side."""

from collections.abc import Mapping

from torch import nn

from ..console import format_bytes, format_count, format_seconds, format_table
from ..measuring.memory import CATEGORIES, Ledger
from ..training.loop import FitResult


def run_facts(model: nn.Module, result: FitResult, unit: str = "samples") -> str:
    """Four lines about a finished run."""
    parameters = list(model.parameters())
    trained, total = (sum(p.numel() for p in ps) for ps in ([p for p in parameters if p.requires_grad], parameters))
    peaks = [f"{phase} {'unavailable' if n is None else format_bytes(n)}" for phase, n in result.peak_bytes.items()]
    joules = "unavailable" if result.joules is None else f"{result.joules:.0f} J ({result.energy_source})"
    facts = [
        ("trained", f"{trained:,} of {total:,} parameters"),
        ("peak memory", ", ".join(peaks)),
        ("speed", f"{format_count(result.units_per_second)} {unit}/s, {format_seconds(result.seconds)} of training"),
        ("energy", joules),
    ]
    return "\n".join(f"  {name:12} {value}" for name, value in facts)


def ledger_table(ledgers: Mapping[str, Ledger]) -> str:
    """Bytes of each category, a column a ledger; with two, how often the second goes into the first."""
    pairs = list(ledgers.values()) if len(ledgers) == 2 else []

    def row(name: str, values: list[int]) -> list[str]:
        times = [f"{values[0] / values[1]:.1f}×" if values[1] else "–"] if pairs and any(values) else []
        return [name, *map(format_bytes, values), *times]

    rows = [["", *ledgers]]
    rows += [row(c, [ledger.total(c) for ledger in ledgers.values()]) for c in CATEGORIES]
    rows.append(row("total", [sum(ledger.totals.values()) for ledger in ledgers.values()]))
    return format_table(rows)
