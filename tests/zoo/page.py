"""docs/models.md, made of the table's rows."""

from collections import Counter
from typing import Any


def page(rows: list[dict[str, Any]], models: int) -> str:
    """The page: a summary, a table for each library, and the sentences that are too long for a cell.

    Args:
        models: how many there are in all.
    """
    methods = list(rows[0]["cells"])
    works = Counter(m for row in rows for m in methods if row["cells"][m]["works"])
    lines = ["# Models", "", HEAD, ""]
    lines.append(
        f"{len(rows)} models{'' if len(rows) == models else f' of {models} so far'}: "
        + ", ".join(f"{m} works on {works[m]}" for m in methods)
        + ". Made by `uv run python -m tests.zoo`"
        " (numbers: `benchmarks/results/zoo.json`)."
    )
    notes: dict[str, int] = {}
    for library in dict.fromkeys(row["model"].split(" ", 1)[0] for row in rows):
        lines += ["", f"## {library}", "", f"| model | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
        for row in rows:
            of, name = row["model"].split(" ", 1)
            if of == library:
                cells = [_cell(row["cells"][m], notes) for m in methods]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    if notes:
        lines += ["", "## Notes", ""]
        lines += [f"{number}. {sentence}" for sentence, number in notes.items()]
    return "\n".join(lines) + "\n"


HEAD = """\
Which models work with which method, each by a tiny random configuration. A cell that says "works" has been asked:

- **Back Razor**: `keep=1` gives the gradients of dense training; `keep=0.1` gives the same loss to the bit, and finite
  gradients. How many times less is saved for the backward pass stands beside it; layers of real models save more.
- **LoRA-XS**: `targets="all-linear"` at rank 2 trains what it says; a saved adapter, loaded, gives the same answers to
  the bit, and the merged model the same answers.
- **LTE**: two heads on every layer that can have them train what they say; the merged weights, in a plain model, give
  the same answers.
- **GaLore**: rank 2 in every linear layer of the blocks, or in convolutions where there is none, trains every
  parameter, and a resumed run goes on with the same bytes.

"Trains what it says" is checked on every parameter: after two steps all that the method says it trains have changed,
and no other. What is left out is named, in the cell or in a note."""


def _cell(cell: dict[str, Any], notes: dict[str, int]) -> str:
    if cell["works"] and len(cell["note"]) < 40:
        return f"works: {cell['note']}" if cell["note"] else "works"
    number = notes.setdefault(cell["note"].replace("|", "\\|").replace("*", "\\*"), len(notes) + 1)
    return f"{'works' if cell['works'] else 'no'} ({number})"
