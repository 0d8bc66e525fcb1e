"""``plan``: make a plan, and say it."""

import json
from dataclasses import replace
from pathlib import Path

from memtrain_common.console import Console, format_bytes
from memtrain_common.errors import UserError

from .arms import Plan
from .config import PlanConfig
from .plan import make_plan
from .shapes import find_shape
from .table import as_json, columns, measured_table, table_of, time_of

WELL_KNOWN = (
    "google/vit-large-patch16-224", "google-bert/bert-base-uncased", "meta-llama/Llama-2-7b",
    "mistralai/Mistral-7B-v0.1",
)  # fmt: skip
"""What is planned where no model is named."""


def run_plan(config: PlanConfig) -> Plan | None:
    """Plan, and print the answer; None where no model is named.

    Raises:
        UserError: if the model is unknown, or nothing fits by any choice or batch.
    """
    console = Console()
    if not config.model:
        console.say(overview(config, console))
        return None
    plan = make_plan(config, console)
    console.say(json.dumps(as_json(plan), indent=1) if config.json else table_of(plan))
    if config.png:
        from .picture import draw_plan

        draw_plan(plan, Path(config.png))
        if not config.json:
            console.say(f"\npicture {config.png}")
    if config.reserved:
        from .reserved import reserved_table

        console.say(reserved_table(plan))
    if config.measure:
        console.say(measured_table(plan))
    return plan


def overview(config: PlanConfig, console: Console) -> str:
    """The best choice of each well-known model; language models at a batch that is not larger than 8."""
    rows = [("model", "best that fits", "batch", "peak", "time", "fit")]
    for name in WELL_KNOWN:
        batch = min(config.batch, 8 * config.gpus) if find_shape(name).task == "language" else config.batch
        try:
            plan = make_plan(replace(config, model=name, batch=batch, seq_len=0, image_size=0, classes=0), console)
        except UserError as error:
            rows.append((name, str(error).split(";")[0].partition(": ")[2] or str(error), "", "", "", "0"))
            continue
        if plan.fitting:
            best = plan.fitting[0]
            found = (best.axes.name, f"{batch}", format_bytes(best.predicted.peak), time_of(best))
        else:
            found = ("none at this batch", f"{batch}", "", "")
        rows.append((name, *found, f"{len(plan.fitting)} of {len(plan.fitting) + len(plan.lacking)}"))
    head = (
        f"budget {config.budget} = {config.budget_bytes:,} bytes a device; {format_bytes(config.usable_bytes)} for the "
        f"peak\n--model NAME plans one of them, or any folder of transformers, in full; --list-models names others"
    )
    return f"{head}\n\n{columns(rows, left=2)}"
