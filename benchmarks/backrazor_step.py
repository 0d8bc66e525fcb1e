"""Time and memory of a full training step: dense, Back Razor and ``torch.utils.checkpoint``, in one process.

Random weights and data, SGD with momentum. The models take steps in turn, two each, of which the second counts: it
finds heap and caches as in a training run, and not as another way has left them. Each time is a ratio of neighbours, in
CPU seconds of the process, which other processes disturb least; of several threads in seconds.
Then, for the first model: the peak of the resident set in a process of its own for each way, and, on fake tensors,
the most that one encoder layer holds for a moment beside what it keeps. With --torch-path the only question is what a
step costs where no C compiler is: packing by torch over packing by the C kernels.

    uv run python benchmarks/backrazor_step.py --models vit-b-16 bert-base gpt2 --batch 4 --no-memory --pairs 12
    uv run python benchmarks/backrazor_step.py --models vit-s-16 --no-memory --batch 8 --pairs 12 \
        --out benchmarks/results/backrazor_step_small.json
    uv run python benchmarks/backrazor_step.py --models vit-b-16 vit-s-16 bert-base gpt2 --batch 4 --no-memory \
        --pairs 12 --threads 2 --out benchmarks/results/backrazor_step_two_threads.json
    uv run python benchmarks/backrazor_step.py --pairs 0 --out benchmarks/results/backrazor_peak.json
    uv run python benchmarks/backrazor_step.py --models gpt2 --batch 4 --length 512 --pairs 0 \
        --out benchmarks/results/backrazor_peak_gpt2.json
    uv run python benchmarks/backrazor_step.py --models vit-s-16 bert-base gpt2 --batch 2 --torch-path --pairs 6 \
        --out benchmarks/results/backrazor_torch_path.json
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
import unittest.mock
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
import tyro
from backrazor import Razor, cpu_kernels
from backrazor.cpu_kernels import library
from backrazor.tasks.memory import shaped
from backrazor.tasks.memory_flags import MemoryConfig
from memtrain_apps.compose.checkpointing import CheckpointBlocks
from memtrain_apps.compose.families import blocks
from memtrain_common.console import Console, format_bytes
from memtrain_common.measuring.bench import pairwise, write_results
from memtrain_common.measuring.peak import PeakMeter, memory_in_use
from memtrain_common.measuring.prediction import fake_step
from torch import nn

Way = Literal["dense", "razor", "checkpoint"]
OUT = Path(__file__).parent / "results" / "backrazor_step.json"
RETURN_FREED = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives freed memory back at once, so that the resident set is what is in use."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all ways of a run share."""

    keep: float
    batch: int
    length: int


class Trainer:
    """A model, the way it saves activations, and an optimizer."""

    def __init__(self, name: str, way: Way, sizes: "Sizes", batch: int, model: nn.Module | None = None) -> None:
        self.shaped = shaped(MemoryConfig(model=name, batch_size=batch, sequence_length=sizes.length))
        self.model = model if model is not None else self.shaped.build()
        self.saving: Any = nullcontext()
        if way == "razor":
            self.saving = Razor(sizes.keep)
        elif way == "checkpoint":
            self.saving = CheckpointBlocks(blocks(self.model).values())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def backward(self) -> None:
        with self.saving:
            loss = self.shaped.loss(self.model)
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def clock() -> float:
    """CPU seconds of the process; of several threads, which may wait for each other, the time that passes."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def times(name: str, sizes: Sizes, pairs: int) -> dict[str, Any]:
    """Step time of Back Razor and of checkpointing over dense."""
    torch.manual_seed(0)
    dense = Trainer(name, "dense", sizes, sizes.batch)
    found: dict[str, Any] = {"model": name, "batch": dense.shaped.sample, "keep": sizes.keep}
    for way in ("razor", "checkpoint"):
        other = Trainer(name, way, sizes, sizes.batch, copy.deepcopy(dense.model))
        found[f"{way}_over_dense"] = dataclasses.asdict(
            pairwise(other.step, dense.step, pairs=pairs, warmup=0, settle=True, clock=clock)
        )
        del other
    return found


def over_c(name: str, sizes: Sizes, pairs: int) -> dict[str, Any]:
    """Step time of Back Razor without its C kernels over that with them, of one model by turns."""
    torch.manual_seed(0)
    trainer, built = Trainer(name, "razor", sizes, sizes.batch), cpu_kernels.library

    def without() -> None:
        with unittest.mock.patch.object(cpu_kernels, "library", return_value=None):
            trainer.step()

    assert built() is not None, "there is no C compiler here: nothing to compare with"
    ratio = pairwise(without, trainer.step, pairs=pairs, warmup=0, settle=True, clock=clock)
    found = {"model": name, "batch": trainer.shaped.sample, "keep": sizes.keep}
    return {**found, "torch_over_c": dataclasses.asdict(ratio)}


def peak(name: str, way: Way, sizes: Sizes) -> None:
    """Print the resident bytes that a forward and backward pass needs above weights and gradients."""
    small = Trainer(name, way, sizes, 1)
    small.backward()  # gradients exist from here on, and all code is loaded
    trainer = Trainer(name, way, sizes, sizes.batch, small.model)
    device = torch.device("cpu")
    before, meter = memory_in_use(device), PeakMeter(device)
    meter.begin("step")
    trainer.backward()
    meter.end()
    most = meter.peak("step")
    assert most is not None, "this system does not tell a process's peak"
    print(json.dumps(most - before))


def peak_alone(name: str, way: Way, sizes: Sizes) -> int:
    """:func:`peak` in a process of its own."""
    command = [sys.executable, __file__, "--models", name, "--peak-of", way]
    command += [word for n, v in vars(sizes).items() for word in (f"--{n}", str(v))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **RETURN_FREED})
    return int(done.stdout.splitlines()[-1])


def layer_bytes(name: str, way: Way, sizes: Sizes) -> dict[str, int]:
    """Of the worst encoder layer: bytes that its forward pass keeps, and the most it holds beside that in each pass."""
    found = {"kept": 0, "forward_transient": 0, "backward_transient": 0}
    with fake_step() as live:
        trainer = Trainer(name, way, sizes, sizes.batch)
        for parameter in trainer.model.parameters():
            parameter.grad = torch.empty_like(parameter)
        lists = [m for m in trainer.model.modules() if isinstance(m, nn.ModuleList)]
        for layer in max(lists, key=len):
            start = [0]

            def begin(*_: Any, start: list[int] = start) -> None:
                start[0] = live.peak_bytes = live.bytes

            def forward_end(*_: Any, start: list[int] = start) -> None:
                found["kept"] = max(found["kept"], live.bytes - start[0])
                found["forward_transient"] = max(found["forward_transient"], live.peak_bytes - live.bytes)

            def backward_end(*_: Any, start: list[int] = start) -> None:
                found["backward_transient"] = max(found["backward_transient"], live.peak_bytes - start[0])

            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(forward_end)
            layer.register_full_backward_pre_hook(begin)
            layer.register_full_backward_hook(backward_end)
        trainer.backward()
    return found


def main(
    models: tuple[str, ...] = ("vit-b-16",),
    keep: float = 0.1,
    batch: int = 8,
    pairs: int = 3,
    length: int = 128,
    threads: int = 1,
    memory: bool = True,
    torch_path: bool = False,
    peak_of: Way | None = None,
    out: Path = OUT,
) -> None:
    """
    Args:
        models: as backrazor-memory names them; memory is measured on the first.
        keep: part of each activation that Back Razor keeps.
        batch: samples.
        length: tokens of a language model's sample.
        pairs: of steps; 0 measures memory alone.
        threads: of torch.
        memory: measure it too.
        torch_path: time packing by torch against packing by the C kernels, and nothing else.
        peak_of: print this way's peak for the first model, and nothing else.
        out: where the results go.
    """
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    sizes = Sizes(keep, batch, length)
    if peak_of is not None:
        peak(models[0], peak_of, sizes)
        return
    console = Console()
    ways: tuple[Way, ...] = get_args(Way)
    found: dict[str, Any] = {}
    if memory and not torch_path:
        peaks = {way: peak_alone(models[0], way, sizes) for way in ways}
        console.say(f"peak above weights and gradients: { {w: format_bytes(n) for w, n in peaks.items()} }")
        layers = {way: layer_bytes(models[0], way, sizes) for way in ways[:2]}
        console.say(f"one layer: {layers}")
        found["peak_bytes_above_weights_and_gradients"] = {"model": models[0], **vars(sizes), **peaks}
        found["bytes_of_one_encoder_layer"] = {"model": models[0], **vars(sizes), **layers}
    runs = []
    for name in models if pairs else ():
        runs.append((over_c if torch_path else times)(name, sizes, pairs))
        console.say(f"{name}: " + ", ".join(f"{k} {v['median']:.3f}" for k, v in runs[-1].items() if "_over_" in k))
    write_results(
        out,
        argv=["python", "benchmarks/backrazor_step.py", *sys.argv[1:]],
        device=torch.device("cpu"),
        seeds=[0],
        threads=threads,
        clock="CPU seconds of the process" if threads == 1 else "seconds",
        cpu_kernels=library() is not None,
        mode=Razor(keep).mode,
        runs=runs,
        **found,
    )
    console.say(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
