"""Another project's flags in our words."""

import pytest
from memtrain_common.commands.official import Official, choice, kept, only, translate
from memtrain_common.errors import UserError

THEIRS = Official(
    switches={"new_way": ("--mode", "new"), "loud": ("--verbose",)},
    values={"num_steps": "--max-iters", "prune": kept("prune"), "kind": choice("kind", {"A": ("--data", "a")}),
            "fixed": only("fixed", "2"), "mode_word": lambda word: ("--mode", word)},
    unused={"cache_dir", "port"},
    presets={"kind": "theirs"},
    late={"new_way"},
    shared={"num_steps"},
)  # fmt: skip


def test_a_line_of_ours_comes_back_as_it_is():
    words = ["preset", "--max-iters", "3", "--data", "a", "-x", "--out=runs/a b"]
    assert translate(words, THEIRS, prog="do") == (words, [])
    assert translate([], THEIRS, prog="do") == ([], [])
    assert translate(["--num_steps", "3"], THEIRS, prog="do") == (["--num_steps", "3"], [])


def test_a_line_of_theirs_is_said_in_our_words():
    words = [
        "--new_way",
        "--kind=A",
        "--num_steps",
        "3",
        "--prune",
        "0.95",
        "--lr",
        "-1e-3",
        "--port",
        "1",
        "--fixed",
        "2",
    ]
    line, notes = translate([*words, "--mode_word", "old", "--cache_dir", "--loud", "False"], THEIRS, prog="do it")
    assert line == ["theirs", "--data", "a", "--max-iters", "3", "--keep", "0.05", "--lr", "-1e-3", "--mode", "new"]
    assert notes[0] == f"in this command's words: do it {' '.join(line)}"
    assert notes[1] == "without a meaning here: --port --cache_dir"
    assert translate(["mine", "--kind", "A", "--loud"], THEIRS, prog="do")[0] == ["mine", "--data", "a", "--verbose"]
    assert translate(["--kind", "A", "--data", "b"], THEIRS, prog="do")[0] == ["theirs", "--data", "b"]  # the later one
    assert translate(["--kind", "A", "--resume", "r"], THEIRS, prog="do")[0] == ["--data", "a", "--resume", "r"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--new_way", "maybe"], "--new_way takes True or False, got maybe"),
        (["--num_steps", "--loud"], "--num_steps takes one value, got none"),
        (["--num_steps", "1", "2"], "--num_steps takes one value, got 1 2"),
        (["--prune", "1"], "--prune must be a fraction from 0 to below 1, got 1"),
        (["--prune", "much"], "--prune must be a fraction"),
        (["--kind", "B"], "--kind B cannot be had here: choose one of A"),
        (["--fixed", "3"], "--fixed 3 cannot be had here: it can be 2"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(words, expected):
    with pytest.raises(UserError, match=expected):
        translate(words, THEIRS, prog="do")
