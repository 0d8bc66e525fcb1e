"""nanoGPT's way of giving configurations: ``--key=value`` by its names, and files of assignments. No torch here.

nanoGPT runs a positional ``config/x.py`` as code. Here such a file is **read**, never run: top-level assignments of
numbers, strings, True and False, arithmetic on them, and names assigned before. Imports are passed over. Anything else
is refused with its line, but for a ``wandb_run_name`` that is computed (nanoGPT's own example does), which is left out.
"""

import ast
import dataclasses
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memtrain_common.errors import UserError

_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip
# The same under another name: nanoGPT's, nanoGPT-LTE's and nanoGPT-LoRA's.
_RENAMED = {"out_dir": "out", "eval_batches": "eval_iters", "lora_rank": "lora_r"}
# Keys that have one meaning here, whatever the value: said in a line, not passed over in silence.
_NOTES = {
    "backend": "the backend is chosen by the device: nccl on CUDA, gloo on CPU",
    "save_checkpoint": "checkpoints are always written; always_save_checkpoint=False keeps the best one and the last",
    "compute_grad_memory": "gradient memory is always measured: see memory.json",
}
# Keys of which only one value can be had.
_ONLY = {
    "skip_logit": ("True", "the output layer is tied to the embedding and cannot have heads"),
    "lora_dropout": ("0.0", "heads have no dropout of their own"),
}

_MODES = {"mhlora": "sequential", "ddp": "parallel", "dmp": "parallel"}  # nanoGPT-LTE's words


@dataclasses.dataclass
class Flag:
    """One flag as it was given: its name with underscores, and the words after it."""

    key: str
    values: list[str]

    def words(self, booleans: set[str]) -> list[str]:
        name = self.key.replace("_", "-")
        if self.key in booleans and self.values in (["True"], ["False"]):
            return [f"--{name}" if self.values == ["True"] else f"--no-{name}"]
        if self.key in booleans and self.values:
            raise UserError(f"--{name} takes True or False, got {' '.join(self.values)}")
        if len(self.values) == 1:
            return [f"--{name}={self.values[0]}"]
        return [f"--{name}", *self.values]


def translate(argv: Sequence[str], config_type: type) -> tuple[list[str], list[str]]:
    """Words in nanoGPT's form to our commands': -> (words, notes for the user).

    Args:
        config_type: the command's dataclass; its bool fields take ``=True`` and ``=False``.

    Raises:
        UserError: for a file that cannot be read as assignments, and a value that cannot be had.
    """
    leading: list[str] = []
    rest = list(argv)
    while rest and not rest[0].startswith("-"):
        leading.append(rest.pop(0))
    files = [word for word in leading if word.endswith(".py")]
    presets = [word for word in leading if not word.endswith(".py")]
    notes: list[str] = []
    given = _mapped(_flags(rest), notes)
    keys = {flag.key.removeprefix("no_") for flag in given}
    from_files: dict[str, Flag] = {}
    for file in files:
        values = read_assignments(Path(file), notes)
        from_files.update({key: Flag(key, [str(value)]) for key, value in values.items()})
    in_files = [flag for flag in _mapped(list(from_files.values()), notes) if flag.key not in keys]
    flags = _resumed(in_files + given)  # the command line comes after the files, as in nanoGPT
    booleans = {f.name for f in dataclasses.fields(config_type) if f.type in (bool, "bool")}
    words = [word for flag in flags for word in flag.words(booleans)]
    if files and not presets and not any(flag.key == "resume" for flag in flags):
        presets = ["nanogpt"]  # a file means nanoGPT's defaults for what it does not say
    return [*presets, *words], notes


def _flags(words: Sequence[str]) -> list[Flag]:
    flags: list[Flag] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            flags.append(Flag(key.replace("-", "_"), [value] if equals else []))
        elif flags and not (word.startswith("-") and not _is_number(word)):
            flags[-1].values.append(word)
        else:
            flags.append(Flag(word, []))
    return flags


def _mapped(flags: list[Flag], notes: list[str]) -> list[Flag]:
    """nanoGPT's keys that mean something else here, or the same by another name."""
    out: list[Flag] = []
    for flag in flags:
        flag = Flag(_RENAMED.get(flag.key, flag.key), flag.values)
        value = flag.values[0] if len(flag.values) == 1 else None
        if flag.key in _NOTES:
            notes.append(f"{flag.key}: {_NOTES[flag.key]}")
        elif flag.key in _ONLY:
            only, why = _ONLY[flag.key]
            if value not in (only, only.removesuffix(".0")):
                raise UserError(f"{flag.key} can only be {only}: {why}")
        elif flag.key == "dataset" and value is not None:
            out.append(Flag("data_dir", [f"data/{value}"]))
        elif flag.key == "wandb_log":
            if value == "True":
                out.append(Flag("tracker", ["wandb"]))
        elif flag.key == "lte_mode" and value in _MODES:
            out.append(Flag("lte_mode", [_MODES[value]]))
        elif flag.key == "wrap_lte":
            out.append(Flag("method", ["full" if value == "False" else "lte"]))
        else:
            out.append(flag)
    return out


def _resumed(flags: list[Flag]) -> list[Flag]:
    """nanoGPT's ``init_from=resume``, which goes on with what lies in ``out_dir``, as our ``--resume``."""
    start = next((f for f in reversed(flags) if f.key == "init_from"), None)
    if start is None or start.values != ["resume"]:
        return flags
    folders = [f.values[0] for f in flags if f.key == "out" and f.values] or ["out"]
    return [f for f in flags if f.key not in ("init_from", "out")] + [Flag("resume", folders[-1:])]


def read_assignments(path: Path, notes: list[str]) -> dict[str, Any]:
    """The top-level assignments of a nanoGPT configuration, as values; nothing is run.

    Raises:
        UserError: naming the line that is anything else.
    """
    try:
        tree = ast.parse(path.read_text(), filename=str(path))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path} ({error.strerror})") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a file of assignments ({error})") from None
    values: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):  # a docstring
            continue
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                try:
                    values[name] = _value(expression, values)
                except (ValueError, TypeError, ArithmeticError):
                    if name == "wandb_run_name":
                        notes.append(f"{path}: wandb_run_name is computed there and left out: files are read, not run")
                        continue
                    raise UserError(
                        f"{path}, line {statement.lineno}: {name} must be a number, a string, True or False, or "
                        "arithmetic on those: configurations are read, not run"
                    ) from None
            case _:
                raise UserError(
                    f"{path}, line {statement.lineno} is not an assignment: configurations are read, not run"
                )
    return values


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, known)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            a, b = _value(left, known), _value(right, known)
            if isinstance(op, ast.Pow) and (abs(b) > 64 or abs(a) > 2**16):
                raise ValueError("too large")
            if isinstance(a, str) and not isinstance(op, ast.Add):  # "x" * 10**9
                raise TypeError("text can only be added")
            return _OPERATIONS[type(op)](a, b)
    raise ValueError(ast.dump(node))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
