"""A step's bytes at any batch, from passes of two batches. No torch here.

A step runs the same operations whatever the number of rows, and each tensor has so many bytes a row, or none. So what
lives after each operation is a line in the rows, whose two numbers two passes tell; a peak is the largest of these
lines, of which mostly two or three are ever the largest. Other passes check it: where one of them lies elsewhere, the
step is no such thing (a method that chooses its form by size), and only the rows that were counted are known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .uses import PEAKS, SUMS, Cut, StepUse

LEAST = 2
"""Units from which the lines hold: of a single row, tensors with a dimension of 1 go ways of their own."""


@dataclass(frozen=True)
class Pass:
    """A counted forward and backward pass."""

    use: StepUse
    rises: Sequence[int]
    """Live bytes after each new tensor; the largest is the peak."""
    besides: Sequence[int]
    """Live bytes without accumulated gradients, after each operation that made one."""


@dataclass(frozen=True)
class StepLaw:
    """A step of any number of rows."""

    unit: int
    """Rows are counted in this many: LTE's heads share them equally."""
    known: Mapping[int, Sequence[int]]
    """Units -> :data:`SUMS` and :data:`PEAKS` of a pass that was counted."""
    lines: Mapping[str, Sequence[Sequence[int]]]
    """Of each of SUMS one line (bytes at no unit, bytes a unit), of each of PEAKS those that are ever the largest;
    empty where the passes do not lie on lines."""
    cut: Cut

    def at(self, rows: int, shards: int = 1) -> StepUse | None:
        """The step of ``rows``; None where only counting tells."""
        units = rows // self.unit
        if units in self.known:
            found = dict(zip((*SUMS, *PEAKS), self.known[units], strict=True))
        elif self.lines and units >= LEAST:
            found = {n: max(base + slope * units for base, slope in lines) for n, lines in self.lines.items()}
        else:
            return None
        return StepUse(**found, **(self.cut.shares(shards) if shards > 1 else {}))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        cut = self.cut
        whole = [cut.rest_weights, cut.rest_gradients, cut.block_weights, cut.block_gradients]
        return {
            "unit": self.unit,
            "known": {str(u): list(v) for u, v in self.known.items()},
            "lines": [[list(line) for line in self.lines[n]] for n in (*SUMS, *PEAKS)] if self.lines else [],
            "cut": [[list(r) for r in cut.rows], *whole],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "StepLaw":
        """What :meth:`to_json` gave."""
        rows, *whole = content["cut"]
        lines = dict(zip((*SUMS, *PEAKS), content["lines"], strict=True)) if content["lines"] else {}
        known = {int(u): v for u, v in content["known"].items()}
        return cls(content["unit"], known, lines, Cut(tuple(tuple(r) for r in rows), *whole))


def values_of(found: Pass) -> tuple[int, ...]:
    """:data:`SUMS` and :data:`PEAKS` of a pass."""
    return tuple(getattr(found.use, n) for n in (*SUMS, *PEAKS))


def fit(passes: Mapping[int, Pass]) -> dict[str, list[tuple[int, int]]]:
    """The lines of :class:`StepLaw` through two passes, by their units; none where any other lies elsewhere."""
    units = sorted(passes)
    columns: dict[str, list[Sequence[int]]] = {n: [(getattr(passes[u].use, n),) for u in units] for n in SUMS}
    columns["peak"] = [passes[u].rises for u in units]
    columns["beside"] = [passes[u].besides for u in units]
    lines = {}
    for name, column in columns.items():
        through = _lines(units, column)
        if through is None:
            return {}
        lines[name] = _largest(through)
    return lines


def _lines(units: Sequence[int], column: Sequence[Sequence[int]]) -> list[tuple[int, int]] | None:
    """(at 0, a unit) of every place of equally long rows; None where a pass does not lie there."""
    low, high = units[:2]
    if len({len(row) for row in column}) > 1:
        return None
    found = set()
    for values in zip(*column, strict=True):
        slope, remainder = divmod(values[1] - values[0], high - low)
        base = values[0] - slope * low
        if remainder or any(base + slope * u != v for u, v in zip(units[2:], values[2:], strict=True)):
            return None
        found.add((base, slope))
    return sorted(found)


def _largest(lines: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that are the largest at some number of units from LEAST on."""
    now = max(lines, key=lambda line: (line[0] + line[1] * LEAST, line[1]))
    found, at = [now], LEAST
    while True:
        steeper = [line for line in lines if line[1] > now[1]]
        if not steeper:
            return found
        # the whole unit from which a steeper line is above, of all the first; of several there the largest
        crossing = lambda line: max(at, (now[0] - line[0]) // (line[1] - now[1]) + 1)  # noqa: B023, E731
        at = min(crossing(line) for line in steeper)
        now = max((line for line in steeper), key=lambda line: (line[0] + line[1] * at, line[1]))
        found.append(now)
