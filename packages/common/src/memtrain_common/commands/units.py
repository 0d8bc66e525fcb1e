"""Amounts of memory as people write them: "8GiB" is 8,589,934,592 bytes, "8GB" is 8,000,000,000, and "8G" is neither.

No torch here.
"""

import math
import re

from ..errors import UserError

DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
UNITS = {**DECIMAL, **BINARY}
WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*"
"""A comma stands between thousands alone: "7,5" is no 75."""


def parse_bytes(text: str, flag: str) -> int:
    """Bytes of "8GiB", "8 GB", "7.5gib".

    Args:
        flag: named in messages.

    Raises:
        UserError: if it has no unit, an ambiguous one ("8G": both readings are named) or bits ("8Gb"), or is 0.
    """
    match = re.fullmatch(rf"\s*([+-]?(?:{WHOLE})(?:\.[0-9]*)?|[+-]?\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise UserError(f"{flag} {text!r} is not an amount of memory: write a number and a unit, as 8GiB or 7.5GB")
    number, unit = float(match[1].replace(",", "").replace("_", "")), match[2]
    if not 0 < number < math.inf:
        raise UserError(f"{flag} must be above 0, got {text}")
    known = {name.lower(): name for name in UNITS}
    if unit == "":
        raise UserError(
            f"{flag} {text} has no unit: write {match[1]}GiB, {match[1]}GB, or another of {', '.join(UNITS)}"
        )
    if unit.lower() in ("k", "m", "g", "t", "ki", "mi", "gi", "ti"):
        letter = unit[0].upper()
        decimal, binary = round(number * DECIMAL[f"{letter}B"]), round(number * BINARY[f"{letter}iB"])
        raise UserError(
            f"{flag} {text} may mean {match[1]}{letter}B ({decimal:,} bytes) or {match[1]}{letter}iB ({binary:,} "
            "bytes): write which"
        )
    if unit.lower() not in known:
        raise UserError(f"{flag} {text}: {unit!r} is no unit of memory; choose one of {', '.join(UNITS)}")
    if unit.endswith("b") and unit[0].isupper():
        raise UserError(f"{flag} {text}: {unit!r} are bits; write {unit[:-1]}B for bytes")
    amount = round(number * UNITS[known[unit.lower()]])
    if amount < 1:
        raise UserError(f"{flag} must be at least one byte, got {text}")
    return amount
