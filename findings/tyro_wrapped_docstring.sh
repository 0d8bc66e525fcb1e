#!/usr/bin/env bash
# tyro 1.0.17: a field's docstring of two source lines keeps its line break in --help, though tyro joins such lines.
#
# tyro promises paragraphs: single line breaks in help texts are removed, so that the terminal's width decides. Of an
# attribute docstring it removes them before it takes the indentation away, and a line that begins with white space
# counts as one that was meant to begin anew. So only docstrings whose second line has no indentation are joined, and
# a docstring within a class always has some.
#
# Expected: "... one paragraph that the terminal wraps"; seen: a break after the source's first line.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tyro==1.0.17
cat > "$folder/command.py" <<'PYTHON'
from dataclasses import dataclass

import tyro


@dataclass
class Config:
    steps: int = 10
    """Optimizer steps of
    one run."""


print(tyro.__version__)
tyro.cli(Config, args=["--help"])
PYTHON
COLUMNS=100 "$folder/venv/bin/python" "$folder/command.py" | tee "$folder/seen"
if grep -q "Optimizer steps of one run" "$folder/seen"; then
    echo "changed: the two lines are one now" >&2
    exit 1
fi
grep -q "Optimizer steps of" "$folder/seen"
echo "as described: the help breaks after the first source line, with room for the whole sentence beside it"
