"""Does a run that is killed, stopped, damaged or given other files ever go on silently wrong? Every training command.

    python -m benchmarks.chaos [--kills 200] [--signals 200] [--damage 300] [--changed 60] [--hostile 100] [--work DIR]

The tries are those of tests/chaos, in full numbers. Each is kept in the work folder, and a second call goes on
behind them; the result is written from all of them. Try n of a family is drawn from the text "FAMILY n".
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "chaos")]

import conftest  # noqa: E402, F401  # threads and libraries as the tests have them, before anything is forked
import damage  # noqa: E402
import harness  # noqa: E402
import hostile  # noqa: E402
import torch  # noqa: E402
from memtrain_common.console import Console  # noqa: E402
from memtrain_common.measuring.bench import write_results  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "chaos.json"
COUNTS = {"damage": 300, "changed": 60, "hostile": 100, "signals": 200, "kills": 200}
FRESH = 10
"""Every so many signals, one goes to an interpreter that starts anew."""


class Tries:
    """One try after another, each in a folder of its own."""

    def __init__(self, work: Path) -> None:
        self.work, self.whole = work, harness.Whole(work)
        self.idle_mib = hostile.idle(work)

    def one(self, family: str, number: int) -> harness.Found:
        draw, cwd, whole = random.Random(f"{family} {number}"), self.work / "try", self.whole
        name = harness.NAMES[number % len(harness.NAMES)]
        shutil.rmtree(cwd, ignore_errors=True)
        if family == "kills":
            return harness.kill(whole, name, draw, cwd)
        if family == "signals" and number % FRESH == 0:
            return harness.interrupt_start(name, draw, cwd)
        if family == "signals":
            return harness.interrupt(whole, name, draw, cwd)
        if family == "changed":
            return damage.changed(whole, number, draw, cwd)
        if family == "hostile":
            return hostile.tried(whole, number, draw, cwd, self.idle_mib)
        cwd.mkdir()
        return damage.damaged(whole, damage.KINDS[number % len(damage.KINDS)], draw, cwd)


def in_turn(counts: dict[str, int]) -> list[tuple[str, int]]:
    """(family, number) of all tries; the two longest families one after another, so that a stop leaves both."""
    short = [(f, n) for f in ("damage", "changed", "hostile") for n in range(counts[f])]
    long = [(f, n) for n in range(max(counts["signals"], counts["kills"])) for f in ("signals", "kills")]
    return short + [(f, n) for f, n in long if n < counts[f]]


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each family: tried, right, and what was wrong; of files from strangers also memory."""
    content: dict[str, Any] = {}
    for family in COUNTS:
        rows = [row for row in done if row["family"] == family]
        wrong = [{"what": row["what"], "why": row["why"]} for row in rows if not row["right"]]
        content[family] = {"tried": len(rows), "right": len(rows) - len(wrong), "wrong": wrong}
    content["kills"]["commands"] = list(harness.NAMES)
    content["damage"]["kinds"] = list(damage.KINDS)
    content["changed"]["kinds"] = sorted({kind for kind, _, _ in damage.CHANGES})
    content["hostile"]["kinds"] = list(hostile.TABLE)
    content["hostile"]["code_ran"] = sum("code ran" in row["why"] for row in done)
    peaks = [row["above_mib"] for row in done if row["family"] == "hostile"]
    content["hostile"]["most_mib_above_idle"] = max(peaks, default=0.0)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "memtrain-chaos")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    journal = asked.work / "tried.jsonl"
    done = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    tried = {(row["family"], row["number"]) for row in done}
    tries, console = Tries(asked.work), Console()
    for family, number in in_turn({name: getattr(asked, name) for name in COUNTS}):
        if (family, number) in tried:
            continue
        row = {"family": family, "number": number, **asdict(tries.one(family, number))}
        done.append(row)
        with journal.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not row["right"]:
            console.say(f"{family} {number}: {row['what']}: {row['why']}")
    content = summary(done)
    for family in COUNTS:
        console.say(f"{family}: {content[family]['right']} of {content[family]['tried']}")
    write_results(RESULT, argv=["python", "-m", "benchmarks.chaos"], device=torch.device("cpu"), seeds=[0], **content)


if __name__ == "__main__":
    main()
