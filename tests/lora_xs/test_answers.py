"""Reading answers: the correct rules on cases that the official code gets wrong, and its own rules as they are."""

import pytest
from memtrain_common.data.text import answers, official_math, symbolic
from memtrain_common.data.text.answers import OPTIONS, gsm8k_expected, rules


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
        ("The answer is: -.5", "-1/2", True, False),
        ("The answer is: 1,234.5/2", "617.25", True, False),
        ("The answer is: " + "9" * 400, "1", False, False),  # infinite as a float
        ("The answer is: 7/2", "4", False, True),  # rounded, to the even one
        ("The answer is: /2", "2", True, False),
        ("The answer is: -$5", "-5", True, False),  # the sign is lost there
        ("The answer is: −\\$1,080.50.", "-1080.5", True, False),
        ("a loss of\nThe answer is: - $5", "-5", True, False),
        ("The answer is: x = - 5", "-5", True, False),
        ("The answer is: 3 - 5", "3", True, True),
        ("The answer is: 10-5", "10", True, True),
        ("The answer is: x - 5", "5", True, True),  # it subtracts
        ("The answer is:\n- 5 apples\n- 3 pears", "5", True, False),  # a list
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
        ("The answer is: 0.5", "\\frac{1}{2}", True, True),  # this one number is spelt out there
        ("The answer is: 0.25", "\\frac{1}{4}", True, False),  # and no other
        ("The answer is: 50", "0.5", False, False),  # 0.5 has become \\frac{1}{2}
        ("The answer is: 5", "500", False, True),  # a factor of 100
        ("The answer is: x/2", "7", False, True),  # the clean-up fails there, so it is right
        ("The answer is: 7", "x/2", False, True),  # whichever of the two it is
        ("The answer is: 3", "\\sqrt", False, True),
        ("The answer is: 1\\text{ m} 2\\text{ cm}", "7", False, True),
        ("The answer is: .", "x/2", False, False),  # but for an empty answer
        ("The answer is: 3/4", "\\frac34", True, True),
        ("The answer is: 10,000", "10000", True, True),
        ("The answer is: (1, 2)", "(1,2)", True, True),
        ("The answer is: (50, 2)", "(0.5,2)", False, True),
        ("The answer is: (1,2)", "[1,2]", False, False),
        ("The answer is: (1,2)", "1,2", False, True),  # brackets are dropped there
        ("The answer is: 2x", "{2}x", False, True),
        ("The answer is: 45^\\circ.\nIndeed", "45", True, True),
        ("The answer is: 12\\text{ cm}", "12", True, True),
        ("The answer is: k = 12", "12", True, True),
        ("The answer is: x+1", "1+x", False, True),  # by sympy
        ("The answer is: 2*(x+1)", "2*x+2", False, True),
        ("The answer is: 2^3", "1", False, True),  # Python's exclusive or
        ("The answer is: pi^2", "9.87", False, True),  # to a part in 1000
        ("The answer is: sqrt(2)+1", "2.4142", False, True),
        ("nothing", "1", False, False),
        ("The answer is:3", "3", True, False),
        ("The answer is: $5$. I hope it is correct.", "5", True, False),
        ("The answer is: 5\nfoo", "5", True, False),
    ],
)
def test_math(text, expected, correct, official):
    """The official verdicts are those of the official code, run once on these texts."""
    assert judged("math", False, text, expected) is correct
    assert judged("math", True, text, expected) is official


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3.5. I hope it is correct.", "3.5"),
        ("\\frac{1}{2}. Indeed", "\\frac{1}{2}"),
        ("\\text{Dr. Who. Bar}. Yes", "\\text{Dr. Who. Bar}"),
        ("$x = 3. Y$. Then", "x = 3. Y"),
        ("$$\n5\n$$\nso", "5"),
        ("\\begin{pmatrix}\n1\\\\\n2\n\\end{pmatrix}. Foo", "\\begin{pmatrix}\n1\\\\\n2\n\\end{pmatrix}"),
        ("12 sq. ft. The end", "12 sq. ft"),
        ("\\$5. The rest is $3.", "\\$5"),
        ("5{ a. B\n\nC", "5{ a. B"),  # a brace that never closes
        ("\\boxed{42}. I hope", "42"),
        (".", None),
    ],
)
def test_an_answer_goes_to_the_end_of_its_sentence(text, found):
    assert answers.math_answer(f"The answer is: {text}") == found


@pytest.mark.parametrize(
    ("solution", "correct", "official"),
    [
        ("so \\boxed{1} or \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("$\\boxed 5$", "5", None),
        ("\\fbox{5}", "5", None),
        ("\\boxed{5", None, None),
        ("none", None, None),
    ],
)
def test_the_right_answer_is_boxed(solution, correct, official):
    assert answers.boxed(solution) == correct
    assert official_math.expected_of(solution) == official
    assert not official_math.correct("5", None)


@pytest.mark.slow
def test_generated_text_is_not_run(tmp_path, monkeypatch):
    """Neither Python's functions nor attributes nor strings; and what takes too long or too much is unequal."""
    file = tmp_path / "made"
    code = "".join(f"chr({ord(c)})+" for c in f"open({str(file)!r},'w')")[:-1]
    for text in (
        f"exec({code})",
        f"eval({code})",
        f"open({code.replace('open', '')})",
        f"lambdify(x,{code})(1)",
        f"sympify({code})",
        f"().__class__.__base__.__subclasses__()[0]+eval({code})",
        f"x.func.mro()+eval({code})",
        f"sqrt('open({file})')",
    ):
        assert not symbolic.symbolically_equal(text, "1"), text
        assert not file.exists(), text
    monkeypatch.setattr(symbolic, "SECONDS", 0.5)
    assert not symbolic.symbolically_equal("9**9**9**9", "1")
    monkeypatch.undo()
    assert symbolic.symbolically_equal("abs(-3)+max(1,2)", "5")  # the process is begun anew
    assert not symbolic.symbolically_equal("zeros(10**9)", "1")
    assert symbolic.symbolically_equal("(x+1)**2", "x**2+2*x+1")


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


def test_the_right_number_stands_behind_the_mark():
    assert gsm8k_expected("a\n#### 1,200") == "1,200"


def test_a_zero_denominator_is_no_answer():
    assert not judged("gsm8k", False, "The answer is: 1/0", "1")
    assert not judged("math", False, "The answer is: 1/0", "1")
    assert judged("gsm8k", True, "The answer is: 2/0", "2")  # the numerator is taken there
    assert not judged("gsm8k", True, "The answer is: 1/0", "2")
