"""Flags from a dataclass: presets, nearest names, one sentence a mistake, and errors as exit codes."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from memtrain_common.commands.cli import changed_fields, flag_value, parse, run_command
from memtrain_common.commands.configure import configure, placed
from memtrain_common.commands.run_flags import CLASSIFIERS, LearningRate, Lr, RunFlags
from memtrain_common.errors import DivergedError, Stopped, UserError
from memtrain_common.models.classifiers import IMAGENET_WEIGHTS, MODELS
from memtrain_common.runs.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Config:
    n_layer: int = 4
    """Layers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision."""
    names: tuple[str, ...] = ("a", "b")
    """Names."""
    compile: bool = False
    """Compile."""


PRESETS = {"small": Config(n_layer=2), "large": Config(n_layer=24)}


def call(*words, **kwargs):
    return parse(Config, words, prog="prog", description="What it does.", presets=PRESETS, **kwargs)


@dataclasses.dataclass(frozen=True)
class Rates:
    learning_rate: LearningRate = 1.0
    """Of one thing."""


@dataclasses.dataclass(frozen=True)
class ShortRates:
    lr: Lr = 1.0
    """Of one thing."""


@pytest.mark.parametrize("flag", ["--lr", "--learning-rate", "--learning_rate"])
def test_a_learning_rate_has_both_of_its_names(flag):
    assert parse(Rates, [flag, "2"], prog="prog", description="") == Rates(2.0)
    assert parse(ShortRates, [f"{flag}=2"], prog="prog", description="") == ShortRates(2.0)


def test_flags_presets_and_both():
    assert call() == Config()
    assert call("--n-layer", "7", "--compile", "--names", "x") == Config(7, names=("x",), compile=True)
    assert call("--n_layer=7").n_layer == 7  # nanoGPT's underscores are taken as well
    assert call("large") == Config(n_layer=24)
    assert call("large", "--n-layer", "3", "--dtype", "bfloat16") == Config(n_layer=3, dtype="bfloat16")
    assert call(default=Config(n_layer=9)).n_layer == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n-layr", "3"], r"unknown flag --n-layr \(did you mean --n-layer\?\); prog --help lists the flags"),
        (["--n_layr=3"], r"did you mean --n-layer\?"),
        (["--zzz"], r"unknown flag --zzz; prog --help"),
        (["smal"], r"unknown preset 'smal' \(did you mean small\?\): the presets are small, large"),
        (["small", "large"], "unexpected word 'large'"),
        (["--n-layer", "x"], "--n-layer: invalid literal for int"),
        (["--n-layer"], r"[Mm]issing value for argument '--n-layer'"),
        (
            ["--dtype", "float8"],
            r"invalid choice 'float8' for argument '--dtype'. Expected one of \('float32', 'bfloat16'\)",
        ),
    ],
)
def test_mistakes_are_one_sentence(words, message, capsys):
    with pytest.raises(UserError, match=message) as error:
        call(*words)
    assert "\n" not in str(error.value)
    assert not any(c in str(error.value) for c in "│╭─")
    assert capsys.readouterr().err == ""


def test_help_lists_flags_and_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        call("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("What it does.", "--n-layer", "Precision.", "small, large"))


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no such thing"), 2, "prog: error: no such thing"),
        (DivergedError("loss is nan"), 1, "prog: error: loss is nan"),
        (Stopped(15, "stopped at step 3"), 143, "prog: stopped at step 3"),
        (MemoryError(), 1, "prog: error: memory ran out: take a smaller batch or model, or keep less for the"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes."),
            1,
            "prog: error: memory ran out ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"),
            1,
            "prog: error: memory ran out (CUDA out of memory. Tried to allocate 2.50 GiB.",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "prog: error: memory ran out ([Errno 12]"),
        (FileNotFoundError(errno.ENOENT, "no", "out of memory"), 2, "prog: error: cannot use out of memory (no)"),
        (KeyboardInterrupt(), 130, "prog: stopped by SIGINT while nothing was being trained: nothing was lost"),
        (KeyboardInterrupt(15), 143, "prog: stopped by SIGTERM while nothing was being trained: nothing was lost"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/metrics.jsonl"), 2,
         "prog: error: could not write /x/metrics.jsonl (No space left on device): free some space"),
    ],
)  # fmt: skip
def test_ends_are_one_line_and_an_exit_code(error, code, said, capsys):
    assert run_command(raising(error), prog="prog", argv=[]) == code
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="out of memory format"):  # its words alone say nothing
        run_command(raising(RuntimeError("expected out of memory format")), prog="prog", argv=[])
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()), prog="prog", argv=[])
    with pytest.raises(FileNotFoundError):
        run_command(raising(FileNotFoundError(errno.ENOENT, "no")), prog="prog", argv=[])


def test_small_helpers():
    assert flag_value(["a", "--resume", "x"], "--resume") == "x"
    assert flag_value(["--resume=y"], "--resume") == "y"
    assert flag_value(["--other"], "--resume") is None
    for words in (["--resume"], ["--resume="], ["--resume", "--max-iters", "5"]):
        with pytest.raises(UserError, match="--resume needs a value"):
            flag_value(words, "--resume")
    with pytest.raises(UserError, match="--resume was given 2 times"):
        flag_value(["--resume", "a", "--resume=b"], "--resume")
    assert changed_fields(Config(), Config(n_layer=5)) == {"n_layer": (4, 5)}


def test_a_package_that_only_this_path_needs_is_named_with_the_line_to_type(capsys):
    def broken(argv):
        import torch.nothing  # noqa: F401

    def missing(argv):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")

    assert run_command(missing, prog="prog", argv=[]) == 2
    assert capsys.readouterr().err == (
        "prog: error: this needs the package scikit-learn, which is not installed: pip install scikit-learn\n"
    )
    with pytest.raises(ModuleNotFoundError):  # a fault of the code, and not of the installation
        run_command(broken, prog="prog", argv=[])


@dataclasses.dataclass(frozen=True)
class Placed(RunFlags):
    PLACES: ClassVar[tuple[str, ...]] = ("weights", "data")
    MOVABLE: ClassVar[frozenset[str]] = frozenset({"weights", "data"})
    NAMES: ClassVar[frozenset[str]] = frozenset({"imagenet"})

    weights: str = ""
    """Weights."""
    data: str = "digits"
    """A set, or a file."""


def test_places_are_kept_absolute_and_an_older_run_goes_on_with_its_relative_one(tmp_path, monkeypatch):
    """The same place by any name is no change; another is taken where the run has a checkpoint, and a name never is."""
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new", "imagenet", "digits"):
        Path(name).mkdir()
    Path("rows.json").write_text("[]")

    def resumed(*words):
        given = ["--resume", "run", *words]
        return configure(Placed, given, prog="p", description="", presets={}, check=lambda config, before: config)

    assert placed(Placed(weights="old", data="rows.json")) == Placed(
        weights=str(tmp_path / "old"), data=str(tmp_path / "rows.json")
    )
    for plain in (Placed(weights="imagenet"), Placed(weights="owner/on-the-hub")):
        assert placed(plain) == plain
    run = RunFolder.create(Path("run"))
    run.write_config(Placed(weights="old"), prog="p", argv=[])  # as versions before wrote it
    assert resumed().weights == "old"
    for same in ("old", "./old", str(tmp_path / "old")):
        assert placed(resumed("--weights", same)).weights == str(tmp_path / "old")
    with pytest.raises(UserError, match=f"a training without a checkpoint, which begins from --weights {tmp_path}/old"):
        resumed("--weights", "new")
    (run.path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert resumed("--weights", "new").weights == "new"
    for words in (["--weights", "nowhere"], ["--weights", "imagenet"], ["--data", "rows.json"]):
        with pytest.raises(UserError, match="run was begun with"):
            resumed(*words)


def test_names_of_models_are_no_places():
    assert {*MODELS, IMAGENET_WEIGHTS} == CLASSIFIERS
