"""One HTML file of an ablation: every figure inline, no script, nothing fetched."""

import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from memtrain_common.console import format_bytes, format_count, format_seconds
from memtrain_common.errors import UserError
from memtrain_common.files import read_json

from ..compose.axes import OPTIM, SAVE, TRAIN
from .charts import Line, Point, curves, scatter, swatch
from .comparing import baseline_of, choices, csv_link, orders, paired_text, used
from .grid import flag_words
from .results import CATEGORIES, LOWER_IS_BETTER, Summary

SHAPES = dict(zip(SAVE, ("circle", "square", "triangle", "diamond"), strict=True))


def write_report(folder: Path, found: Sequence[Summary]) -> Path:
    """``report.html`` in an ablation's folder, from the summaries of its results."""
    try:
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        config = {**config}
    except (ValueError, TypeError):
        raise UserError(f"{folder / 'config.json'} is damaged: put it right, or remove it to do without it") from None
    path = folder / "report.html"
    partial = path.with_suffix(".partial")
    try:
        text = render(found, config)
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration, jinja2.TemplateError) as error:
        raise UserError(f"the results in {folder} do not hold what a report needs ({error!r})") from error
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)
    return path


def render(found: Sequence[Summary], config: dict[str, Any]) -> str:
    """The page.

    Args:
        config: the ablation's config.json: command, date, device, versions, grid.
    """
    config = {**dict.fromkeys(("command", "date", "device", "versions", "git_commit", "places")), **config}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("memtrain_apps"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"bytes": format_bytes, "count": format_count, "seconds": format_seconds, "error": _error}
    trained = [s for s in found if s.runs]
    arms = [r for s in found for r in s.results]
    predicted = [s for s in found if s.predicted]
    baseline = baseline_of(trained)
    filters = {axis: used(found, axis, values) for axis, values in (("train", TRAIN), ("save", SAVE), ("optim", OPTIM))}
    return environment.get_template("report.html.j2").render(
        found=found,
        trained=trained,
        ranked=sorted(trained, key=lambda s: s.rank),
        arms=arms,
        facts=facts(trained),
        baseline=baseline,
        paired_text=paired_text,
        choices=choices(trained, baseline) if baseline else [],
        orders=orders(trained),
        filters={axis: values for axis, values in filters.items() if values},
        csv=csv_link(found),
        seeds=sorted({r["seed"] for r in arms}),
        names=[n for n in ("out of memory", "diverged", "killed", "failed", "refused") if _with(found, n)],
        with_status={n: _with(found, n) for n in ("out of memory", "diverged", "killed", "failed", "refused")},
        categories=CATEGORIES,
        predicted=predicted,
        largest=max((sum(_bytes(s).values()) for s in predicted), default=1.0),
        bytes_of=_bytes,
        scatters=_scatters(trained),
        legend=_legend(trained),
        panels=_panels(trained),
        slowest=max((s.seconds for s in trained), default=1.0),
        energy=_energy(trained),
        peaks=any(_peak(s) for s in trained),
        peak_of=_peak,
        errors=_largest_errors(trained),
        config=config,
        pretraining=_pretraining(config),
    )


# -- numbers -------------------------------------------------------------------------------------------------------


def facts(trained: Sequence[Summary]) -> list[tuple[str, str, str]]:
    """(what, figure, explanation) for the top of the page."""
    if not trained:
        return []
    best = min(trained, key=lambda s: s.rank)
    out = [(f"best {best.metric}", best.score_text, f"{best.number} {best.label}, {format_bytes(best.memory_bytes)}")]
    better = -1 if best.metric in LOWER_IS_BETTER else 1
    near = [s for s in trained if better * (s.score - best.score) >= -max(best.interval[1], 0)]
    least = min(near, key=lambda s: s.memory_bytes)
    if least is not best:
        out.append((
            "least memory within its confidence interval", format_bytes(least.memory_bytes),
            f"{least.number} {least.label}, {best.memory_bytes / least.memory_bytes:.1f} times less; "
            f"{least.metric} {least.score_text}",
        ))  # fmt: skip
    plain = next((s for s in trained if list(s.axes.values()) == ["full", "all", "adamw"]), None)
    smallest = min(trained, key=lambda s: s.memory_bytes)
    if plain is not None and smallest not in (least, plain):
        ratio = plain.memory_bytes / smallest.memory_bytes
        out.append((
            "least memory of all", format_bytes(smallest.memory_bytes),
            f"{smallest.number} {smallest.label}, {ratio:.1f} times less than full · all · adamw; "
            f"{smallest.metric} {smallest.score_text}",
        ))  # fmt: skip
    worst = max((abs(e) for e in _largest_errors(trained).values()), default=0.0)
    out.append(("largest error of a prediction", _error(worst), "of any category of any combination's ledger"))
    return out


def _largest_errors(trained: Sequence[Summary]) -> dict[str, float]:
    """By category, the error that is farthest from 0."""
    out = {}
    for category in CATEGORIES:
        errors = [e for s in trained if s.predicted and (e := s.error_of(category)) is not None]
        if errors:
            out[category] = max(errors, key=abs)
    return out


def _pretraining(config: dict[str, Any]) -> str | None:
    """The command of the run before all arms."""
    flags = config.get("config", {}).get("pretrain")
    return None if flags is None else shlex.join(["finetune", *flag_words({"tracker": "none", **flags})])


def _error(value: float | None) -> str:
    if value is None:
        return "–"
    if math.isinf(value):
        return "not predicted"
    return "0 %" if not value else f"{100 * value:+.2f} %" if abs(value) < 0.1 else f"{100 * value:+.0f} %"


def _bytes(s: Summary) -> dict[str, float]:
    """Measured where it was trained, otherwise predicted."""
    return s.measured if s.runs else s.predicted or dict.fromkeys(CATEGORIES, 0.0)


def _peak(s: Summary) -> float | None:
    """The CUDA allocator's peak while training; what a whole process holds on the CPU says little of a method."""
    if not all(str(r.get("device", "")).startswith("cuda") for r in s.runs):
        return None
    values = [(r.get("peak_bytes") or {}).get("training") for r in s.runs]
    return statistics.fmean(values) if values and None not in values else None  # type: ignore[arg-type]


def _energy(trained: Sequence[Summary]) -> dict[int, float | None]:
    return {s.number: s.mean("joules") for s in trained}


def _with(found: Sequence[Summary], status: str) -> list[tuple[Summary, list[dict[str, Any]]]]:
    pairs = [(s, [r for r in s.results if r["status"] == status]) for s in found]
    return [(s, rs) for s, rs in pairs if rs]


# -- figures -------------------------------------------------------------------------------------------------------


def _scatters(trained: Sequence[Summary]) -> list[tuple[str, Markup]]:
    """The figure for wide and for narrow screens."""
    if not trained:
        return []
    accuracy = trained[0].metric == "accuracy"
    points = [
        Point(
            s.memory_bytes, s.score, s.interval[1], s.number, s.label, SHAPES[s.axes["save"]],  # type: ignore[index]
            f"t-{s.axes['train']}" + ("" if s.axes["optim"] == "adamw" else " hollow"), s.on_front,
            f"{s.number} {s.label}: {s.metric} {s.score_text}, {format_bytes(s.memory_bytes)}",
            " ".join(f"is-{choice}" for choice in s.axes.values()),
        )
        for s in trained
    ]  # fmt: skip
    front = ", ".join(f"{s.label} ({s.score_text}, {format_bytes(s.memory_bytes)})" for s in trained if s.on_front)
    return [
        (
            css,
            scatter(
                points, width=width, height=height, long_labels=css == "wide",
                x_text=lambda v: format_bytes(v).replace(".0 ", " "),
                y_text=(lambda v: f"{100 * v:g} %") if accuracy else (lambda v: f"{v:g}"),
                x_name="memory of a training step", y_name=f"{trained[0].metric} on the test split",
                y_limits=(0.0, 1.0) if accuracy else (-math.inf, math.inf),
                title=f"{trained[0].metric} against memory of {len(points)} combinations",
                describe=f"On the Pareto front: {front}.",
            ),
        )
        for css, width, height in (("wide", 1000, 500), ("narrow", 358, 430))
    ]  # fmt: skip


def _legend(trained: Sequence[Summary]) -> list[tuple[Markup, str]]:
    trains = [t for t in TRAIN if any(s.axes["train"] == t for s in trained)]
    saves = [v for v in SAVE if any(s.axes["save"] == v for s in trained)]
    out: list[tuple[Markup, str]] = [(swatch("circle", f"t-{t}"), t) for t in trains]
    out += [(swatch(SHAPES[v], "t-none"), f"save {v}") for v in saves]
    if any(s.axes["optim"] != "adamw" for s in trained):
        out.append((swatch("circle", "t-none hollow"), "optim other than adamw"))
    return out


def _panels(trained: Sequence[Summary]) -> list[tuple[str, Markup, list[tuple[str, Summary]]]]:
    """One panel of loss curves for each train: (its name, the figure, [(a line's class, its combination)])."""
    every = [(s, _over_seeds(s, "train"), _over_seeds(s, "val")) for s in trained]
    values = sorted(y for _, a, b in every for rows in (a, b) for _, _, y, _ in rows)
    if not values:
        return []
    # the highest few are the first steps of what begins badly: they would flatten all else
    limits = (0.0 if values[0] >= 0 else values[0], values[min(len(values) - 1, int(0.985 * len(values)))] * 1.05)
    x_high = max(rows[-1][0] for _, a, b in every for rows in (a, b) if rows)
    out: list[tuple[str, Markup, list[tuple[str, Summary]]]] = []
    for train in TRAIN:
        lines: list[Line] = []
        keys: list[tuple[str, Summary]] = []
        for s, fit, val in every:
            if s.axes["train"] != train:
                continue
            css = f"l{len(lines) % 6}"
            xs, low, ys, high = ([row[i] for row in fit] for i in range(4))
            lines.append(Line(css, xs, ys, low, high, [(x, y) for x, _, y, _ in val]))
            keys.append((css, s))
        if lines:
            ends = ", ".join(
                f"{s.label} {line.ys[-1]:.3g}" for line, (_, s) in zip(lines, keys, strict=True) if line.ys
            )
            figure = curves(
                lines, width=344, height=230, x_high=x_high, y_limits=limits, title=f"loss curves of train {train}",
                describe=f"Training loss at the end: {ends}.",
            )  # fmt: skip
            out.append((train, figure, keys))
    return out


def _over_seeds(s: Summary, split: str) -> list[tuple[float, float, float, float]]:
    """(step, least, mean, most) of the loss, at steps that every seed logged."""
    by_step: dict[int, list[float]] = {}
    for run in s.runs:
        for row in run.get("curve", []):
            if row["split"] == split and row.get("loss") is not None:
                by_step.setdefault(row["step"], []).append(row["loss"])
    whole = {k: v for k, v in sorted(by_step.items()) if len(v) == len(s.runs)}
    return [(k, min(v), statistics.fmean(v), max(v)) for k, v in whole.items()]
