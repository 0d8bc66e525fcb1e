"""Answers out of generated text, and whether they are right.

Two sets of rules. The correct ones; and the official code's, bugs included, so that published numbers can be compared
with: there 1,234,567 is read as 1,234, answers are rounded to whole numbers, 5 equals 500 (a factor of 100 is let
pass), any answer that cannot be parsed counts as right (see official_math.py), and a commonsense answer is the first
option named at all.
"""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from . import official_math

MARK = "The answer is"


# -- GSM8K: one number --------------------------------------------------------------------------------------------

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?:([-+])(\s*)(?:\\?[$€£]\s*)?)?({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?")


def number(text: str) -> Fraction | None:
    """The first number in the text, exact: 1,234,567 and -0.5 and 3/4; a percent or dollar sign changes nothing, also
    behind the minus sign (-$5)."""
    text = text.replace("−", "-")
    match = _NUMBER.search(text)
    if match is None:
        return None
    numerator, denominator = (Fraction(part.replace(",", "")) for part in (match[3], match[4] or "1"))
    if match[1] == "-" and (not match[2] or _stands_alone(text[: match.start()])):
        numerator = -numerator
    return numerator / denominator if denominator else None


def _stands_alone(before: str) -> bool:
    """Whether a minus with a space behind it is a sign: at the beginning, or after a sign or bracket (= - 5). After a
    word it subtracts or is a dash, and at a line's beginning it marks an item of a list."""
    before = before.rstrip(" \t")
    return not before or before[-1] in "=:($*[{<>≈"


def gsm8k_expected(answer: str) -> str | None:
    """What stands behind ``####``."""
    _, mark, last = answer.rpartition("####")
    return last.strip() if mark else None


def gsm8k_answer(text: str) -> str | None:
    """The number after the last "The answer is" (or ``####``), as text; None if there is none."""
    found = number(_after_mark(text) or "")
    return None if found is None else str(found)


def gsm8k_correct(answer: str | None, expected: str | None) -> bool:
    return answer is not None and expected is not None and number(answer) == number(expected)


def _after_mark(text: str) -> str | None:
    at = max((m.end() for m in re.finditer(rf"{MARK}:?|####", text)), default=None)
    return None if at is None else text[at:]


# -- MATH: a LaTeX expression -------------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""The inside of the last ``\boxed{…}`` (or ``\fbox{…}``, or ``\boxed x``); None if there is none that closes."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if at < 0:
        return None
    rest = re.sub(r"^\\(boxed|fbox)\s*", "", text[at:])
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[1:i]
    return None


def math_answer(text: str) -> str | None:
    """What stands after the last "The answer is", up to the sentence's end, out of ``$`` and box; else the last box."""
    after = _after_mark(text)
    if after is None:
        return boxed(text)
    after = _sentence(after.strip()).strip().removesuffix(".").strip()
    if after.startswith("$") and after.endswith("$"):
        after = after.strip("$").strip()
    return (boxed(after) or after) or None


_WHOLE = re.compile(
    r"\$\$.+?\$\$|\$(?:\\.|[^$\\\n])+\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\\[.*?\\\]|\\\(.*?\\\)|\\.", re.DOTALL
)
"""What no sentence ends within: mathematics, a command's beginning, an escaped brace."""


def _sentence(text: str) -> str:
    """Up to the end of the line, or to a full stop before a space; neither ends a sentence within dollars, braces or an
    environment of LaTeX, nor does a stop between a letter and a small one (12 sq. ft)."""
    at = depth = 0
    while at < len(text):
        whole = _WHOLE.match(text, at)
        if whole is not None:
            at = whole.end()
            continue
        c, behind = text[at], text[at + 1 :]
        depth = max(0, depth + (c == "{") - (c == "}"))
        stop = c == "." and behind[:1].isspace()
        if stop and text[at - 1 : at].isalpha() and behind.lstrip()[:1].islower():
            stop = False
        if not depth and (stop or c == "\n"):
            return text[:at]
        at += 1
    return text.split("\n\n")[0] if depth else text


def math_correct(answer: str | None, expected: str | None) -> bool:
    """Equal once spelling is set aside, as text or as exact numbers; never by mere failure to understand."""
    if answer is None or expected is None:
        return False
    a, b = normal_form(answer), normal_form(expected)
    if a == b:
        return a != ""
    parts = [_parts(x) for x in (a, b)]
    if parts[0] and parts[1] and parts[0][0] == parts[1][0] and len(parts[0][1]) == len(parts[1][1]) > 1:
        return all(math_correct(x, y) for x, y in zip(parts[0][1], parts[1][1], strict=True))
    values = [_value(x) for x in (a, b)]
    return values[0] is not None and values[0] == values[1]


def normal_form(text: str) -> str:
    r"""One spelling for many: ``\dfrac12`` and ``\frac{1}{2}``, ``\left(``, units, spaces, degrees, ``x=``."""
    s = text.strip().rstrip(".").replace("\n", "").replace("\\!", "").replace("\\,", "").replace("\\ ", "")
    s = re.sub(r"\\[td]frac", r"\\frac", s)
    s = re.sub(r"\\(left|right)(?![a-z])", "", s)
    s = re.sub(r"\^\{?\\circ\}?", "", s)
    s = s.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    s = re.sub(r"\\text\{\s[^}]*\}$", "", s)  # a unit, as MATH writes it
    s = re.sub(r"\\(?:text|mathrm|textbf)\{([^}]*)\}", r"\1", s)
    s = re.sub(r"\s+", "", s)
    s = re.sub(r"^[a-zA-Z]=", "", s)
    s = re.sub(r"\\sqrt([^{\[])", r"\\sqrt{\1}", s)
    s = re.sub(r"\\frac([^{])", r"\\frac{\1}", s)
    s = re.sub(r"(\\frac\{[^{}]*\})([^{])", r"\1{\2}", s)
    s = re.sub(r"(?<![\d.])\.(?=\d)", "0.", s)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", s) if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", s) else s


def _parts(s: str) -> tuple[str, list[str]] | None:
    """Brackets and entries of a pair or a list."""
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]":
        return s[0] + s[-1], s[1:-1].split(",")
    return None


def _value(s: str) -> Fraction | None:
    """Exact value of a number, a decimal, a/b or ``\\frac{a}{b}``."""
    s = re.sub(r"^(-?)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}$", r"\1\2/\3", s).replace("--", "")
    match = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)(?:/(-?\d+(?:\.\d+)?))?", s)
    if match is None or (match[2] is not None and float(match[2]) == 0):
        return None
    return Fraction(match[1]) / Fraction(match[2] or "1")


# -- commonsense: one of the options ------------------------------------------------------------------------------

OPTIONS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "winogrande": ("option1", "option2"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    **dict.fromkeys(
        ("social_i_qa", "ARC-Challenge", "ARC-Easy", "openbookqa"),
        ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ),
}


def option_answer(text: str, options: Sequence[str]) -> str | None:
    """The option after the last "answer is"; without one, the option that alone is named; else None."""
    named = rf"\b({'|'.join(options)})\b"
    stated = re.findall(rf"answer is:?\s*{named}", text, re.IGNORECASE)
    if stated:
        return str(stated[-1]).lower()
    found = {m.lower() for m in re.findall(named, text, re.IGNORECASE)}
    return found.pop() if len(found) == 1 else None


def option_correct(answer: str | None, expected: str | None) -> bool:
    return answer is not None and answer == expected


# -- the official rules -------------------------------------------------------------------------------------------


def official_gsm8k_answer(text: str) -> str | None:
    pieces = text.split("The answer is: ")
    match = re.search(r"[\-+]?\d*[.,/]?\d+", pieces[-1]) if len(pieces) > 1 else None
    if match is None:
        return None
    found = match.group().replace(",", "")
    if "/" in found:
        numerator, denominator = found.split("/")
        if not numerator.lstrip("+-"):
            return None
        return str(round(float(numerator) / (float(denominator) or 1)))
    return None if math.isinf(value := float(found)) else str(round(value))


def official_gsm8k_correct(answer: str | None, expected: str | None) -> bool:
    return answer is not None and expected is not None and official_math.equal(answer, expected)


def official_option_answer(text: str, options: Sequence[str]) -> str | None:
    found = re.findall("|".join(options), text)
    return found[0] if found else None


Extract = Callable[[str], str | None]
Compare = Callable[[str | None, str | None], bool]
RULES: dict[tuple[str, bool], tuple[Extract, Compare]] = {
    ("gsm8k", False): (gsm8k_answer, gsm8k_correct),
    ("gsm8k", True): (official_gsm8k_answer, official_gsm8k_correct),
    ("math", False): (math_answer, math_correct),
    ("math", True): (official_math.answer_of, official_math.correct),
}


def rules(kind: str, official: bool, options: Sequence[str] = ()) -> tuple[Extract, Compare]:
    """How to read an answer of this kind ("gsm8k", "math" or "commonsense"), and how to compare it."""
    if kind == "commonsense":
        take = official_option_answer if official else option_answer
        return (lambda text: take(text, options)), option_correct
    return RULES[kind, official]
