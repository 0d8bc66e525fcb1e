"""The lines at a run's end that every command has: what was trained, peaks, speed, joules; ledgers side by side."""

from collections.abc import Mapping

from torch import nn

from ..console import format_bytes, format_count, format_seconds, format_table
from ..measuring.memory import CATEGORIES, Ledger
from ..training.loop import FitResult


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained numbers, and all of them."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def run_facts(
    numbers: tuple[int, int],
    result: FitResult,
    unit: str = "samples",
    own: Mapping[str, str] | None = None,
    *,
    whole_process: bool = False,
) -> str:
    """The lines about a finished run.

    Args:
        numbers: trained and all parameters.
        own: the command's lines, by name; one of a name that is here anyway takes its place.
        whole_process: peaks are not those of tensors alone, but of everything that the process holds.
    """
    peaks = [f"{phase} {'unavailable' if n is None else format_bytes(n)}" for phase, n in result.peak_bytes.items()]
    facts = {
        "trained": f"{numbers[0]:,} of {numbers[1]:,} parameters",
        "peak memory": ", ".join(peaks) + (" (the whole process)" if whole_process else ""),
        "speed": f"{format_count(result.units_per_second)} {unit}/s, {format_seconds(result.seconds)} of training",
        "energy": "unavailable" if result.joules is None else f"{result.joules:.0f} J ({result.energy_source})",
    }
    if result.skipped_steps:
        facts["skipped"] = f"{result.skipped_steps:,} of {result.step:,} steps, because a gradient was NaN or Inf"
    return "\n".join(f"  {name:12} {value}" for name, value in (facts | dict(own or {})).items())


def ledger_table(ledgers: Mapping[str, Ledger], *, times: bool = True) -> str:
    """Bytes of each category, a column a ledger; with two, how often the second goes into the first, if wanted."""
    pairs = list(ledgers.values()) if len(ledgers) == 2 and times else []

    def row(name: str, values: list[int]) -> list[str]:
        ratio = [f"{values[0] / values[1]:.1f}×" if values[1] else "–"] if pairs and any(values) else []
        return [name, *map(format_bytes, values), *ratio]

    rows = [["", *ledgers]]
    rows += [row(c, [ledger.total(c) for ledger in ledgers.values()]) for c in CATEGORIES]
    rows.append(row("total", [sum(ledger.totals.values()) for ledger in ledgers.values()]))
    return format_table(rows)
