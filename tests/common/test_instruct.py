"""Instruction files: known rows, the prompt, GSM8K's answers, and refusals that name file and line."""

import json

import pytest
from memtrain_common.data.text.instruct import ANSWER_IS, PROMPT, Row, examples, find_file, pair_of, read_rows
from memtrain_common.errors import UserError


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"query": "q", "response": "r"}, "q", "r"),
        ({"instruction": "i", "input": "", "output": "o", "answer": "a"}, "i", "o"),
        ({"instruction": "i", "input": "more", "output": "o"}, "i\nmore", "o"),
        ({"question": "q", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "q", f"2+2=4\n{ANSWER_IS}4"),
        ({"problem": "p", "solution": "s"}, "p", "s"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_known_rows(row, prompt, response, form, tmp_path):
    file = tmp_path / f"data.{form}"
    file.write_text(json.dumps(row) + "\n" if form == "jsonl" else json.dumps([row], indent=1))
    (example,) = examples(read_rows(file))
    assert example.prompt == PROMPT.format(instruction=prompt)
    assert example.response == response


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"query": "a", "response": "b"}\n\n{"query": "a"}\n', r"d\.jsonl, line 3 has no field 'response'"),
        (
            '{"query": "a", "response": "b"}\n{"query": "a", "response": 4}\n',
            "line 2 has no text in the field 'response'",
        ),
        ('{"query": "a", "response": "b"}\n{"query"\n', "line 2 is not JSON"),
        ('{"a": 1}\n', "needs one of these pairs"),
        ("4\n", "line 1 is not an object"),
        ("", "no rows"),
        ('[{"query": "a", "response": "b"}, {"response": "b"}]', "item 2 has no field 'query'"),
        ('[{"query": "a"', "not a whole JSON list"),
    ],
)
def test_refusals_name_file_and_line(text, expected, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=expected):
        examples(read_rows(file))


def test_limits_and_places(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"query": "a", "response": "b"}\n' * 5)
    assert len(read_rows(file, 3)) == 3
    assert find_file(tmp_path, ("test.jsonl", "train.jsonl")) == file
    assert find_file(file, ()) == file
    with pytest.raises(UserError, match=r"test\.jsonl"):
        find_file(tmp_path, ("test.jsonl",))
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")


def test_the_real_files(real_data):
    rows = read_rows(real_data / "gsm8k" / "train.jsonl")
    assert len(rows) == 7473
    assert all(ANSWER_IS in e.response and "<<" not in e.response for e in examples(rows))
    boolq = read_rows(real_data / "commonsense" / "boolq" / "test.json")
    assert pair_of(boolq) == ("instruction", "output")


@pytest.mark.parametrize(
    ("row", "response"),
    [
        ({"instruction": "Write a guide", "output": "#### Step 1\nRun `cin <<x>> y`.\n\n#### Step 2\nDone"}, None),
        ({"question": "How?", "answer": "First <<x>>\n#### Step 2"}, None),
        ({"instruction": "Count", "output": "so\n#### 42"}, None),
        ({"instruction": "2*3?", "output": "it is <<2*3=6>>6\n#### 6"}, "it is 6\nThe answer is: 6"),
        ({"question": "2*3?", "answer": "it is <<2*3=6>>6\n#### $1,006.50"}, "it is 6\nThe answer is: $1,006.50"),
    ],
)
def test_headings_of_markdown_are_no_answers(row, response):
    text = list(row.values())[1]
    assert examples([Row(row, "f")])[0].response == (text if response is None else response)


def test_an_input_that_is_no_text_is_refused_and_not_left_out():
    with pytest.raises(UserError, match="line 3 has no text in the field 'input'"):
        examples([Row({"instruction": "Double the number", "input": 7, "output": "14"}, "f, line 3")])
    assert "\nseven" in examples([Row({"instruction": "a", "input": "seven", "output": "b"}, "f")])[0].prompt
    for nothing in ("", None):
        assert "a\n\n" in examples([Row({"instruction": "a", "input": nothing, "output": "b"}, "f")])[0].prompt
