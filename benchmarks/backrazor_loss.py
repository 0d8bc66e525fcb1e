"""The loss of a language model in Back Razor: logits that are kept, and logits that are made in chunks, beside dense.

GPT-2 small in training mode. Bytes that a forward pass saves and the peak of a step above weights and gradients are
predicted on fake tensors; the bytes are the measured ones (a test holds that). With ``--pairs``, a full step with SGD
over the dense one, in turn, in CPU seconds of the process.

    uv run python benchmarks/backrazor_loss.py
    uv run python benchmarks/backrazor_loss.py --lengths --peak-batch 0 --pairs 7 \
        --out benchmarks/results/backrazor_loss_step.json
"""

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from backrazor import Razor
from backrazor.ops import logits
from memtrain_common.console import Console, format_bytes
from memtrain_common.measuring.bench import pairwise, write_results
from memtrain_common.measuring.prediction import predict
from torch import Tensor, nn

OUT = Path(__file__).parent / "results" / "backrazor_loss.json"


@contextmanager
def keeping_logits(razor: Razor) -> Iterator[None]:
    """A Razor to which no layer is a head."""
    before, logits.LEAST_CLASSES = logits.LEAST_CLASSES, sys.maxsize
    try:
        with razor:
            yield
    finally:
        logits.LEAST_CLASSES = before


def arms(keep: float) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    return {
        "dense": nullcontext,
        "logits kept": lambda: keeping_logits(Razor(keep)),
        "logits in chunks": lambda: Razor(keep),
    }


def build() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).train()


def loss(model: nn.Module, batch: int, length: int) -> Tensor:
    tokens = torch.arange(batch * length).view(batch, length) % 50_257
    value: Tensor = model(input_ids=tokens, labels=tokens).loss
    return value


def memory(batch: int, length: int, keep: float) -> dict[str, dict[str, float]]:
    """Of every arm: bytes saved a sample, and the peak of a forward and backward pass above weights and gradients."""
    found = {}
    for arm, saving in arms(keep).items():
        step = predict(build, lambda model: loss(model, batch, length), saving=saving)
        fixed = sum(step.ledger.total(category) for category in ("weights", "gradients", "buffers"))
        found[arm] = {
            "saved_a_sample": step.ledger.total("activations") / batch,
            "peak_above_weights_and_gradients": step.peak_bytes - fixed,
        }
    return found


class Steps:
    """A model that takes full steps in one way of saving."""

    def __init__(
        self, model: nn.Module, saving: Callable[[], AbstractContextManager[Any]], size: tuple[int, int]
    ) -> None:
        self.model, self.saving, self.size = model, saving, size
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        with self.saving():
            value = loss(self.model, *self.size)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def times(size: tuple[int, int], keep: float, pairs: int) -> dict[str, Any]:
    """Step time over dense."""
    torch.manual_seed(0)
    ways = arms(keep)
    dense = Steps(build(), ways["dense"], size)
    return {
        arm: dataclasses.asdict(
            pairwise(
                Steps(copy.deepcopy(dense.model), ways[arm], size),
                dense,
                pairs=pairs,
                warmup=1,
                clock=time.process_time,
            )
        )
        for arm in ("logits in chunks", "logits kept")
    }


def main(
    lengths: tuple[int, ...] = (128, 1024),
    peak_batch: int = 4,
    peak_length: int = 512,
    keep: float = 0.1,
    pairs: int = 0,
    size: tuple[int, int] = (4, 128),
    threads: int = 1,
    out: Path = OUT,
) -> None:
    """
    Args:
        lengths: tokens of a sample, one sample each.
        peak_batch: samples of the step whose peak is taken; 0 leaves it out.
        peak_length: its tokens.
        keep: of Back Razor.
        pairs: of timed steps.
        size: of the timed steps: samples and tokens.
        threads: of torch.
        out: where the results go.
    """
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    console = Console()
    results: dict[str, Any] = {"keep": keep}
    for batch, length in [*((1, n) for n in lengths), *([(peak_batch, peak_length)] if peak_batch else [])]:
        found = memory(batch, length, keep)
        results[f"{batch} × {length} tokens"] = found
        for arm, row in found.items():
            cells = ", ".join(
                f"{name.replace('_', ' ')} {format_bytes(n)} ({found['dense'][name] / n:.1f}× less)"
                for name, n in row.items()
            )
            console.say(f"{batch} × {length} tokens, {arm}: {cells}")
    if pairs:
        results["step over dense"] = {"size": size, **times(size, keep, pairs)}
        console.say(f"step over dense: {results['step over dense']}")
    argv = ["python", "benchmarks/backrazor_loss.py", *sys.argv[1:]]
    write_results(out, argv=argv, device=torch.device("cpu"), seeds=[0], unit="bytes", model="gpt2", results=results)
    console.say(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
