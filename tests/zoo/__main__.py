"""Every method on every model: `uv run python -m tests.zoo` makes benchmarks/results/zoo.json and docs/models.md.

Each model has a process of its own, with a limit of memory and of processor time, so that one bad model ends no other.
Models that the table has are not made again (but with --again); what a run that was stopped has found stands in a file
beside (--found), from which the next one goes on. --only makes those anew whose name has this in it.
"""

import argparse
import dataclasses
import json
import os
import resource
import sys
import tempfile
import traceback
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .case import Case

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "zoo.json", ROOT / "docs" / "models.md"
PROCESSOR_SECONDS, MEMORY_BYTES = 240, 6 << 30


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    words.add_argument("--only", default="", help="models whose name has this in it; made again")
    words.add_argument(
        "--found", default=str(ROOT / "runs" / "zoo.jsonl"), help="what is known already, a line a model"
    )
    words.add_argument("--again", action="store_true", help="make the models of the table again")
    words.add_argument("--at-once", type=int, default=1, help="models at the same time")
    words.add_argument("--show", action="store_true", help="print the cells instead of writing the table")
    chosen = words.parse_args()
    os.nice(10)
    import torch

    torch.set_num_threads(1)
    from .cells import METHODS  # noqa: F401  # before the processes part, which then need not load it each
    from .page import page
    from .zoo import cases

    warnings.simplefilter("ignore")
    every = cases()
    found_at = Path(chosen.found)
    found_at.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    if RESULTS.exists() and not chosen.again:
        known = {row["model"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    if found_at.exists():
        known |= {row["model"]: row for row in map(json.loads, found_at.read_text().splitlines())}
    wanted = [n for n in every if (chosen.only in n if chosen.only else n not in known)]
    with ThreadPool(chosen.at_once) as pool:  # each waits for a process
        for i, row in enumerate(pool.imap_unordered(lambda name: _apart(name, every[name]), wanted)):
            known[row["model"]] = row
            with found_at.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{i + 1}/{len(wanted)} {row['model']}: {_said(row)}", flush=True)
    if chosen.show:
        return
    from memtrain_common.measuring.bench import write_results

    rows = [known[name] for name in every if name in known]
    write_results(
        RESULTS,
        argv=["python", "-m", "tests.zoo"],
        device=torch.device("cpu"),
        seeds=[0],
        processor_seconds=round(sum(row["seconds"] for row in rows)),
        models=len(every),
        rows=rows,
    )
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows, len(every)))


def _apart(name: str, case: "Case") -> dict[str, Any]:
    """A model's row, made by a forked process; a model that meets a limit has one sentence in every cell."""
    with tempfile.TemporaryFile() as answer:
        if (child := os.fork()) == 0:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 5))
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
                from .cells import row

                cells = {method: dataclasses.asdict(cell) for method, cell in row(case).items()}
                os.write(answer.fileno(), json.dumps(cells).encode())
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status, used = os.wait4(child, 0)
        answer.seek(0)
        text = answer.read()
    if text and status == 0:
        cells = json.loads(text)
    else:
        how = f"its process ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "its process failed"
        cells = {m: {"works": False, "note": how} for m in ("Back Razor", "LoRA-XS", "LTE", "GaLore")}
    return {"model": name, "seconds": round(used.ru_utime + used.ru_stime, 1), "cells": cells}


def _said(row: dict[str, Any]) -> str:
    cells = (f"{m}: {'' if c['works'] else 'NOT '}{c['note'] or 'works'}" for m, c in row["cells"].items())
    return f"{row['seconds']} s\n    " + "\n    ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
