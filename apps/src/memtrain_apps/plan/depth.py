"""A deep model's step, drawn out exactly from the steps of two shallow ones. No torch here.

Between the first block and the last one all blocks are alike: a model with one block more makes the same tensors in the
same order, and those of a block besides, once in the forward pass and once in the backward pass. So the moments of the
deeper of two steps are those of the shallower one with two runs of moments put in. Where each run repeats what stands
beside it, which shows that one such block follows another as it follows the first, it is repeated as often as blocks
are missing. Bytes grow by the same amount from each repetition to the next, so the largest stand in the first or the
last.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ..compose.axes import Axes, save_words
from .lines import Pass
from .uses import SUMS, Cut, Step

Moment = tuple[int, ...]
"""Bytes in the passes of several batches."""


class Passes:
    """Passes of a step over models of several depths, each counted once."""

    def __init__(self, step: Step, axes: Axes) -> None:
        self._step, self._axes = step, axes
        self._counted: dict[int, dict[int, Pass]] = {}
        self._cuts: dict[int, Cut] = {}

    def counted(self, depth: int, rows: Sequence[int]) -> list[Pass]:
        """Of micro-batches of so many ``rows``, over a model of so many blocks; of 0, of the model as it is.

        Raises:
            UserError: if the combination has no meaning for the model.
        """
        from .step_use import passes_of

        known = self._counted.setdefault(depth, {})
        missing = [n for n in rows if n not in known]
        if missing:
            shape = self._step.shape
            step = replace(self._step, shape=shape.with_depth(depth)) if depth else self._step
            passes, self._cuts[depth] = passes_of(step, self._axes, missing)
            known.update(zip(missing, passes, strict=True))
        return [known[n] for n in rows]

    def shallow(self, rows: Sequence[int]) -> list[Pass]:
        """Over the shallowest model that the whole one is drawn out of."""
        return self.counted(min(self._depths(), default=0), rows)

    def whole(self, rows: Sequence[int]) -> tuple[list[Pass], Cut]:
        """Over the model at its whole depth, drawn out of two shallow ones where they tell it."""
        for low in self._depths():
            more = self._step.shape.depth - low - 1
            found = draw_out(self.counted(low, rows), self.counted(low + 1, rows), more)
            if found is not None:
                return found, draw_out_cut(self._cuts[low], self._cuts[low + 1], more)
        return self.counted(0, rows), self._cuts[0]

    def _depths(self) -> list[int]:
        """Blocks of the shallower of two models. A first or a last block that differs from the others needs two more
        between them."""
        shape = self._step.shape
        uniform = shape.uniform and save_words(self._axes) == self._axes.save
        return [low for low in (2, 3) if uniform and low + 1 < shape.depth]


def draw_out(shallow: Sequence[Pass], deep: Sequence[Pass], more: int) -> list[Pass] | None:
    """Passes of ``more`` blocks above the deeper model; None where the moments do not tell them.

    Args:
        shallow: of several batches.
        deep: of the same batches, with one block more.
        more: blocks.

    Returns:
        Passes with the moments that may be the largest, in the order of the step.
    """
    rises = _stretch([p.rises for p in shallow], [p.rises for p in deep], more)
    besides = _stretch([p.besides for p in shallow], [p.besides for p in deep], more)
    if rises is None or besides is None:
        return None
    drawn = []
    for low, high, up, beside in zip(shallow, deep, rises, besides, strict=True):
        sums = {n: (was := getattr(high.use, n)) + more * (was - getattr(low.use, n)) for n in SUMS}
        drawn.append(Pass(replace(high.use, **sums, peak=max(up), beside=max(beside)), up, beside))
    return drawn


def draw_out_cut(shallow: Cut, deep: Cut, more: int) -> Cut:
    """The same of what FSDP cuts."""
    before = {rows[:2]: rows[2:] for rows in shallow.rows}
    rows = []
    for n_rows, row_bytes, n, gradients in deep.rows:
        was = before.get((n_rows, row_bytes), (0, 0))
        rows.append((n_rows, row_bytes, n + more * (n - was[0]), gradients + more * (gradients - was[1])))
    return replace(deep, rows=tuple(rows))


def _stretch(shallow: Sequence[Sequence[int]], deep: Sequence[Sequence[int]], more: int) -> list[list[int]] | None:
    """Rows of moments, one a batch."""
    if len({len(row) for row in shallow}) > 1 or len({len(row) for row in deep}) > 1:
        return None
    first, last = list(zip(*shallow, strict=True)), list(zip(*deep, strict=True))
    steps = _steps(last)
    runs = _inserted(_steps(first), steps)
    if runs is None:
        return None
    now = tuple(b + more * (b - a) for a, b in zip(first[0], last[0], strict=True))
    out = [now]
    for i, step in enumerate(steps, start=1):
        now = _plus(now, step)
        out.append(now)
        for start, length in runs:
            if i != start + length:
                continue
            run = steps[start:i]
            growth = tuple(map(sum, zip(*run, strict=True)))
            for repetition in dict.fromkeys((0, more - 1)):
                there = _plus(now, growth, repetition)
                for each in run:
                    there = _plus(there, each)
                    out.append(there)
            now = _plus(now, growth, more)
    return [list(row) for row in zip(*out, strict=True)]


def _plus(moment: Moment, step: Moment, times: int = 1) -> Moment:
    return tuple(a + times * b for a, b in zip(moment, step, strict=True))


def _steps(moments: Sequence[Moment]) -> list[Moment]:
    return [tuple(b - a for a, b in zip(one, two, strict=True)) for one, two in pairwise(moments)]


def _inserted(shallow: Sequence[Moment], deep: Sequence[Moment]) -> list[tuple[int, int]] | None:
    """The runs of ``deep`` that ``shallow`` lacks, as (start, length), at most two; None unless there is one way to
    find them, in which the first repeats what is before it and the second what is after it."""
    added = len(deep) - len(shallow)
    if added < 0:
        return None
    front = _common(shallow, deep)
    back = min(_common(shallow[::-1], deep[::-1]), len(shallow) - front)
    end = len(shallow) - back  # what is between the common parts
    found = []
    for length in range(added + 1):
        rest = added - length
        at = end + length  # where the second run starts
        if (
            deep[front - length : front] == deep[front : front + length]
            and length <= front
            and deep[at : at + rest] == deep[at + rest : at + 2 * rest]
            and shallow[front:end] == deep[front + length : at]
        ):
            found.append([(start, n) for start, n in ((front, length), (at, rest)) if n])
    return found[0] if len(found) == 1 else None


def _common(one: Sequence[Moment], two: Sequence[Moment]) -> int:
    """How many are the same at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
