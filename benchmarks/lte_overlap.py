"""What does a merge cost in time on a slow link, and how much of it does training hide that goes on meanwhile?

    uv run python benchmarks/lte_overlap.py

lte-train's default model (4 layers, width 128, four heads of rank 64, copies of embeddings and norms), two processes of
a thread each, merges of 3 % in 4 bits every 10 steps, over gloo. In a network namespace of its own, whose loopback
``tc`` slows down to the rates below: both need root. Ways take turns in one run: never merging, waiting for each
merge, merging 3 and 9 steps late. A block is 30 steps and begins right after a merge has arrived: three are sent and
arrive in it; reported are the ratios of a block's time to that of the block without merges beside it.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lte import LTEConfig, Merger, Ranks, inject, param_groups, shared_parameters
from lte_wire import COPIES, free_port, loopback_up
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.distributed import any_rank, launch

RESULT = Path(__file__).parent / "results" / "lte_overlap.json"
SIZE, T, HEADS, BLOCK, ROUNDS = 2, 10, 4, 30, 5
MEGABITS: tuple[int | None, ...] = (None, 4, 2)  # None: the loopback as it is
WAYS: dict[str, dict[str, Any]] = {
    "no merges": {"every": 0},
    "waiting": {"every": T},
    "3 steps late": {"every": T, "delay": 3},
    "9 steps late": {"every": T, "delay": 9},
}


def prepared(way: str, rank: int) -> Callable[[int], None]:
    """-> what trains so many steps of a way."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=128))
    ranks, delay = Ranks(), WAYS[way].get("delay", 0)
    inject(model, LTEConfig(heads=HEADS, rank=64, merge_density=0.03, merge_delay=delay, **COPIES), ranks)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0.1))
    merger, shared = Merger(model, WAYS[way]["every"], ranks=ranks), shared_parameters(model)
    generator = torch.Generator().manual_seed(rank)

    def steps(count: int) -> None:
        for _ in range(count):
            tokens = torch.randint(0, 256, (4, 65), generator=generator)
            next_token_loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()
            ranks.average_gradients(shared)
            optimizer.step()
            optimizer.zero_grad()
            merger.step()
            if merger.steps % T == delay % T:  # as lte-train's loop agrees on stopping
                any_rank(0)

    steps(T + delay)
    return steps


def process(rank: int, port: int, out: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(SIZE))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    launch("cpu")
    ways = {way: prepared(way, rank) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(ROUNDS):
        for way in list(WAYS)[:: 1 if turn % 2 else -1]:
            dist.barrier()
            began = time.perf_counter()
            ways[way](BLOCK)
            dist.barrier()
            seconds[way].append(time.perf_counter() - began)
    if rank == 0:
        torch.save(seconds, out)
    dist.barrier()
    dist.destroy_process_group()


def measured(megabits: int | None) -> dict[str, Any]:
    if megabits:
        rate = f"tc qdisc replace dev lo root tbf rate {megabits}mbit burst 16kb latency 10s"
        for words in ("ip link set lo mtu 1500", rate):  # the loopback's own packets exceed the burst
            subprocess.run(words.split(), check=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.pt"
        mp.spawn(process, (free_port(), out), nprocs=SIZE)
        seconds = torch.load(out)
    alone = seconds["no merges"]
    row: dict[str, Any] = {"megabits_per_second": megabits}
    for way in WAYS:
        ratios = sorted(a / b for a, b in zip(seconds[way], alone, strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        row[way] = {
            "seconds_a_step_median": round(statistics.median(seconds[way]) / BLOCK, 5),
            "of_no_merges": [round(q, 3) for q in quartiles],
        }
    print(row, flush=True)
    return row


def main() -> None:
    if "LTE_OVERLAP_ALONE" not in os.environ:
        own = ["unshare", "-n", sys.executable, *sys.argv]
        sys.exit(subprocess.run(own, env={**os.environ, "LTE_OVERLAP_ALONE": "1"}).returncode)
    loopback_up()
    write_results(
        RESULT, argv=["python", "benchmarks/lte_overlap.py"], device=torch.device("cpu"), seeds=[0], processes=SIZE,
        T=T, steps_a_block=BLOCK, blocks=ROUNDS, quartiles="25, 50 and 75 %", links=[measured(m) for m in MEGABITS],
    )  # fmt: skip


if __name__ == "__main__":
    main()
