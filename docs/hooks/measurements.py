"""Committed results as pages: what was asked, the command, the device, and every number as a table."""

import ast
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HEAD = ("command", "date", "device", "versions", "git_commit", "seeds")
MOST = 24  # numbers of a list that are written out


def index(results: list[Path]) -> str:
    """Question -> command -> numbers."""
    lines = [
        "# Measurements\n",
        "Every figure of the READMEs comes from one of these files. Each names the command that made it, the device,",
        "the versions and the seeds.\n",
        "| question | command | numbers | device |",
        "|---|---|---|---|",
    ]
    for path in results:
        content = json.loads(path.read_text())
        lines.append(
            f"| {question(content, path)} | `{content['command']}` | "
            f"[{path.name}]({path.stem}.md) | {content['device']} |"
        )
    return "\n".join(lines) + "\n"


def question(content: dict[str, Any], path: Path) -> str:
    """The first sentence of the benchmark module that made it, or its own ``about``."""
    words = content["command"].split()
    words += [f"{w.replace('.', '/')}.py" for w in words if w.startswith("benchmarks.")]  # python -m
    script = next((w for w in words if w.endswith(".py")), None)
    if script and (ROOT / script).exists():
        about = ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""
        return " ".join(about.split("\n\n")[0].split()).replace("|", "\\|")
    return f"The result of `{content['command'].split(' --')[0]}`"


def measurement(path: Path) -> str:
    content = json.loads(path.read_text())
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    seeds = ", ".join(map(str, content["seeds"])) or "none"
    lines = [
        f"# {path.stem.replace('_', ' ')}\n",
        question(content, path) + "\n",
        "| | |\n|---|---|",
        f"| command | `{content['command']}` |",
        f"| file | `benchmarks/results/{path.name}` |",
        f"| date | {content['date']} |",
        f"| device | {content['device']} |",
        f"| seeds | {seeds} |",
        f"| versions | {versions} |\n",
    ]
    body = {k: v for k, v in content.items() if k not in HEAD}
    return "\n".join(lines) + "\n" + "\n".join(tables(body, "Results", 2))


def tables(value: Any, title: str, level: int) -> list[str]:
    """A value as Markdown: plain numbers as one table, then what is nested below headings of its own."""
    out = [f"{'#' * min(level, 6)} {title}\n"]
    if isinstance(value, list):
        rows = [flat(v) if isinstance(v, dict) else {"value": cell(v)} for v in value]
        return [*out, *grid(rows)]
    plain = {k: v for k, v in value.items() if not isinstance(v, dict) and not _rows(v)}
    if plain:
        out += ["| | |", "|---|---|", *(f"| {text(k)} | {cell(v)} |" for k, v in plain.items()), ""]
    nested = {k: v for k, v in value.items() if k not in plain}
    if len(nested) > 1 and all(isinstance(v, dict) and v for v in nested.values()) and _alike(nested):
        return [*out, *grid([{"": text(k), **flat(v)} for k, v in nested.items()])]
    for name, inner in nested.items():
        out += tables(inner, text(name), level + 1)
    return out


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _alike(value: dict[str, dict[str, Any]]) -> bool:
    """Whether the inner dictionaries make one table of a reasonable width."""
    columns = {c for v in value.values() for c in flat(v)}
    shared = set.intersection(*(set(flat(v)) for v in value.values()))
    return len(columns) <= 16 and (len(shared) > 0 or len(columns) <= 6)


def flat(value: dict[str, Any], before: str = "") -> dict[str, str]:
    """Nested dictionaries as one row: ``{"a": {"b": 1}}`` -> ``{"a b": "1"}``."""
    row: dict[str, str] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            row |= flat(inner, f"{before}{name} ")
        else:
            row[text(f"{before}{name}")] = cell(inner)
    return row


def grid(rows: list[dict[str, str]]) -> list[str]:
    """Rows as a table; columns in the order of their first appearance."""
    columns = list(dict.fromkeys(c for row in rows for c in row))
    head = "| " + " | ".join(columns) + " |"
    rule = "|" + "".join("---|" if i == 0 else "--:|" for i, _ in enumerate(columns))
    return [head, rule, *("| " + " | ".join(row.get(c, "") for c in columns) + " |" for row in rows), ""]


def cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        words = [cell(v) for v in value]
        return ", ".join(words) if len(words) <= MOST else f"{', '.join(words[:4])}, … ({len(words)} values)"
    if isinstance(value, dict):
        return "; ".join(f"{text(k)} {cell(v)}" for k, v in value.items())
    return text(value)


def text(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", " ").split())
