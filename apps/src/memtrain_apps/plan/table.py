"""A plan as people read it, and as programs do."""

from dataclasses import asdict
from typing import Any

from memtrain_common.console import format_bytes, format_count, format_table

from ..compose.axes import read_settings
from .arms import Arm, Plan
from .known import Known

HEADER = ("train", "save", "optim", "peak", "weights", "gradients", "optimizer", "saved", "time", "score")


def table_of(plan: Plan) -> str:
    """What fits, what does not and what would make it, what is refused and why, and what the numbers leave out."""
    sources: list[str] = []
    parts = [_title(plan)]
    fitting, lacking, refused = plan.fitting, plan.lacking, plan.refused
    top = plan.config.top
    if fitting:
        shown = fitting[: top or None]
        rows = [HEADER, *(_row(arm, sources) for arm in shown)]
        parts.append(f"fits ({len(fitting)}), {ORDERS[plan.config.order]}\n{_columns(rows)}{_more(fitting, top)}")
    if lacking:
        shown = lacking[: top or None]
        rows = [
            ("train", "save", "optim", "peak", "batch ≤", "what would fit, the least change first"),
            *map(_lack, shown),
        ]
        parts.append(f"does not fit ({len(lacking)})\n{_columns(rows)}{_more(lacking, top)}")
    if refused:
        parts.append(f"refused ({len(refused)})\n" + "\n".join(_reasons(refused)))
    parts.append("\n".join(_notes(plan, sources)))
    return "\n\n".join(parts)


ORDERS = {
    "best": "best first: what trains the most numbers, of those what keeps gradients exact, of those the fastest",
    "time": "the fastest first",
    "peak": "the least memory first",
}


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
    return f"{what}\n{config.batch} samples of {size}{micro}, {precision}, on {where}\n{usable}"


def _row(arm: Arm, sources: list[str]) -> tuple[str, ...]:
    found = arm.predicted
    ledger = found.ledger
    saved = format_bytes(ledger["activations"])
    if found.host:
        saved = f"host {format_bytes(found.host)}"
    return (
        arm.axes.train,
        arm.axes.save,
        arm.axes.optim,
        format_bytes(found.peak),
        format_bytes(ledger["weights"]),
        format_bytes(ledger["gradients"]),
        format_bytes(ledger["optimizer"]),
        saved,
        _time(arm),
        _scores(arm.scores, sources),
    )


def _lack(arm: Arm) -> tuple[str, ...]:
    remedies = [
        f"{r.flags} ({format_bytes(r.peak)}, {r.time:.2f}×)" for r in arm.remedies[:2]
    ] or ["no single change; a smaller model, or more GPUs"]  # fmt: skip
    batch = f"{arm.largest:,}" if arm.largest else "none"
    return (
        arm.axes.train,
        arm.axes.save,
        arm.axes.optim,
        format_bytes(arm.predicted.peak),
        batch,
        "; or ".join(remedies),
    )


def _time(arm: Arm) -> str:
    mark = "" if arm.overhead or arm.axes.optim in ("adamw", "sgd") else "*"
    return f"{'≥' if arm.axes.save in ('offload', 'backrazor') else ''}{arm.time:.2f}×{mark}"


def _scores(scores: list[Known], sources: list[str]) -> str:
    return "; ".join(_score(s, sources) for s in scores) or "not measured"


def _score(score: Known, sources: list[str]) -> str:
    rank = f", r {score.rank}" if score.rank else ""
    source = f"{score.study} ({score.source}); in brackets: full training with everything saved there"
    if source not in sources:
        sources.append(source)
    plain = f" ({score.plain:.3g})" if score.plain != score.value else ""
    return f"{score.metric} {score.value:.3g} ± {score.ci95:.2g}{plain}{rank} [{sources.index(source) + 1}]"


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Axes and the last column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 or i == len(row) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _more(arms: list[Arm], top: int) -> str:
    return f"\n  and {len(arms) - top} more: --top 0 shows all" if top and len(arms) > top else ""


def _reasons(arms: list[Arm]) -> list[str]:
    """Each sentence once, with how many combinations it refuses."""
    counts: dict[str, int] = {}
    for arm in arms:
        counts[arm.refused] = counts.get(arm.refused, 0) + 1
    return [f"  {n:>3}  {sentence}" for sentence, n in counts.items()]


def _notes(plan: Plan, sources: list[str]) -> list[str]:
    config = plan.config
    lines = [
        "time: an estimate, matrix products relative to full+all+adamw at the same batch. Not in it: the optimizer's",
        "  own arithmetic, packing (backrazor: ≥), the bus (offload: ≥), small kernels. * not measured.",
    ]
    overheads = {a.overhead for a in plan.fitting if a.overhead}
    lines += [f"  {o.optim}: × {o.factor:.3g}, measured: {o.study} ({o.source})" for o in overheads]
    if any(a.predicted.host for a in plan.fitting):
        lines.append("saved, host: what lies in host memory of each process; it crosses the bus twice a step.")
    if config.device == "cuda":
        lines.append(
            "CUDA's ways (dropout masks, fused attention, foreach steps) are emulated on the CPU; --reserve and"
        )
        lines.append("  --margin stand for the context, workspace and fragmentation, and are assumed, not measured.")
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
        axes: dict[str, Any] = {"train": arm.axes.train, "save": arm.axes.save, "optim": arm.axes.optim}
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
