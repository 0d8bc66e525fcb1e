"""nanoGPT's configuration files, read without being run. No torch here.

nanoGPT runs a positional ``config/x.py`` as code. Here such a file is **read**: top-level assignments of numbers,
strings, True and False, arithmetic on them, and names assigned before. Imports are passed over. Anything else is
refused with its line, but for a ``wandb_run_name`` that is computed (nanoGPT's own example does), which is left out,
and for names that the command line gives.
"""

import ast
import operator
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from memtrain_common.errors import UserError

_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip


def read_assignments(path: Path, notes: list[str], spoken_for: Set[str] = frozenset()) -> dict[str, Any]:
    """The top-level assignments of a nanoGPT configuration, as values; nothing is run.

    Args:
        notes: what is to be said of the file is added.
        spoken_for: names that the command line gives, and whose value here may therefore be anything.

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
                    values.pop(name, None)
                    if name in spoken_for:
                        continue
                    if name == "wandb_run_name":
                        notes.append(f"{path}: wandb_run_name is computed there and left out: files are read, not run")
                        continue
                    raise UserError(
                        f"{path}, line {statement.lineno}: {name} must be a number, a string, True or False, or "
                        f"arithmetic on those: configurations are read, not run; give it as --{name}=VALUE"
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
        case ast.JoinedStr(values=parts):  # an f-string of names, without formats
            return "".join(_text(part, known) for part in parts)
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


def _text(part: ast.expr, known: dict[str, Any]) -> str:
    match part:
        case ast.Constant(value=str() as text):
            return text
        case ast.FormattedValue(value=ast.Name() as name, conversion=-1, format_spec=None):
            return str(_value(name, known))
    raise ValueError(ast.dump(part))
