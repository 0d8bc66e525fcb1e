"""A plan as people read it, and as programs do."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from memtrain_common.commands.configure import flag
from memtrain_common.console import format_bytes, format_count, format_table

from ..compose.axes import read_settings, save_words
from .arms import Arm, Plan
from .known import differing

HEADER = ("train", "save", "optim", "peak", "weights", "grads", "state", "saved", "time", "score")
WIDTH = 100
"""Columns that the table keeps to."""
ORDERS = {
    "best": "best first: what trains the most numbers, of those what keeps gradients exact, of those the fastest",
    "time": "the fastest first",
    "peak": "the least memory first",
}


def table_of(plan: Plan) -> str:
    """What fits, what does not and what would make it, what is refused and why, and what the numbers leave out."""
    sources: list[str] = []
    parts = [_title(plan)]
    fitting, lacking, refused = plan.fitting, plan.lacking, plan.refused
    top = plan.config.top
    if fitting:
        unit = unit_of(max(a.predicted.peak for a in fitting[: top or None]))
        rows = [HEADER, *(_row(arm, unit, sources) for arm in fitting[: top or None])]
        title = f"fits ({len(fitting)}), in {unit[0]}, {ORDERS[plan.config.order]}"
        parts.append(f"{_wrapped(title)}\n{columns(rows)}{_more(fitting, top)}")
    if lacking:
        shown = lacking[: top or None]
        unit = unit_of(max(a.predicted.peak for a in shown))
        rows = [("train", "save", "optim", "peak", "batch ≤"), *(_lack(arm, unit) for arm in shown)]
        head, *lines = columns(rows).split("\n")
        found = [f"{line}\n{_wrapped(_remedies(arm), '      ')}" for line, arm in zip(lines, shown, strict=True)]
        title = f"does not fit ({len(lacking)}), in {unit[0]}; below each what would fit, the least change first"
        parts.append("\n".join([title, head, *found]) + _more(lacking, top))
    if refused:
        parts.append(f"refused ({len(refused)})\n" + "\n".join(_reasons(refused)))
    parts.append("\n".join(_wrapped(line) for line in _notes(plan, sources)))
    return "\n\n".join(parts)


Unit = tuple[str, int, int]


def unit_of(most: float) -> Unit:
    """One unit for a table, by its largest number: (name, bytes, decimals)."""
    name, size = next((u for u in (("GiB", 2**30), ("MiB", 2**20)) if most >= u[1]), ("KiB", 2**10))
    return name, size, 2 if most < 100 * size else 1


def _amount(n_bytes: float, unit: Unit) -> str:
    return f"{n_bytes / unit[1]:.{unit[2]}f}"


def _wrapped(text: str, indent: str = "", after: str = "  ") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + after, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _title(plan: Plan) -> str:
    config, place = plan.config, plan.place
    parameters = max((a.predicted.parameters for a in plan.arms if a.axes.train == "full" and a.forecast), default=0)
    shape = place.step.shape
    size = f"{place.step.tokens} tokens" if place.step.tokens else f"{shape.image_size} pixels"
    what = f"{config.model}" + (f", {format_count(parameters)} parameters" if parameters else "")
    micro = f" × {place.micro_batches} micro-batches" if place.micro_batches > 1 else ""
    precision = f"weights {config.weights}" + (f", autocast {config.dtype}" if config.dtype != "float32" else "")
    where = f"{config.gpus} GPUs by {config.parallel}" if config.gpus > 1 else f"one {config.device} device"
    usable = (
        f"budget {config.budget} = {config.budget_bytes:,} bytes a device; {config.reserve} set aside and a margin of "
        f"{config.margin:.0%} leave {format_bytes(config.usable_bytes)} for the predicted peak"
    )
    lines = (what, f"{config.batch} samples of {size}{micro}, {precision}, on {where}", usable)
    return "\n".join(_wrapped(line) for line in lines)


def _row(arm: Arm, unit: Unit, sources: list[str]) -> tuple[str, ...]:
    found = arm.predicted
    ledger = found.ledger
    saved = f"{_amount(found.host, unit)}h" if found.host else _amount(ledger["activations"], unit)
    held = (found.peak, ledger["weights"], ledger["gradients"], ledger["optimizer"])
    amounts = [_amount(n, unit) for n in held]
    return (*_choices(arm), *amounts, saved, time_of(arm), _score(arm, sources))


def _choices(arm: Arm) -> tuple[str, str, str]:
    return arm.axes.train, save_words(arm.axes), arm.axes.optim


def _lack(arm: Arm, unit: Unit) -> tuple[str, ...]:
    batch = f"{arm.largest:,}" if arm.largest else "none"
    return (*_choices(arm), _amount(arm.predicted.peak, unit), batch)


def _remedies(arm: Arm) -> str:
    remedies = [
        f"{r.flags} ({format_bytes(r.peak)}, {'' if r.measured else '~'}{r.time:.2f}×)" for r in arm.remedies[:2]
    ]
    return "; or ".join(remedies) or "no single change; a smaller model, or more GPUs"


def time_of(arm: Arm) -> str:
    """Measured where it was, otherwise estimated (~), or a part of it (≥)."""
    if arm.timing is not None:
        return f"{arm.timing.factor:.2f}×"
    return f"{'≥' if arm.axes.save in ('offload', 'backrazor') else '~'}{arm.time:.2f}×"


def _score(arm: Arm, sources: list[str]) -> str:
    """The first score and the number of its source, with the settings that are not the planned ones; --json has all."""
    if not arm.scores:
        return "-"
    score = arm.scores[0]
    other = {n: v for n, v in differing(score.settings, arm.axes).items() if n != "checkpoint_blocks"}
    words = [f"{flag(n)} {v:g}" if isinstance(v, float) else f"{flag(n)} {v}" for n, v in other.items()]
    there = f", by {' '.join(words)}" if words else ""
    source = f"{score.metric}, {score.study}{there} (plain arm there: {score.plain:.3g}; {score.source})"
    if source not in sources:
        sources.append(source)
    return f"{score.value:.3g} [{sources.index(source) + 1}]"


def columns(rows: Sequence[tuple[str, ...]], left: int = 3) -> str:
    """The first ones to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _more(arms: list[Arm], top: int) -> str:
    return f"\n  and {len(arms) - top} more: --top 0 shows all" if top and len(arms) > top else ""


def _reasons(arms: list[Arm]) -> list[str]:
    """Each sentence once, with how many combinations it refuses."""
    counts: dict[str, int] = {}
    for arm in arms:
        counts[arm.refused] = counts.get(arm.refused, 0) + 1
    return [_wrapped(f"{n:>3}  {sentence}", "  ", "     ") for sentence, n in counts.items()]


def _notes(plan: Plan, sources: list[str]) -> list[str]:
    config = plan.config
    lines = [
        "time: of a step, relative to full+all+adamw at the same batch. Without a mark it was measured; ~ is an "
        "estimate by matrix products, ≥ one without packing (backrazor) or the bus (offload).",
    ]
    timings = {(t.study, t.source) for a in plan.fitting if (t := a.timing)}
    lines += [f"  measured: {study} ({source})" for study, source in sorted(timings)]
    overheads = {a.overhead for a in plan.fitting if a.overhead}
    for o in overheads:
        over = f"× {o.factor:.3g}" if o.factor != 1 else "no difference from adamw"
        lines.append(f"  {o.optim}: {over}, measured: {o.study} ({o.source})")
    lines.append("score: - is not measured; in brackets its sources. Compare it with the plain arm of the same source.")
    if any(a.predicted.host for a in plan.fitting):
        lines.append("saved, h: lies in host memory of each process; it crosses the bus twice a step.")
    if config.device == "cuda":
        lines.append(
            "CUDA's ways (dropout masks, fused attention, foreach steps) are emulated on the CPU; --reserve and "
            "--margin stand for the context, workspace and fragmentation, and are assumed, not measured."
        )
    if config.device == "cuda" and config.weights == config.dtype == "float32" and _grouped(plan):
        lines.append(
            "grouped keys and values in float32: a batch without padding loses the fused kernel on CUDA and saves more."
        )
    if config.gpus > 1 and config.parallel == "fsdp":
        lines.append("fsdp: peaks are bounds: shards, the parts outside blocks whole, and up to three blocks gathered.")
    lines += [f"[{i}] {source}" for i, source in enumerate(sources, start=1)]
    return lines


def _grouped(plan: Plan) -> bool:
    shape = plan.place.step.shape.config
    return shape.get("num_key_value_heads", shape.get("num_attention_heads")) != shape.get("num_attention_heads")


def as_json(plan: Plan) -> dict[str, Any]:
    """Every combination; bytes as numbers."""
    config, place = plan.config, plan.place
    arms = []
    for arm in plan.arms:
        axes: dict[str, Any] = {"train": arm.axes.train, "save": save_words(arm.axes), "optim": arm.axes.optim}
        if arm.forecast is None:
            arms.append({**axes, "status": "refused", "reason": arm.refused})
            continue
        found = arm.forecast
        arms.append(
            {
                **axes,
                "settings": read_settings(arm.axes),
                "status": "fits" if arm.fits else "does not fit",
                "peak_bytes": found.peak,
                "ledger_bytes": found.ledger,
                "host_bytes": found.host,
                "ddp_bucket_bytes": found.buckets,
                "fsdp_gathered_bytes": found.gathered,
                "trained_parameters": found.trained,
                "flops": found.flops,
                "relative_time_estimate": round(arm.time, 4),
                "time_overhead": asdict(arm.overhead) if arm.overhead else None,
                "time_measured": asdict(arm.timing) if arm.timing else None,
                "largest_batch": arm.largest,
                "scores": [asdict(s) for s in arm.scores],
                "remedies": [asdict(r) for r in arm.remedies],
            }
        )
    return {
        "model": config.model,
        "batch": config.batch,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "tokens": place.step.tokens,
        "image_size": place.step.shape.image_size,
        "weights": config.weights,
        "autocast": config.dtype,
        "device": config.device,
        "gpus": config.gpus,
        "parallel": config.parallel,
        "budget_bytes": config.budget_bytes,
        "reserve_bytes": config.reserve_bytes,
        "margin": config.margin,
        "usable_bytes": config.usable_bytes,
        "combinations": arms,
    }


def measured_table(plan: Plan) -> str:
    """The best that fits, trained two steps here: its ledger beside the prediction."""
    import torch
    from memtrain_common.errors import UserError
    from memtrain_common.training.cpu_workarounds import avoid_broken_amx

    from .measuring import measure_place

    config = plan.config
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--measure on --device cuda needs a CUDA GPU and this machine has none: plan with --device cpu")
    arms = [a for a in plan.fitting if config.device == "cuda" or a.axes.save != "offload"]
    if not arms:
        raise UserError("--measure has nothing to run: no combination fits the budget as it is")
    if "bfloat16" in (config.weights, config.dtype) and config.device == "cpu":
        avoid_broken_amx()
    arm = arms[0]
    measured, peak = measure_place(plan.place, arm.axes, torch.device(config.device))
    predicted = {**arm.predicted.ledger, "peak": arm.predicted.peak}
    rows = [("", "measured", "predicted", "error")]
    for name, value in {**measured, "peak": peak}.items():
        there = predicted[name] + (arm.predicted.host if name == "activations" else 0)
        error = f"{there / value - 1:+.2%}" if value else "-"
        rows.append((name, format_bytes(value), format_bytes(there), error))
    return f"\n{arm.axes.name}, two steps on {config.device}\n{format_table(rows)}"
