"""Reading answers: the correct rules on cases that the official code gets wrong, and its own rules as they are."""

import pytest
from lora_xs.tasks import answers
from lora_xs.tasks.answers import OPTIONS, gsm8k_expected, rules


def judged(kind, official, text, expected, options=()):
    take, compare = rules(kind, official, options)
    return compare(take(text), expected)


@pytest.mark.parametrize(
    ("text", "expected", "correct", "official"),
    [
        ("so 6.\nThe answer is: 6", "6", True, True),
        ("The answer is: 1,234,567", "1234567", True, False),  # read as 1,234 there
        ("The answer is: 5", "500", False, True),  # a factor of 100 is let pass there
        ("The answer is: 72.4", "72", False, True),  # rounded there
        ("The answer is: $1,080.00.", "1080", True, True),
        ("The answer is: 7\nThe answer is: 8", "8", True, True),
        ("The answer is: 3/4", "0.75", True, False),
        ("no answer 6", "6", False, False),
        ("The answer is: many", "6", False, False),
        ("The answer is: -12", "-12", True, True),
    ],
)
def test_gsm8k(text, expected, correct, official):
    assert judged("gsm8k", False, text, expected) is correct
    assert judged("gsm8k", True, text, expected) is official


@pytest.mark.parametrize(
    ("text", "expected", "correct", "official"),
    [
        ("The answer is: \\frac{1}{2}", "\\dfrac12", True, True),
        ("The answer is: $\\boxed{42}$.", "42", True, False),
        ("we get \\boxed{x^2}", "x^2", True, False),
        ("The answer is: 0.5", "\\frac{1}{2}", True, False),
        ("The answer is: 50", "0.5", False, True),  # ×100
        ("The answer is: x/2", "7", False, True),  # cannot be parsed there, so it is right
        ("The answer is: 10,000", "10000", True, True),
        ("The answer is: (1, 2)", "(1,2)", True, True),
        ("The answer is: (1,2)", "[1,2]", False, True),  # brackets are dropped there
        ("The answer is: 45^\\circ.\nIndeed", "45", True, True),
        ("The answer is: 12\\text{ cm}", "12", True, None),
        ("nothing", "1", False, False),
    ],
)
def test_math(text, expected, correct, official):
    assert judged("math", False, text, expected) is correct
    if official is not None:
        assert judged("math", True, text, expected) is official


@pytest.mark.parametrize(
    ("text", "expected", "correct", "official"),
    [
        ("the correct answer is true", "true", True, True),
        ("It is not false. the correct answer is true", "true", True, False),  # the first named wins there
        ("The correct answer is False", "false", True, False),
        ("true or false", "true", False, True),
        ("I think true", "true", True, True),
        ("untrue", "true", False, True),
        ("", "true", False, False),
    ],
)
def test_commonsense(text, expected, correct, official):
    assert judged("commonsense", False, text, expected, OPTIONS["boolq"]) is correct
    assert judged("commonsense", True, text, expected, OPTIONS["boolq"]) is official


def test_boxes_nest():
    assert answers.boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}} c") == "\\frac{1}{2}"
    assert answers.boxed("\\boxed{1") is None
    assert gsm8k_expected("a\n#### 1,200") == "1,200"


def test_a_zero_denominator_is_no_answer():
    assert not judged("gsm8k", False, "The answer is: 1/0", "1")
    assert not judged("math", False, "The answer is: 1/0", "1")
    assert not judged("gsm8k", True, "The answer is: 1/0", "2")
