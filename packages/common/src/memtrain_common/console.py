"""What a run says: lines to the terminal and to ``log.txt``, a progress bar, tables, numbers with units."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm


def printable(text: str) -> str:
    """Text as a terminal may have it: control characters (a file's name may hold some) and halves of surrogate pairs
    are escaped, as ``\\x1b``; new lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class Console:
    """Prints lines and keeps them in a log file; the progress bar stays below them.

    Args:
        log: file to append to; None keeps none.
        quiet: print nothing (all processes but the first).
    """

    def __init__(self, log: Path | None = None, *, quiet: bool = False) -> None:
        self._log, self._quiet = log, quiet

    def say(self, text: str = "") -> None:
        if self._quiet:
            return
        text = printable(text)
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader (`| head`) is gone: training goes on, and the log is complete
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def progress(self, total: int, *, initial: int = 0, label: str = "", scale: bool = False) -> "tqdm[Any]":
        """A progress bar on stderr; none where stderr is not a terminal. ``scale`` shows 1.5M for 1500000."""
        return tqdm(
            total=total,
            initial=initial,
            desc=label,
            dynamic_ncols=True,
            mininterval=0.2,
            unit_scale=scale,
            disable=True if self._quiet else None,
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
