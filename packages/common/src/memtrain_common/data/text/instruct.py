"""Instruction data: JSON and JSON Lines files of questions with answers, and the prompt they are put into.

Known rows: MetaMathQA's ``query`` and ``response``; Alpaca's and the commonsense sets' ``instruction``, ``input``,
``output`` (and ``answer``); GSM8K's ``question`` and ``answer`` (which ends in ``#### 42``); MATH's ``problem`` and
``solution``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import MOST_LINE, parse_json
from ..hub import hub_rows

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ANSWER_IS = "The answer is: "

# (instruction, response) columns, the first pair that a row has
GSM8K = ("question", "answer")
PAIRS = (("query", "response"), ("instruction", "output"), GSM8K, ("problem", "solution"))


@dataclass(frozen=True)
class Row:
    """One object of a file, and where it stands there."""

    values: Mapping[str, Any]
    where: str
    """The file and the line (or the item's number, in a JSON list), for messages."""

    def text(self, name: str) -> str:
        """The string in column ``name``.

        Raises:
            UserError: naming file and line, if there is none.
        """
        value = self.values.get(name)
        if not isinstance(value, str):
            has = ", ".join(map(repr, self.values)) or "nothing"
            what = f"no field {name!r}" if name not in self.values else f"no text in the field {name!r}"
            raise UserError(f"{self.where} has {what}: it has {has}")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(
                f"{self.where} has half of a surrogate pair in the field {name!r}, which is no text: mend it"
            )
        return value


@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn."""

    prompt: str
    response: str


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The objects of a ``.jsonl`` file (one a line), or of a ``.json`` file (a list), the first ``limit``.

    Raises:
        UserError: naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a JSON or JSON Lines file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if text.lstrip().startswith("["):
        try:
            items = parse_json(text)
        except ValueError as error:
            raise UserError(f"{path} is not a whole JSON list: {error}") from None
        rows = [Row(item, f"{path}, item {i}") for i, item in enumerate(items[:limit], start=1)]
    else:
        numbered = ((i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())
        rows = [Row(_object(line, path, i), f"{path}, line {i}") for i, line in islice(numbered, limit)]
    for row in rows:
        if not isinstance(row.values, dict):
            raise UserError(f"{row.where} is not an object with named fields")
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _object(line: str, path: Path, number: int) -> Any:
    try:
        if len(line) > MOST_LINE:
            raise ValueError(f"it is longer than {MOST_LINE >> 20} MiB")
        return parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON: {error}") from None


def rows_from_hub(name: str, subset: str | None, split: str, limit: int | None = None) -> list[Row]:
    """The rows of a data set of the hub."""
    return [Row(dict(r), f"{name}, row {i}") for i, r in enumerate(islice(hub_rows(name, subset, split), limit), 1)]


def find_file(data_dir: Path, names: Sequence[str]) -> Path:
    """The first of ``names`` in a folder, or the folder itself where it is a file.

    Raises:
        UserError: naming what would be right.
    """
    if data_dir.is_file():
        return data_dir
    found = next((data_dir / n for n in names if (data_dir / n).is_file()), None)
    if found is None:
        raise UserError(f"{data_dir} has none of the files {', '.join(names)}: --data-dir needs one of them")
    return found


def pair_of(rows: Sequence[Row]) -> tuple[str, str]:
    """The columns of instruction and response, by the first row.

    Raises:
        UserError: if it has no known pair.
    """
    for pair in PAIRS:
        if all(name in rows[0].values for name in pair):
            return pair
    known = "; ".join(" and ".join(pair) for pair in PAIRS)
    has = ", ".join(map(repr, rows[0].values)) or "nothing"
    raise UserError(f"{rows[0].where} has the fields {has}, and needs one of these pairs: {known}")


def instruction_of(row: Row, column: str) -> str:
    """The instruction, with Alpaca's further ``input`` below it where there is one."""
    more = row.text("input") if row.values.get("input") not in (None, "") else ""
    return row.text(column) + (f"\n{more}" if more else "")


def alpaca(row: Row, column: str) -> str:
    """PROMPT with the row's instruction."""
    return PROMPT.format(instruction=instruction_of(row, column))


def examples(
    rows: Sequence[Row], pair: tuple[str, str] | None = None, prompt: Callable[[Row, str], str] = alpaca
) -> list[Example]:
    """Prompts with responses, which follow one another without a space. GSM8K's ``<<2*3=6>>`` are left out and its
    last line ``#### 6`` becomes "The answer is: 6", which is what evaluation looks for.

    Args:
        pair: the columns of instruction and response; None finds them in the first row, and every row must have them.
        prompt: of a row, whose instruction is in the column that is named.
    """
    instruction, response = chosen = pair_of(rows) if pair is None else pair
    named = tuple(chosen) == GSM8K
    return [Example(prompt(row, instruction), _response(row.text(response), named)) for row in rows]


def _response(text: str, named: bool) -> str:
    """The response, in GSM8K's form made ours. Other texts have headings of Markdown and ``<<`` of their own.

    Args:
        named: whether the fields have GSM8K's names; else its ``<<2*3=6>>`` tells.
    """
    body, mark, answer = text.rpartition("\n#### ")
    its = mark and re.fullmatch(r"[-+$€£]*[\d.,]+\s*%?", answer.strip())
    if not its or not (named or re.search(r"<<[^>]*=[^>]*>>", body)):
        return text.strip()
    return re.sub(r"<<[^>]*>>", "", body).strip() + "\n" + ANSWER_IS + answer.strip()
