"""The prompts of the official runs: Alpaca's for mathematics, and an indented one for commonsense.

The first line of the official commonsense prompt ends in two spaces where it trains and in one where it evaluates, and
its evaluation leaves out a row's ``input``. Here both use the training prompt; the other one is
:func:`official_commonsense_evaluation`.
"""

from collections.abc import Callable, Mapping

from .instruct import PROMPT, Row, alpaca

TASK = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request."
STEP_BY_STEP = " Let's think step by step."
RESPONSE = "### Response:"
_NEXT = "\n\n" + 16 * " "
_LINE = "\n" + 16 * " "


def commonsense(row: Row, column: str) -> str:
    """The prompt of commonsense training; a row's ``input`` has a heading of its own."""
    more = row.values.get("input") or ""
    instruction = f"{_NEXT}### Instruction:{_LINE}{row.text(column)}"
    if not more:
        return f"{TASK}. {WRITE}  {instruction}{_NEXT}{RESPONSE}{_LINE}"
    context = f"{TASK}, paired with an input that provides further context. {WRITE} "
    return f"{context}{instruction}{_NEXT}### Input:{_LINE}{row.text('input')}{_NEXT}{RESPONSE}{_LINE}"


def official_commonsense_evaluation(row: Row, column: str) -> str:
    """As the official code asks: one space less, and never an ``input``."""
    return f"{TASK}. {WRITE} {_NEXT}### Instruction:{_LINE}{row.text(column)}{_NEXT}{RESPONSE}{_LINE}"


def step_by_step(row: Row, column: str) -> str:
    """The prompt of GSM8K and MATH."""
    return PROMPT.format(instruction=row.text(column)) + STEP_BY_STEP


PROMPTS: Mapping[str, Callable[[Row, str], str]] = {"alpaca": alpaca, "commonsense": commonsense}


def training_prompt(name: str, data: str) -> str:
    """ "alpaca" or "commonsense" for training on ``data``, where the flag says ``name``."""
    return ("commonsense" if data == "commonsense" else "alpaca") if name == "auto" else name


def evaluation_prompt(name: str, kind: str, trained_with: str | None, official: bool) -> Callable[[Row, str], str]:
    """The prompt for answers of one kind.

    Args:
        name: what the flag says.
        kind: "gsm8k", "math" or "commonsense".
        trained_with: the prompt that the adapter was trained with, where that is known.
        official: ask as the official evaluation of this kind does.
    """
    usual = "commonsense" if kind == "commonsense" else "alpaca"
    if name == "auto":
        name = usual if official or trained_with not in PROMPTS else str(trained_with)
    if name == "commonsense":
        return official_commonsense_evaluation if official else commonsense
    return alpaca if kind == "commonsense" else step_by_step
