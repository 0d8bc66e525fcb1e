"""How many bytes do processes send each other: LTE's heads over 4 processes at T = 10, beside DDP?

    uv run python benchmarks/lte_wire.py

Trains lte-train's default model (4 layers, width 128) on random tokens, 4 processes over gloo, and reports bytes a step
as counted by ``lte.Ranks`` and as the network interface saw them (TCP's and gloo's own headers included). For that the
benchmark runs in a network namespace of its own, which needs root; without it, only counted bytes are reported. DDP's
bytes are those of a ring all-reduce, 2·(N − 1)·4 bytes a gradient over all processes, and those of the interface.
Ways that the result file holds are not measured again.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lte import LTEConfig, Merger, Ranks, inject, param_groups, shared_parameters
from memtrain_common.measuring.bench import write_results
from memtrain_common.models.gpt import GPT, GPTConfig, next_token_loss
from memtrain_common.training.distributed import launch

RESULT = Path(__file__).parent / "results" / "lte_wire.json"
SIZE, STEPS, T, HEADS = 4, 20, 10, 4
REST = ("embeddings", "norms", "biases", "skipped")
COPIES = {"trainable": REST, "replicas": ("embeddings", "norms")}
WAYS: dict[str, dict[str, Any]] = {
    "DDP, full model": {},
    "DDP, LTE r = 64": {"rank": 64},
    "heads r = 64, rest frozen": {"rank": 64, "trainable": ()},
    "heads r = 64, rest averaged at merges": {"rank": 64, "trainable": REST, "replicas": ("embeddings", "norms")},
    "heads r = 64, rest shared each step": {"rank": 64, "trainable": REST},
    "heads r = 8, rest frozen": {"rank": 8, "trainable": ()},
    "heads r = 8, rest averaged at merges": {"rank": 8, "trainable": REST, "replicas": ("embeddings", "norms")},
    "heads r = 64, rest frozen, 3 % in 4 bits": {"rank": 64, "trainable": (), "merge_density": 0.03},
    "heads r = 64, rest at merges, 3 % in 4 bits": {"rank": 64, **COPIES, "merge_density": 0.03},
    "heads r = 64, rest at merges, 1 % in 2 bits": {"rank": 64, **COPIES, "merge_density": 0.01, "merge_bits": 2},
}


def interface_bytes() -> int:
    """Bytes that the loopback interface of this network namespace has transmitted."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def loopback_up() -> None:
    """A new network namespace's loopback is down: SIOCSIFFLAGS with IFF_UP | IFF_RUNNING."""
    with socket.socket() as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def process(rank: int, port: int, way: str, out: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(SIZE))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    launch("cpu")
    torch.manual_seed(0)
    model: torch.nn.Module = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=128))
    options = WAYS[way]
    ranks, merger = Ranks(), None
    if options:
        inject(model, LTEConfig(heads=HEADS, **options), ranks if way.startswith("heads") else None)
    groups = (
        param_groups(model, lr=1e-3, rest_lr=1e-3, weight_decay=0.1) if options else [{"params": model.parameters()}]
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shared = shared_parameters(model) if options else []
    if way.startswith("heads"):
        merger = Merger(model, T, ranks=ranks)
    else:
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        tokens = torch.randint(0, 256, (4, 65), generator=generator)
        next_token_loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()
        if merger is not None:
            ranks.average_gradients(shared)
        optimizer.step()
        optimizer.zero_grad()
        if merger is not None:
            merger.step()

    for _ in range(T):  # connections are made, and DDP orders its buckets
        step()
    ranks.sent.clear()
    dist.barrier()
    before = interface_bytes()
    dist.barrier()
    for _ in range(STEPS):
        step()
    dist.barrier()
    if rank == 0:
        counted = sum(ranks.sent.values()) if merger is not None else 2 * (SIZE - 1) * 4 * gradients * STEPS
        torch.save((counted / STEPS, (interface_bytes() - before) / STEPS, dict(ranks.sent)), out)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    alone = "LTE_WIRE_ALONE" in os.environ
    if not alone and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0:
        sys.exit(
            subprocess.run(
                ["unshare", "-n", sys.executable, *sys.argv], env={**os.environ, "LTE_WIRE_ALONE": "1"}
            ).returncode
        )
    if alone:
        loopback_up()
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["ways"] if RESULT.exists() else []
    for way in WAYS:
        if any(row["way"] == way for row in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bytes.pt"
            mp.spawn(process, (free_port(), way, out), nprocs=SIZE)
            counted, seen, purposes = torch.load(out)
        tokens = SIZE * 4 * 64
        row = {
            "way": way,
            "counted_bytes_per_step": round(counted),
            "counted_bytes_per_token": round(counted / tokens, 1),
        }
        row |= {"interface_bytes_per_step": round(seen) if alone else None}
        row |= {"of_full_ddp_counted": round(counted / rows[0]["counted_bytes_per_step"], 4) if rows else 1.0}
        if alone:
            row |= {"of_full_ddp_on_interface": round(seen / rows[0]["interface_bytes_per_step"], 4) if rows else 1.0}
        rows.append(row | {"purposes_bytes_per_step": {k: round(v / STEPS) for k, v in purposes.items()}})
        print(row, flush=True)
        keep(rows)


def keep(rows: list[dict[str, Any]]) -> None:
    write_results(
        RESULT, argv=["python", "benchmarks/lte_wire.py"], device=torch.device("cpu"), seeds=[0], processes=SIZE, T=T,
        heads=HEADS, steps=STEPS, tokens_per_step=SIZE * 4 * 64, ways=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
