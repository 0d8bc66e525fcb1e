"""``--help`` from a dataclass: groups, one paragraph a flag, defaults of the preset, and examples that parse."""

import dataclasses
import shlex
from typing import ClassVar, Literal

import pytest
from memtrain_apps.run.config import FINETUNE_PRESETS, PRETRAIN_PRESETS, FinetuneConfig, PretrainConfig, configure
from memtrain_common.commands.cli import parse
from memtrain_common.commands.flag_help import flags_of, help_text
from memtrain_common.commands.run_flags import Lr


@dataclasses.dataclass(frozen=True)
class Base:
    # -- run
    out: str = ""
    """Where it goes,
    on two lines."""
    steps: int = 3
    """Steps."""


@dataclasses.dataclass(frozen=True)
class Child(Base):
    GROUPS: ClassVar[tuple[str, ...]] = ("rate: how fast",)
    EXAMPLES: ClassVar[tuple[str, ...]] = ("prog --steps 4",)

    # -- run
    dry: bool = False
    """Nothing is run."""
    # -- rate: how fast
    lr: Lr = 0.5
    """Rate."""
    sizes: tuple[int, ...] = (1, 2)
    """Sizes."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    limit: float | None = None
    """Limit."""
    steps: int = 7
    """Steps of the child."""


def test_flags_stand_in_groups_with_their_values_and_defaults():
    flags = flags_of(Child)
    assert [(f.group, f.names, f.values, f.default) for f in flags] == [
        ("rate: how fast", ("--lr", "--learning-rate"), "X", "0.5"),
        ("rate: how fast", ("--sizes",), "N ...", "1 2"),
        ("rate: how fast", ("--kind",), "a|b", "a"),
        ("rate: how fast", ("--limit",), "X|none", "None"),
        ("run", ("--steps",), "N", "7"),
        ("run", ("--[no-]dry",), "", "no"),
        ("run", ("--out",), "TEXT", ""),
    ]
    assert flags[-1].text == "Where it goes, on two lines."


@pytest.mark.parametrize("width", [60, 120])
def test_lines_fit_the_width_and_the_presets_values_are_shown(width):
    shown = help_text(Child, prog="prog", description="Does it.", presets={"x": 1}, default=Child(steps=9), width=width)
    assert max(map(len, shown.splitlines())) <= width
    assert "(default 9)" in shown
    assert shown.startswith("usage: prog [PRESET] [--flag value ...]\n\nDoes it.\n\npresets: x\n\nrate: how fast\n")
    assert shown.endswith("examples:\n  prog --steps 4\n")


def test_a_class_made_at_run_time_has_flags_without_text():
    made = dataclasses.make_dataclass("Made", [("n", int, 3)], frozen=True)
    assert [(f.names, f.default, f.text) for f in flags_of(made)] == [(("--n",), "3", "")]


@pytest.mark.parametrize(
    ("config", "presets"), [(FinetuneConfig, FINETUNE_PRESETS), (PretrainConfig, PRETRAIN_PRESETS)]
)
def test_examples_of_the_apps_are_valid_and_axes_come_first(config, presets):
    flags = flags_of(config)
    axes = [f.group.split(":")[0] for f in flags if ":" in f.group]
    assert list(dict.fromkeys(axes)) == ["train", "save", "optim"]
    assert [":" in f.group for f in flags] == [True] * len(axes) + [False] * (len(flags) - len(axes))
    assert {f.names[0].replace("[no-]", "") for f in flags} == {
        "--" + f.name.replace("_", "-") for f in dataclasses.fields(config)
    }
    assert all(f.text for f in flags)
    for example in config.EXAMPLES:
        prog, *words = shlex.split(example)
        if "--resume" in words:
            continue  # of a run that is not there
        configure(words, config, prog=prog, description="", presets=presets)


def test_help_ends_a_command_with_code_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Child, ["--steps", "2", "-h"], prog="prog", description="Does it.")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: prog [--flag value ...]")
