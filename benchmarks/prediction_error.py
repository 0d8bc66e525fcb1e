"""How far is ``plan`` from a real step? Six combinations, each beside its prediction.

    python benchmarks/prediction_error.py            # ViT-B/16, BERT-base and GPT-2 small, each in its own process

Two real steps of each in float32 on the CPU, below 4 GiB; the peak is the most that live tensors hold.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = {"google/vit-base-patch16-224": 2, "google-bert/bert-base-uncased": 2, "openai-community/gpt2": 2}
TOKENS = 64
CATEGORIES = ("weights", "gradients", "optimizer", "activations")


COMBINATIONS = (
    "full+all+adamw", "lora+backrazor+adamw", "full+all+galore-adamw", "full+checkpoint+sgd", "lora-xs+all+adamw",
    "lte+all+adamw",
)  # fmt: skip


def measure_model(name: str) -> list[dict[str, Any]]:
    """Predicted and measured bytes of every combination, or why it is refused."""
    import torch
    from memtrain_apps.compose.axes import Axes
    from memtrain_apps.plan.forecast import Workplace, predict_arm
    from memtrain_apps.plan.measuring import measure_place
    from memtrain_apps.plan.shapes import find_shape
    from memtrain_apps.plan.uses import Step
    from memtrain_common.commands.quiet import quiet_libraries
    from memtrain_common.errors import UserError

    quiet_libraries()
    shape = find_shape(name)
    step = Step(shape, 0 if shape.task == "pictures" else TOKENS, cuda=False)
    arms: list[dict[str, Any]] = []
    for name_of_arm in COMBINATIONS:
        train, save, optim = name_of_arm.split("+")
        axes = Axes(train, save, optim, heads=2)  # type: ignore[arg-type]
        place = Workplace(step, rows=MODELS[name])
        arm: dict[str, Any] = {"train": train, "save": save, "optim": optim}
        try:
            began = time.perf_counter()
            found = predict_arm(place, axes)
            arm["predicting_seconds"] = round(time.perf_counter() - began, 2)
            ledger, peak = measure_place(place, axes, torch.device("cpu"))
        except UserError as error:
            arms.append({**arm, "refused": str(error)})
            continue
        predicted = {**{c: found.ledger[c] for c in CATEGORIES}, "peak": found.peak}
        measured = {**{c: ledger[c] for c in CATEGORIES}, "peak": peak}
        errors = {c: round(predicted[c] / measured[c] - 1, 6) if measured[c] else None for c in predicted}
        arms.append({**arm, "predicted": predicted, "measured": measured, "error": errors})
        print(name, axes.name, errors, file=sys.stderr, flush=True)
    return arms


def main() -> None:
    """Measure every model, and write ``results/prediction_error.json``."""
    import torch
    from memtrain_common.measuring.bench import write_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one model, printed as JSON")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prediction_error.json")
    flags = parser.parse_args()
    if flags.only:
        print(json.dumps(measure_model(flags.only)))
        return
    models = {}
    for name, rows in MODELS.items():
        done = subprocess.run([sys.executable, __file__, "--only", name], stdout=subprocess.PIPE, text=True, check=True)
        arms = json.loads(done.stdout)
        measured = [a for a in arms if "error" in a]
        largest = {
            c: max((abs(a["error"][c]) for a in measured if a["error"][c] is not None), default=0.0)
            for c in (*CATEGORIES, "peak")
        }
        models[name] = {"rows": rows, "largest_error": largest, "measured_arms": len(measured), "arms": arms}
        print(name, largest, flush=True)
        write_results(
            flags.out,
            argv=["python", "benchmarks/prediction_error.py"],
            device=torch.device("cpu"),
            seeds=[0],
            tokens=TOKENS,
            models=models,
        )


if __name__ == "__main__":
    main()
