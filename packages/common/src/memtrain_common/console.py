"""What a run says: lines to the terminal and to ``log.txt``, a progress bar, tables, numbers with units."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm


def printable(text: str) -> str:
    """Text as a terminal may have it: control characters (a file's name may hold some) and halves of surrogate pairs
    are escaped, as ``\\x1b``; new lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class Progress(tqdm):
    """tqdm's bar, which is silent where stderr is no terminal; and plain lines for a file or a batch system.

    A line is due when 10 s have passed since the last one, or 2 % of the total in at least a second.

    Args:
        lines: takes each line; None has the bar alone.
        clock: counts seconds.
        given: as :class:`tqdm.tqdm` takes it.
    """

    def __init__(
        self, *, lines: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic, **given: Any
    ) -> None:
        super().__init__(**given)
        self._lines, self._clock = lines, clock
        self._scaled = bool(given.get("unit_scale"))
        self._label, self._total = given.get("desc") or "step", given["total"]
        self._done = self._first = self._told = given.get("initial", 0)
        self._began = self._told_at = clock()

    def update(self, n: float | None = 1) -> bool | None:
        self._done += n or 0
        if self._lines is not None and self._total:
            now = self._clock()
            waited = now - self._told_at
            if waited >= 10 or (waited >= 1 and self._done - self._told >= 0.02 * self._total):
                self._lines(self._line(now))
                self._told, self._told_at = self._done, now
        return super().update(n)

    def _line(self, now: float) -> str:
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        number = format_count if self._scaled else str
        text = f"{self._label} {number(self._done)}/{number(self._total)} ({self._done / self._total:.0%})"
        if getattr(self, "postfix", None):
            text += f", {self.postfix}"
        return f"{text}, {format_seconds(max(0, self._total - self._done) / rate)} left" if rate > 0 else text


class Console:
    """Prints lines and keeps them in a log file; the progress bar stays below them.

    Args:
        log: file to append to; None keeps none.
        quiet: print nothing (all processes but the first).
    """

    def __init__(self, log: Path | None = None, *, quiet: bool = False) -> None:
        self._log, self.quiet = log, quiet
        self._unlogged: list[str] = []

    def logging_to(self, log: Path | None) -> "Console":
        """The same with a log file, which begins with what was said before there was one."""
        console = Console(log, quiet=self.quiet)
        if log is not None and self._unlogged:
            console._keep("\n".join(self._unlogged))
        return console

    def _keep(self, text: str) -> None:
        if self._log is None:
            self._unlogged.append(text)
            return
        with self._log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def say(self, text: str = "") -> None:
        if self.quiet:
            return
        text = printable(text)
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader (`| head`) is gone: training goes on, and the log is complete
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._keep(text)

    def progress(
        self, total: int, *, initial: int = 0, label: str = "", scale: bool = False, lines: bool = False
    ) -> "Progress":
        """A progress bar on stderr.

        Args:
            scale: show 1.5M for 1500000.
            lines: also print lines on stdout where that is no terminal; not where stdout is a command's result.
        """
        return Progress(
            lines=self.say if lines and not self.quiet and not sys.stdout.isatty() else None,
            total=total,
            initial=initial,
            desc=label,
            dynamic_ncols=True,
            mininterval=0.2,
            unit_scale=scale,
            disable=True if self.quiet else None,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )


def format_bytes(n: float) -> str:
    """Bytes in binary units: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def format_count(n: float) -> str:
    """A count with a decimal suffix: 813568 -> "814k"."""
    for unit in ("", "k", "M", "G"):
        if abs(n) < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"


def format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right; a row may be shorter than the widest."""
    widths = [max(len(r[i]) for r in rows if i < len(r)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
