"""Linting, formatting and types, as CONTRIBUTING.md asks for them."""

import ast
import re
import subprocess
import sys

import pytest
from support import ROOT

CHECKS = [
    pytest.param(["mypy"], id="types", marks=pytest.mark.slow),
    pytest.param(["ruff", "check", "."], id="lint"),
    pytest.param(["ruff", "format", "--check", "."], id="format"),
    pytest.param(["codespell_lib"], id="spelling"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_style(check):
    done = subprocess.run([sys.executable, "-m", *check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_error_sentences_end_alike():
    """One sentence without a full stop, since commands put words before it and callers after it."""
    ending = []
    for path in [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("apps/src/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            last = node.exc.args[-1]
            parts = last.values if isinstance(last, ast.JoinedStr) else [last]
            text = parts[-1].value if isinstance(parts[-1], ast.Constant) else None
            if isinstance(text, str) and text.endswith("."):
                ending.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    assert ending == []


RIDDLES = re.compile(
    "cannot meet|share one ruler|one memory ruler|for who knows|who knows nanoGPT|"
    "processes ask each other|Entered from within"
)


def test_words_that_nobody_understands_stay_away():
    """Sentences that readers stumbled over: who does what, in the field's words."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/**/*.md"), *ROOT.glob("apps/**/*.md")]
    texts += [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("apps/src/**/*.py"), *ROOT.glob("examples/*.py")]
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p in texts if (m := RIDDLES.search(p.read_text()))]
    assert len(texts) > 200
    assert found == []
