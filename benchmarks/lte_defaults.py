"""How were lte-train's defaults chosen? One change at a time from a base, judged by the validation loss.

    uv run python benchmarks/lte_defaults.py [--only PATTERN] [--steps N]

Every arm trains the default model on the same batches of the embedded corpus; "full" arms train all parameters. First
come short runs of each change alone, then longer ones of what was best. Arms that the result file holds already are not
repeated.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from lte.cli import configure
from lte.tasks.train import train_one
from memtrain_common.commands.session import Session
from memtrain_common.data.text.corpus import Crops, load_corpus
from memtrain_common.measuring.bench import write_results

RESULT = Path(__file__).parent / "results" / "lte_defaults.json"
BASE = "--lte-heads 4 --lora-r 32 --lora-alpha 128 --lte-merge-steps 1 --learning-rate 1e-3 --rest-learning-rate 4e-3"
SHORT, LONG = 500, 1000
ARMS: dict[str, tuple[int, list[str]]] = {
    "full": (SHORT, ["--full-learning-rate 2e-3", "--full-learning-rate 4e-3", "--full-learning-rate 8e-3"]),
    "base": (SHORT, [""]),
    "lr": (SHORT, ["--learning-rate 5e-4", "--learning-rate 2e-3", "--learning-rate 4e-3"]),
    "alpha": (SHORT, ["--lora-alpha 32", "--lora-alpha 512"]),
    "rank": (SHORT, ["--lora-r 16 --lora-alpha 64", "--lora-r 64 --lora-alpha 256", "--lora-r 128 --lora-alpha 512"]),
    "merge": (SHORT, ["--lte-merge-steps 10", "--lte-merge-steps 0"]),
    "init": (SHORT, ["--lte-init upstream"]),
    "rest": (SHORT, ["--rest-learning-rate 1e-3", "--lte-trainable norms biases skipped"]),
    "heads": (SHORT, ["--lte-heads 1", "--lte-heads 2", "--lte-heads 8"]),
    "full-long": (LONG, ["--full-learning-rate 3e-3", "--full-learning-rate 4e-3"]),
    "rank-long": (LONG, ["", "--lora-r 64 --lora-alpha 256", "--lora-r 64 --lora-alpha 256 --learning-rate 1.5e-3"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="instead of each arm's own number")
    parser.add_argument("--only", default="", help="only arms whose group has this in its name")
    options = parser.parse_args()
    rows = json.loads(RESULT.read_text())["arms"] if RESULT.exists() else []
    corpus = load_corpus()
    arms = [(group, options.steps or steps, flags) for group, (steps, many) in ARMS.items() for flags in many]
    for group, steps, flags in arms:
        known = any((r["group"], r["steps"], r["flags"]) == (group, steps, flags) for r in rows)
        if known or options.only not in group:
            continue
        words = [
            *BASE.split(),
            *flags.split(),
            "--max-iters",
            str(steps),
            "--eval-interval",
            str(steps),
        ]
        config = configure(words)
        crops = Crops(corpus, batch_size=config.batch_size, block_size=config.block_size, seed=config.seed)
        trained = train_one(Session.alone(config), corpus, crops, full=group.startswith("full"))
        loss = trained.outcome.result.evaluation["loss"]
        rows.append({"group": group, "flags": flags, "steps": steps, "loss": loss, "trained": trained.numbers[0]})
        print(f"{group:9} {steps:5} {flags:55} {loss:.4f} nats/byte", flush=True)
        write_results(
            RESULT,
            argv=["python", "benchmarks/lte_defaults.py", *sys.argv[1:]],
            device=torch.device("cpu"),
            seeds=[config.seed],
            base=BASE,
            unit="nats per byte, validation",
            arms=rows,
        )


if __name__ == "__main__":
    main()
