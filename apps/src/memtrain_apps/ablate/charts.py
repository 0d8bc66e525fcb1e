"""Figures as inline SVG: scales, ticks, labels that keep clear of each other. Colours are the page's CSS classes."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .labels import FONT, Box, place_labels, text_width


@dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        f = math.log if self.log else float
        span = f(self.high) - f(self.low)
        return self.start + (f(value) - f(self.low)) / (span or 1.0) * (self.end - self.start)


@dataclass(frozen=True)
class Point:
    """One mark of a scatter."""

    x: float
    y: float
    half: float
    """Half of y's confidence interval; 0 draws none."""
    number: int
    label: str
    shape: str
    """circle, square, triangle or diamond."""
    css: str
    on_front: bool
    title: str
    """What is shown while the pointer or the keyboard's focus is on it."""
    group: str = ""
    """Classes of all that belongs to it, by which a page may hide it."""


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten, at most ``most``."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    while span / step + 1 > most:
        lead = round(step / 10 ** math.floor(math.log10(step) + 1e-9))
        step *= 2.5 if lead == 2 else 2
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def byte_ticks(low: float, high: float, most: int, log: bool) -> list[float]:
    """Ticks in bytes that are round in KiB, MiB or GiB."""
    if log:
        powers = [2.0**i for i in range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)]
        return powers[:: -(-len(powers) // most)]
    unit = 1024.0 ** min(4, max(0, math.floor(math.log(high, 1024)))) if high >= 1 else 1.0
    return [t * unit for t in ticks(low / unit, high / unit, most)]


def scatter(
    points: Sequence[Point],
    *,
    width: int,
    height: int,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_name: str,
    y_name: str,
    y_limits: tuple[float, float] = (-math.inf, math.inf),
    title: str,
    describe: str,
    long_labels: bool,
) -> Markup:
    """A score against bytes, with confidence intervals and the Pareto front.

    Args:
        y_limits: beyond which a score has no meaning; the axis ends there.
        long_labels: points of the front bear their label where it finds room, not their number alone.
    """
    low, high = min(p.x for p in points), max(p.x for p in points)
    log = high > 8 * low
    low, high = (low / 1.15, high * 1.15) if log else (0.0, high * 1.06)
    bottom, top = min(p.y - p.half for p in points), max(p.y + p.half for p in points)
    margin = 0.07 * (top - bottom) or 0.02 * abs(top) or 1.0
    bottom, top = max(bottom - margin, y_limits[0]), min(top + margin, y_limits[1])
    y_ticks = ticks(bottom, top, 7)
    left = 16 + max(text_width(y_text(t)) for t in y_ticks)
    plot = Box(left, 30, width - left - 12, height - 30 - 46)
    sx = Scale(low, high, plot.x, plot.x + plot.width, log)
    sy = Scale(bottom, top, plot.y + plot.height, plot.y + 8)
    out = _frame(plot, y_name, x_name)
    for value in y_ticks:
        out.append(f'<line class="grid" x1="{plot.x:.1f}" x2="{plot.x + plot.width:.1f}" y1="{sy(value):.1f}" '
                   f'y2="{sy(value):.1f}"/>')  # fmt: skip
        out.append(_text(plot.x - 8, sy(value) + 4, y_text(value), "end"))
    out += _x_ticks(byte_ticks(low, high, max(3, width // 110), log), sx, plot, x_text)
    front = sorted((p for p in points if p.on_front), key=lambda p: p.x)
    taken = []
    if front:
        corners = [(sx(p.x), sy(p.y)) for p in front] + [(plot.x + plot.width, sy(front[-1].y))]
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            taken += [Box(x0, y0 - 1, x1 - x0, 2), Box(x1 - 1, min(y0, y1), 2, abs(y1 - y0))]
        steps = [f"M{sx(front[0].x):.1f} {sy(front[0].y):.1f}"]
        steps += [f"H{sx(p.x):.1f}V{sy(p.y):.1f}" for p in front[1:]]
        steps.append(f"H{plot.x + plot.width:.1f}")
        out.append(f'<path class="front" d="{"".join(steps)}"/>')
    anchors = [(sx(p.x), sy(p.y)) for p in points]
    for p, (x, _) in zip(points, anchors, strict=True):
        if p.half:
            ends = [sy(min(max(p.y + s * p.half, bottom), top)) for s in (-1, 1)]
            out.append(
                f'<line class="interval {escape(p.css)} {escape(p.group)}" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            )
    for p, (x, y) in zip(points, anchors, strict=True):
        out.append(f'<g class="{escape(p.group)}">{mark(p.shape, x, y, p.css + (" best" if p.on_front else ""))}</g>')
    order = sorted(range(len(points)), key=lambda i: (not points[i].on_front, points[i].x))
    texts = [
        [f"{points[i].number} {points[i].label}", str(points[i].number)]
        if long_labels and points[i].on_front
        else [str(points[i].number)]
        for i in order
    ]
    placed = place_labels([anchors[i] for i in order], texts, plot, taken=taken)
    for i, (box, text) in zip(order, placed, strict=True):
        x, y = anchors[i]
        cx, cy = box.x + box.width / 2, box.y + box.height / 2
        nx, ny = min(max(x, box.x), box.x + box.width), min(max(y, box.y), box.y + box.height)
        if math.hypot(nx - x, ny - y) > 13:
            out.append(
                f'<line class="leader {points[i].group}" x1="{x:.1f}" y1="{y:.1f}" x2="{nx:.1f}" y2="{ny:.1f}"/>'
            )
        css = f"point {'strong ' if points[i].on_front else ''}{points[i].group}"
        out.append(_text(cx, cy + FONT * 0.36, text, "middle", css))
    for p, (x, y) in zip(points, anchors, strict=True):
        out.append(_named(p, x, y, width))
    return svg(out, width, height, title, describe, role="group")


def _named(p: Point, x: float, y: float, width: int) -> str:
    """An invisible circle over a mark that takes the pointer and the focus, and the words that it then shows: above it,
    or below where there is no room, and within the picture."""
    words, shift = [p.title], 18 if y < 40 else -14
    if text_width(p.title) > width - 20:
        head, _, tail = p.title.rpartition(": ")
        words, shift = [head, tail], (18 if y < 56 else -30)
    half = max(map(text_width, words)) / 2
    middle = min(max(x, half + 6), width - half - 6)
    lines = "".join(_text(middle, y + shift + 16 * i, w, "middle", "") for i, w in enumerate(words))
    return (
        f'<g class="arm {escape(p.group)}" tabindex="0" role="img" aria-label="{escape(p.title)}">'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="11"/><g class="tip" aria-hidden="true">{lines}</g></g>'
    )


@dataclass(frozen=True)
class Line:
    """One curve with what its repetitions span."""

    css: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: Sequence[tuple[float, float]] = ()
    """Marked besides: the validation loss."""


def curves(
    lines: Sequence[Line], *, width: int, height: int, x_high: float, y_limits: tuple[float, float], title: str,
    describe: str,
) -> Markup:  # fmt: skip
    """Loss against steps; panels that are given the same limits can be compared by eye."""
    y_ticks = ticks(*y_limits, 5)
    left = 14 + max(text_width(f"{t:g}") for t in y_ticks)
    plot = Box(left, 8, width - left - 14, height - 8 - 26)
    sx = Scale(0, x_high, plot.x, plot.x + plot.width)
    sy = Scale(*y_limits, plot.y + plot.height, plot.y)
    out: list[str] = []
    for value in y_ticks:
        out.append(f'<line class="grid" x1="{plot.x:.1f}" x2="{plot.x + plot.width:.1f}" y1="{sy(value):.1f}" '
                   f'y2="{sy(value):.1f}"/>')  # fmt: skip
        out.append(_text(plot.x - 6, sy(value) + 4, f"{value:g}", "end"))
    out += _x_ticks(ticks(0, x_high, 5), sx, plot, lambda v: f"{v:g}")

    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        clipped = [min(max(y, y_limits[0]), y_limits[1]) for y in ys]
        return "L".join(f"{sx(x):.1f} {sy(y):.1f}" for x, y in zip(xs, clipped, strict=True))

    for line in lines:
        if line.low and len(line.xs) > 1:
            there, back = path(line.xs, line.low), path(line.xs[::-1], line.high[::-1])
            out.append(f'<path class="band {escape(line.css)}" d="M{there}L{back}Z"/>')
    for line in lines:
        if line.xs:
            out.append(f'<path class="line {escape(line.css)}" d="M{path(line.xs, line.ys)}"/>')
        for x, y in line.dots:
            if y_limits[0] <= y <= y_limits[1]:
                out.append(f'<circle class="dot {escape(line.css)}" cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="2.6"/>')
    return svg(out, width, height, title, describe)


def mark(shape: str, x: float, y: float, css: str) -> str:
    """A mark of equal visual weight in four shapes."""
    if shape == "circle":
        return f'<circle class="mark {escape(css)}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    if shape == "square":
        return f'<rect class="mark {escape(css)}" x="{x - 5.4:.1f}" y="{y - 5.4:.1f}" width="10.8" height="10.8"/>'
    far = 7.0 if shape == "triangle" else 7.4
    corners = {
        "triangle": ((0, -far), (far * 0.92, far * 0.72), (-far * 0.92, far * 0.72)),
        "diamond": ((0, -far), (far, 0), (0, far), (-far, 0)),
    }[shape]
    return f'<path class="mark {escape(css)}" d="M{"L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners)}Z"/>'


def swatch(shape: str, css: str) -> Markup:
    """A mark for a legend."""
    return Markup(f'<svg class="swatch" viewBox="0 0 18 18" aria-hidden="true">{mark(shape, 9, 9, css)}</svg>')


def svg(parts: Sequence[str], width: int, height: int, title: str, describe: str, role: str = "img") -> Markup:
    """A figure with a title and a description for who does not see it.

    Args:
        role: "group" where parts of it take the focus.
    """
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="{role}"><title>{escape(title)}</title>'
        f"<desc>{escape(describe)}</desc>{''.join(parts)}</svg>"
    )


def _frame(plot: Box, y_name: str, x_name: str) -> list[str]:
    end = plot.y + plot.height
    return [
        f'<line class="axis" x1="{plot.x:.1f}" x2="{plot.x + plot.width:.1f}" y1="{end:.1f}" y2="{end:.1f}"/>',
        _text(4, 16, y_name, "start", "name"),
        _text(plot.x + plot.width, end + 40, x_name, "end", "name"),
    ]


def _x_ticks(values: Sequence[float], sx: Scale, plot: Box, show: Callable[[float], str]) -> list[str]:
    out, right = [], -math.inf
    end = plot.y + plot.height
    for value in values:
        text, x = show(value), sx(value)
        half = text_width(text) / 2
        if x - half < right + 6 or x + half > plot.x + plot.width + 14:
            continue  # it would run into the one before, or out of the picture
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{end:.1f}" y2="{end + 4:.1f}"/>')
        out.append(_text(x, end + 19, text, "middle"))
        right = x + half
    return out


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> str:
    return f'<text class="{escape(css)}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
