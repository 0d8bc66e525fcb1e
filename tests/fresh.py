"""Scripts as a new interpreter would run them once it has torch: without what this process has imported since.

The process that they are forked from is forked itself when conftest.py is loaded, before any test imports our packages,
transformers or PEFT. An interpreter that is started instead loads torch anew, which takes longer than most tests.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import IO

_ask: IO[str]
_told: IO[str]


def start() -> None:
    """Fork it, now. It ends when this process does, since its requests then come to an end."""
    global _ask, _told
    asked, ask = os.pipe()
    told, tell = os.pipe()
    if os.fork() == 0:
        os.close(ask)
        os.setsid()
        with os.fdopen(asked) as requests, os.fdopen(tell, "w") as answers:
            for line in requests:
                print(_run(**json.loads(line)), file=answers, flush=True)
        os._exit(0)
    os.close(asked)
    os.close(tell)
    _ask, _told = os.fdopen(ask, "w"), os.fdopen(told)


def run_fresh(
    source: str, *words: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python source.

    Args:
        words: ``sys.argv[1:]``.
        environment: variables besides this process's.
    """
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as err:
        request = {"source": source, "words": words, "environment": {**os.environ, **(environment or {})}}
        print(json.dumps({**request, "cwd": os.getcwd(), "files": [out.name, err.name]}), file=_ask, flush=True)
        return subprocess.CompletedProcess(words, int(_told.readline()), out.read(), err.read())


def _run(source: str, words: Sequence[str], environment: Mapping[str, str], cwd: str, files: Sequence[str]) -> int:
    """-> the exit code of a script."""
    if (pid := os.fork()) != 0:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        for fd, name in enumerate(files, start=1):
            os.dup2(os.open(name, os.O_WRONLY), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        sys.path.insert(0, "")
        sys.argv = ["-c", *words]
        exec(compile(source, "script", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
