"""Labels of a figure that keep clear of each other and of its points."""

from collections.abc import Sequence
from dataclasses import dataclass

FONT = 13
"""Pixels, in every figure: a figure is drawn for the width at which it is shown."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: "Box") -> float:
        """Square pixels that both cover."""
        w = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        h = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(w, 0.0) * max(h, 0.0)

    def within(self, other: "Box") -> bool:
        return (
            self.x >= other.x
            and self.y >= other.y
            and self.x + self.width <= other.x + other.width
            and self.y + self.height <= other.y + other.height
        )


def text_width(text: str, size: float = FONT) -> float:
    """Pixels that a text takes at most, in a common sans serif."""
    return len(text) * size * 0.58


def place_labels(
    anchors: Sequence[tuple[float, float]],
    texts: Sequence[Sequence[str]],
    inside: Box,
    *,
    taken: Sequence[Box] = (),
) -> list[tuple[Box, str]]:
    """A box and a text for each anchor that cover no other box, mark or ``taken``, where there is such a place.

    Args:
        texts: for each anchor, the texts to try, the most telling first; the last one is taken anyway, where it
            covers least.
    """
    marks = [Box(x - 7, y - 7, 14, 14) for x, y in anchors]
    placed: list[tuple[Box, str]] = []
    for (x, y), choices in zip(anchors, texts, strict=True):
        best: tuple[float, Box, str] | None = None
        for text in choices:
            for box in _places(x, y, text_width(text) + 4, FONT + 4):
                covered = sum(box.overlap(b) for b in (*marks, *taken, *(b for b, _ in placed)))
                cost = covered + (0 if box.within(inside) else 1e6)
                if best is None or cost < best[0] - 1e-9:
                    best = (cost, box, text)
            if best is not None and best[0] == 0:
                break
        assert best is not None
        placed.append(best[1:])
    return placed


def _places(x: float, y: float, width: float, height: float) -> list[Box]:
    """Around a mark, the near places first: right, left, above, below, and the corners."""
    out = []
    for away in (9, 16, 26, 38, 54, 72):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7)):
            cx, cy = x + dx * away, y + dy * away
            left = cx if dx > 0 else cx - width if dx < 0 else cx - width / 2
            top = cy if dy > 0 and dx == 0 else cy - height if dy < 0 and dx == 0 else cy - height / 2
            out.append(Box(left, top, width, height))
    return out
