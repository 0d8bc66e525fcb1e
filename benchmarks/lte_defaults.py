"""How were lte-train's defaults chosen? One change at a time from a base, judged by the validation loss.

    uv run python benchmarks/lte_defaults.py [--steps 1500] [--only PATTERN]

Every arm trains the default model on the same batches of the embedded corpus; "full" arms train all parameters.
Arms that the result file holds already are not repeated.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from lte.cli import configure
from lte.tasks.train import train_one
from memtrain_common.bench import write_results
from memtrain_common.console import Console
from memtrain_common.text import Crops, load_corpus

RESULT = Path(__file__).parent / "results" / "lte_defaults.json"
BASE = "--lte-heads 4 --lora-r 32 --lora-alpha 128 --lte-merge-steps 1 --learning-rate 1e-3 --rest-learning-rate 4e-3"
ARMS = {
    "full": ["--full-learning-rate 2e-3", "--full-learning-rate 4e-3", "--full-learning-rate 8e-3"],
    "base": [""],
    "lr": ["--learning-rate 5e-4", "--learning-rate 2e-3", "--learning-rate 4e-3"],
    "alpha": ["--lora-alpha 32", "--lora-alpha 512"],
    "rank": ["--lora-r 16 --lora-alpha 64", "--lora-r 64 --lora-alpha 256", "--lora-r 128 --lora-alpha 512"],
    "merge": ["--lte-merge-steps 10", "--lte-merge-steps 0"],
    "init": ["--lte-init upstream"],
    "rest": ["--rest-learning-rate 1e-3", "--lte-trainable norms biases skipped"],
    "heads": ["--lte-heads 1", "--lte-heads 2", "--lte-heads 8"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", default="", help="only arms whose group has this in its name")
    parser.add_argument("--extra", action="append", default=[], help="a further arm: flags in one word")
    options = parser.parse_args()
    rows = json.loads(RESULT.read_text())["arms"] if RESULT.exists() else []
    corpus = load_corpus()
    arms = [(group, flags) for group, many in ARMS.items() for flags in many] + [("extra", e) for e in options.extra]
    for group, flags in arms:
        known = any(r["group"] == group and r["flags"] == flags and r["steps"] == options.steps for r in rows)
        if known or options.only not in group:
            continue
        words = [
            *BASE.split(),
            *flags.split(),
            "--max-iters",
            str(options.steps),
            "--eval-interval",
            str(options.steps),
        ]
        config = configure(words)
        crops = Crops(corpus, batch_size=config.batch_size, block_size=config.block_size, seed=config.seed)
        trained = train_one(config, corpus, crops, None, Console(), torch.device("cpu"), full=group == "full")
        loss = trained.result.evaluation["loss"]
        rows.append(
            {"group": group, "flags": flags, "steps": options.steps, "loss": loss, "trained": trained.trainable}
        )
        print(f"{group:6} {flags:45} {loss:.4f} nats/byte", flush=True)
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
