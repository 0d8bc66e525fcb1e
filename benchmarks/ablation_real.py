"""The grids of real models that come with ablate, one seed: what each arm ends at, its memory, a picture.

    MEMTRAIN_DATA=FOLDER uv run --with PyQt6-WebEngine python benchmarks/ablation_real.py dinov2|minilm

FOLDER holds weights/ and the data, as real_models.py and the data's own sources give them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ablation_digits import CPU, RESULTS, ablate, kept_where_it_fails, row
from memtrain_apps.ablate.results import read_results, summarise
from memtrain_common.commands.cli import run_command
from memtrain_common.errors import UserError
from memtrain_common.measuring.bench import write_results
from photograph import photograph
from real_data import data

GRIDS = {"dinov2": ("weights/dinov2_small", "medmnist"), "minilm": ("weights/minilm_l6", "glue")}


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1 or argv[0] not in GRIDS:
        raise UserError(f"give one grid, of {', '.join(GRIDS)}")
    grid, held = argv[0], data()
    with kept_where_it_fails() as place:
        folder = Path(place) / grid
        model, rows = (Path(part).name for part in GRIDS[grid])
        for part in GRIDS[grid]:  # so that commands and report do not name this machine's folders
            (Path(place) / Path(part).name).symlink_to(held / part)
        ablate(folder, grid, "--seeds", "1", after=("--", "--model", model, "--data-dir", rows))
        found = [s for s in summarise(read_results(folder)) if s.runs]
        photograph(folder / "report.html", RESULTS / f"ablation_{grid}.png")
    arms = [row(s) for s in sorted(found, key=lambda s: s.rank)]
    write_results(
        RESULTS / f"ablation_{grid}.json", argv=["python", "benchmarks/ablation_real.py", grid], device=CPU,
        seeds=[r["seed"] for r in found[0].results], arms=arms,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/ablation_real.py"))
