r"""The official metric for MATH, bugs included, so that published numbers can be compared with.

What it does, in this order:

1. The answer stands after the last ``The answer is: ``, up to a full stop at a line's end. The right one is the inside
   of the solution's last ``\boxed{…}``; a solution that boxes in another way (``\boxed 5``, ``\fbox{5}``) makes every
   answer wrong.
2. Both are cleaned up (:func:`cleaned`). The clean-up fails on some texts, such as ``x/2``; then the answer is compared
   with itself, so that anything but an empty answer is right, whichever of the two it was that failed.
3. They are compared (:func:`equal`) as numbers to a part in 10⁴, where a hundred times as much and a hundredth are
   right too; as texts without braces and round brackets; entry by entry; and by sympy.

Its requirements pin sympy 1.12 beside an antlr4 that this sympy refuses, so its LaTeX parser never runs there: sympy
reads Python's notation alone. :mod:`memtrain_common.data.text.symbolic` does that safely, for the text is a model's.
"""

import math
import re

from .symbolic import symbolically_equal

ANSWER = "The answer is: "

_BEFORE_UNITS = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip
_AFTER_UNITS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))
_UNIT = "\\text{ "


class CleanUpFails(ValueError):
    """A text on which the official clean-up stops with an exception."""


def answer_of(text: str) -> str | None:
    """The answer in generated text; None (wrong) without the marking words."""
    _, mark, after = text.rpartition(ANSWER)
    return after.split(".\n")[0].strip().removesuffix(".").strip() if mark else None


def expected_of(solution: str) -> str | None:
    r"""The inside of the last ``\boxed{…}``; None for a solution without one, and for any other way to box."""
    start = solution.rfind("\\boxed")
    if not solution.startswith("\\boxed{", start):
        return None
    depth = 0
    for i in range(start, len(solution)):
        depth += (solution[i] == "{") - (solution[i] == "}")
        if depth == 0 and solution[i] == "}":
            return solution[start + len("\\boxed{") : i]
    return None


def correct(answer: str | None, expected: str | None) -> bool:
    """The official verdict."""
    if answer is None or expected is None:
        return False  # both cannot be None there: an answer that is not found is wrong before this
    try:
        a, b = cleaned(answer), cleaned(expected)
    except CleanUpFails:
        return equal(answer, answer) or answer == expected
    return equal(a, b) or a == b


def cleaned(text: str) -> str:
    """One spelling for several.

    Raises:
        CleanUpFails: where the official code raises anything.
    """
    for old, new in _BEFORE_UNITS:
        text = text.replace(old, new)
    if text.count(_UNIT) > 1:
        raise CleanUpFails("two units")
    text = text.split(_UNIT)[0]
    for old, new in _AFTER_UNITS:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    left, *right = text.split("=")
    if len(right) == 1 and len(left) <= 2:  # "x = 3"
        text = right[0]
    text = _fractions(_roots(text).replace(" ", ""))
    return _slash("\\frac{1}{2}" if text == "0.5" else text)


def _roots(text: str) -> str:
    r"""``\sqrt3`` → ``\sqrt{3}``"""
    if text.endswith("\\sqrt") or "\\sqrt\\sqrt" in text:
        raise CleanUpFails("a root of nothing")
    return re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text, flags=re.DOTALL)


def _fractions(text: str) -> str:
    r"""``\frac12`` → ``\frac{1}{2}``, ``\frac1{x}`` → ``\frac{1}{x}``; nothing changes where one lacks a part."""
    first, *rest = text.split("\\frac")
    parts = [first]
    for part in rest:
        if not part:
            raise CleanUpFails("a fraction of nothing")
        if not part.startswith("{"):
            if len(part) == 1:
                return text
            denominator = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            part = f"{{{part[0]}}}{denominator}"
        parts.append(part)
    return "\\frac".join(parts)


def _slash(text: str) -> str:
    r"""``3/4`` → ``\frac{3}{4}``. Anything else around a single slash is a failure there, not left alone."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        a, b = map(int, parts)
    except ValueError:
        raise CleanUpFails("no whole numbers around the slash") from None
    return f"\\frac{{{a}}}{{{b}}}" if text == f"{a}/{b}" else text


def number(text: str) -> float | None:
    """What Python's float makes of it without commas (``nan`` and ``inf`` are numbers)."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def equal(a: str, b: str) -> bool:
    """Answer ``a`` against ``b``, as numbers, as texts, entry by entry, by sympy."""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return any(math.isclose(x, z, rel_tol=1e-4) for z in (y / 100, y, y * 100))
    if not a:
        return False
    a, b = a.strip(), b.strip()
    loose = (_within("[]", a) and not b.startswith("(")) or (_within("()", a) and not b.startswith("["))
    bare = [re.sub(r"[{}()]", "", s.strip("[]()") if loose else s) for s in (a, b)]
    if bare[0] == bare[1]:
        return True
    if any(_within(pair, a) and _within(pair, b) for pair in ("[]", "()")):
        entries = [s[1:-1].split(",") for s in (a, b)]
        if len(entries[0]) == len(entries[1]) and all(map(equal, *entries)):
            return True
    return symbolically_equal(a, b)


def _within(pair: str, text: str) -> bool:
    return text.startswith(pair[0]) and text.endswith(pair[1])
