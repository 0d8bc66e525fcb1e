"""Whether two texts mean the same to sympy, as the official MATH metric asks: ``simplify(a − b) = 0``, or numbers
within a part in 1000.

sympy's parser hands the text to Python's ``eval``, and the text is a language model's. So it is read in a process of
its own that may use SECONDS and BYTES, where names mean mathematics alone; a text with quotes, attributes or dunder
names is not read at all. Such texts count as unequal; the official code would run them.
"""

import atexit
import contextlib
import json
import re
import selectors
import subprocess
import sys
from functools import cache
from typing import Any

SECONDS = 10.0
"""Per comparison. The official code waits for ever."""

BYTES = 4 * 2**30
"""Of address space."""

# Functions of sympy that are no classes, and that an answer may well call; any other fails when it is called.
_FUNCTIONS = re.findall(
    r"\w+",
    """N S sqrt cbrt root real_root rad deg gcd lcm igcd ilcm prod product summation prime isprime nextprime prevprime
    primorial mod_inverse expand factor simplify cancel together apart nsimplify radsimp trigsimp powsimp collect diff
    integrate limit numer denom det trace eye zeros ones diag Matrix""",
)
_PYTHONS = (abs, divmod, pow, round, sum)
_UNREADABLE = re.compile(r"""["'`\\]|__|\.\s*[^\W\d]""")


def symbolically_equal(a: str, b: str) -> bool:
    """sympy's verdict; False where it has none in time."""
    if _UNREADABLE.search(a) or _UNREADABLE.search(b):
        # What cannot be read stays a text, and a text is no number, nor has it a difference from anything.
        return False
    return _reader().ask(a, b)


class _Reader:
    """The process that reads, begun when it is first needed and again after it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def ask(self, a: str, b: str) -> bool:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "memtrain_common.data.text.symbolic"]
            self._process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3, text=True)
            self._answer(60.0)  # until sympy is there
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([a, b]) + "\n")
        self._process.stdin.flush()
        return self._answer(SECONDS) == "true\n"

    def _answer(self, seconds: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if selector.select(seconds):
                return self._process.stdout.readline()  # empty where the process ended
        self.close()
        return ""

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@cache
def _reader() -> _Reader:
    return _Reader()


# -- in the process that reads --------------------------------------------------------------------------------------


@cache
def _names() -> dict[str, Any]:
    """What a name means: as after ``from sympy import *``, but a function that is no mathematics fails when called."""
    import builtins

    import sympy

    everything: dict[str, Any] = {}
    exec("from sympy import *", everything)
    for name, value in vars(builtins).items():
        if isinstance(value, type(len)):
            everything[name] = value
    allowed = {name: getattr(sympy, name) for name in _FUNCTIONS} | {f.__name__: f for f in _PYTHONS}
    allowed |= {"max": sympy.Max, "min": sympy.Min}

    def not_run(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("not run here")

    def meaning(name: str, value: Any) -> Any:
        kind = value if isinstance(value, type) else type(value)
        return allowed.get(name, value if issubclass(kind, sympy.Basic) or not callable(value) else not_run)

    # Modules stay out: a name that is one there becomes a symbol, as it does in sympy.
    module = type(sympy)
    names = {n: meaning(n, v) for n, v in everything.items() if not isinstance(v, module) and not n.startswith("_")}
    return {**names, "__builtins__": {}}


def _parsed(text: str, *more: Any) -> Any:
    """The expression in Python's notation; the text itself where it is none."""
    from sympy.parsing.sympy_parser import parse_expr, standard_transformations

    try:
        return parse_expr(text, transformations=(*standard_transformations, *more), global_dict=dict(_names()))
    except Exception:  # of any class: it is an unknown text that is evaluated
        return text


def _number(expression: Any) -> Any:
    """As sympy's ``N``, which reads a text once more, with ``^`` for powers: ``pi^2`` is an expression only here."""
    from sympy import N
    from sympy.parsing.sympy_parser import convert_xor, rationalize

    if isinstance(expression, str):
        expression = _parsed(expression, rationalize, convert_xor)
        if isinstance(expression, str):
            raise ValueError("no expression")
    return N(expression)


def _same(a: str, b: str) -> bool:
    import math

    from sympy import simplify

    x, y = _parsed(a), _parsed(b)
    with contextlib.suppress(Exception):
        if simplify(x - y) == 0:
            return True
    with contextlib.suppress(Exception):
        return math.isclose(_number(x), _number(y), rel_tol=1e-3)
    return False


def main() -> None:
    """Read pairs from the standard input, a JSON list a line, and write the verdicts."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    _parsed("x")
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            verdict = _same(*json.loads(line))
        except (MemoryError, RecursionError):
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    main()
