"""Documents cut into pieces of about equal length, each part with its split: the unit of ``lte-prepare``'s work.

What the pieces are depends on nothing but the documents and the :class:`Cutting`, so a later process counts the same.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from .documents import Source

PIECE = 2**20  # characters
# Between a line and the next where no other white space is: GPT-2's pattern never joins the two, so the tokens of the
# whole are those of the parts.
_SEAM = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class Part:
    split: str
    text: str
    ends_document: bool


@dataclass(frozen=True)
class Piece:
    parts: list[Part]
    position: int
    """How far the sources are read behind it, in the unit of their sizes."""


@dataclass
class Cutting:
    """How documents become pieces. ``documents`` and ``skipped`` count while :meth:`pieces` runs."""

    sources: tuple[Source, ...]
    val_fraction: float
    separator: str
    single: bool
    """One text, in each split that files are named after: to divide it, its end is for validation, not one in so many
    documents."""
    documents: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)
    """Rows without text."""

    @property
    def size(self) -> int:
        return sum(s.size for s in self.sources)

    @property
    def divides(self) -> bool:
        """Whether validation is taken from what else would be trained on."""
        return all(s.split != "val" for s in self.sources)

    def pieces(self) -> Iterator[Piece]:
        parts: list[Part] = []
        length = position = 0
        for split, text, position in self._documents():
            start = 0
            while start < len(text):
                end = self._end(text, start, PIECE - length)
                parts.append(Part(split, text[start:end], ends_document=end == len(text)))
                length += end - start
                start = end
                if length >= PIECE:
                    yield Piece(parts, position)
                    parts, length = [], 0
        if parts:
            yield Piece(parts, position)

    def _end(self, text: str, start: int, room: int) -> int:
        """Where the part that begins at ``start`` ends: at the first seam behind ``room`` characters, or at the end."""
        if len(text) - start <= max(room, PIECE // 2):  # a little too long is better than a part of a few characters
            return len(text)
        seam = _SEAM.search(text, start + room)
        return seam.start() if seam else len(text)

    def _documents(self) -> Iterator[tuple[str, str, int]]:
        """(split, text with its newline, position) of each document that has text."""
        self.documents = self.skipped = 0
        before = divided = 0
        end = "\n" if self.separator == "newline" else ""
        for source in self.sources:
            for text, position in source.documents():
                if text is None:
                    self.skipped += 1
                    continue
                self.documents += 1
                divides = self.divides and source.split in (None, "train")
                if self.single and divides:
                    cut = int(len(text) * (1 - self.val_fraction))
                    yield from ((s, t, before + position) for s, t in (("train", text[:cut]), ("val", text[cut:])) if t)
                elif divides:
                    yield "val" if self._held_out(divided) else "train", text + end, before + position
                    divided += 1
                else:
                    yield source.split or "train", text + end, before + position
            before += source.size

    def _held_out(self, i: int) -> bool:
        """Whether document i is for validation: number 1, and on at equal distances."""
        share = Fraction(self.val_fraction).limit_denominator(10**6)
        return math.floor((i - 1) * share) > math.floor((i - 2) * share)
