"""LoRA-XS on a real pretrained language model of 260K parameters: rank by rank, SVD bases against random ones.

The model was trained on children's stories and is adapted to Shakespeare. Rank by rank, each kind of bases gets the
rate of RATES, a grid of half decades, whose run with TUNING_SEED has the lowest loss on a text of its own; what is
reported is the loss on a third text, of runs with other seeds. Needs MEMTRAIN_DATA.

    MEMTRAIN_DATA=… uv run python benchmarks/lora_xs_stories.py
"""

import copy
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from lora_xs import CAUSAL_LM_TARGETS, LoRAXSConfig, inject, trained
from memtrain_common.commands.cli import run_command
from memtrain_common.console import Console
from memtrain_common.data.order import epoch_batch
from memtrain_common.errors import DivergedError
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.llama2c import Llama2cTokenizer, load_llama2c
from memtrain_common.training.loop import FitConfig, Task, fit
from memtrain_common.training.rng import seed_all
from memtrain_common.training.schedule import schedule
from real_data import data
from torch import Tensor, nn

Init = Literal["svd", "random"]
RANKS = (4, 8, 16)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TUNING_SEED = 100
ROW = 64  # tokens
BATCH = 8
OUT = Path(__file__).parent / "results" / "lora_xs_stories.json"


def rows(data: Path, characters: int) -> Tensor:
    """The beginning of Tiny Shakespeare in the model's own tokens (n×ROW)."""
    tokenizer = Llama2cTokenizer(data / "weights/stories260K/tok512.bin")
    lines = (data / "text/tinyshakespeare.txt").read_text()[:characters].splitlines()
    tokens = torch.tensor([token for line in lines if line for token in tokenizer.encode(line)])
    return tokens[: len(tokens) // ROW * ROW].view(-1, ROW)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy of each next token, in nats."""
    return model(batch, labels=batch).loss


def run(
    base: nn.Module, train: Tensor, val: Tensor, rank: int, init: Init, lr: float, seed: int, steps: int
) -> float | None:
    """Loss on ``val`` after training; None where training diverged."""
    seed_all(seed)
    model = inject(copy.deepcopy(base), LoRAXSConfig(rank, targets=CAUSAL_LM_TARGETS, init=init, seed=seed))
    try:
        result = fit(
            Task(
                model,
                lambda i: train[torch.from_numpy(epoch_batch(seed, i, batch=BATCH, size=len(train)))],
                loss_of,
                torch.optim.AdamW(trained(model)["R"], lr=lr, weight_decay=0.0),
                evaluate=partial(validation_loss, val=val),
                lr_factor=schedule("cosine", steps // 20, steps),
            ),
            FitConfig(steps, eval_interval=steps),
        )
    except DivergedError:
        return None
    return result.evaluation["loss"]


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def validation_loss(model: nn.Module, val: Tensor) -> dict[str, float]:
    with torch.no_grad():
        losses = [float(loss_of(model, part)) * len(part) for part in val.split(32)]
    return {"loss": sum(losses) / len(val)}


def main(steps: int = 120, seeds: int = 3, characters: int = 160_000, out: Path = OUT) -> None:
    """
    Args:
        steps: optimizer steps of each run, of 8×64 tokens.
        seeds: reported runs of each kind, with seeds 0, 1, …
        characters: of the text: eight tenths to train on, a tenth to choose rates on, a tenth to report.
        out: where the results go.
    """
    folder = data()
    torch.set_num_threads(1)
    console = Console()
    base = load_llama2c(folder / "weights/stories260K/stories260K.bin")
    tokens = rows(folder, characters)
    n = len(tokens)
    train, choosing, reported = tokens.split([n - 2 * (n // 10), n // 10, n // 10])
    before = validation_loss(base, reported)["loss"]
    console.say(f"{len(train)} rows to train on, {len(choosing)} to choose rates on, {len(reported)} to report")
    console.say(f"before: {before:.4f}")
    arms: list[dict[str, Any]] = []
    for rank in RANKS:
        for init in get_args(Init):
            by_rate = {lr: run(base, train, choosing, rank, init, lr, TUNING_SEED, steps) for lr in RATES}
            best = min(RATES, key=lambda lr: _or_infinite(by_rate[lr]))
            losses = [run(base, train, reported, rank, init, best, seed, steps) for seed in range(seeds)]
            finite = [loss for loss in losses if loss is not None]
            arm = {
                "rank": rank,
                "init": init,
                "trained": rank * rank * 7 * base.config.num_hidden_layers,
                "learning_rate": best,
                "rate_at_the_edge_of_the_grid": best in (RATES[0], RATES[-1]),
                "loss": statistics.mean(finite) if finite else None,
                "losses": losses,
                "loss_on_the_choosing_text_by_rate": {str(lr): loss for lr, loss in by_rate.items()},
            }
            arms.append(arm)
            console.say(f"r = {rank}, {init}: {arm['loss']:.4f} at {best:g}, seeds {losses}, by rate {by_rate}")
    write_results(
        out,
        argv=["python", "benchmarks/lora_xs_stories.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=range(seeds),
        model="stories260K (llama2.c)",
        text="Tiny Shakespeare, its first characters in the model's tokens",
        characters=characters,
        rows={"train": len(train), "choosing": len(choosing), "reported": len(reported)},
        steps=steps,
        batch=[BATCH, ROW],
        rates=RATES,
        loss_before=before,
        arms=arms,
    )
    console.say(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: tyro.cli(main, args=argv), prog="python benchmarks/lora_xs_stories.py"))
