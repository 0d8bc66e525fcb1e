"""What each of two processes does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import problems
from galore_vit import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, InBackward, projected_all_reduce

STEPS, HALF = 25, 8
sent = 0


def counted(all_reduce):
    """all_reduce that counts the numbers it sends."""

    def call(tensor, *args, **kwargs):
        global sent
        sent += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    return call


def mine(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (t.double() for t in problems.mlp_batch(step, 2 * HALF))
    return x[rank * HALF : (rank + 1) * HALF], y[rank * HALF : (rank + 1) * HALF]


def loss_of(model: torch.nn.Module, step: int, rank: int) -> torch.Tensor:
    x, y = mine(step, rank)
    return ((model(x) - y) ** 2).mean()


def ddp(rank: int, proj_type: str) -> dict:
    model = problems.mlp().double()
    optimizer = GaLoreAdamW(problems.mlp_groups(model, proj_type=proj_type), lr=1e-2)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, projected_all_reduce(optimizer))
    for step in range(STEPS):
        loss_of(wrapped, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)


def in_backward(rank: int, proj_type: str, norm: str = "sketch") -> dict:
    model = problems.mlp().double()
    inner = GaLoreAdamW(problems.mlp_groups(model, proj_type=proj_type), lr=1e-2)
    optimizer = InBackward(inner, process_group=dist.group.WORLD, norm=norm)
    norms = []
    for step in range(STEPS):
        loss_of(model, step, rank).backward()
        optimizer.reduce()
        norms.append(torch.nn.utils.clip_grad_norm_(optimizer.parameters(), 1e9))
        optimizer.step()
        optimizer.zero_grad()
    return {**result(model, inner), "norms": torch.stack(norms)}


def in_backward_exact(rank: int, proj_type: str) -> dict:
    return in_backward(rank, proj_type, "exact")


def fsdp(rank: int, proj_type: str) -> dict:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = problems.mlp().double()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = GaLoreAdamW(problems.mlp_groups(model, proj_type=proj_type), lr=1e-2)
    for step in range(STEPS):
        if step == 13:  # mid-gap: a fresh optimizer takes over
            state = optimizer.state_dict()
            optimizer = GaLoreAdamW(problems.mlp_groups(model, proj_type=proj_type), lr=1e-2)
            optimizer.load_state_dict(state)
        loss_of(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    local = sum(v.to_local().numel() for s in optimizer.state.values() for v in s.values() if hasattr(v, "to_local"))
    _, whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    return {
        "weights": [p.full_tensor().detach() for p in model.parameters()],
        "bases": [v.full_tensor() for s in optimizer.state.values() for k, v in s.items() if k in "PQ"],
        "local_state": local,
        "saved": sorted(whole["state"]["0.weight"]) if rank == 0 else [],
        "refused": [
            refusal(model, GaLoreAdamW8bit),
            refusal(model, GaLoreAdafactor),
            refusal(model, partial(GaLoreAdamW, residual=True)),
            refusal(model, GaLoreAdamW, split=2),
        ],
    }


def refusal(model: torch.nn.Module, optimizer: Callable[..., torch.optim.Optimizer], **keys: int) -> str:
    """What the optimizer says to sharded weights."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    try:
        optimizer(problems.mlp_groups(model, rank=2, **keys)).step()
    except ValueError as error:
        return str(error)
    return ""


def result(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    bases = [v for s in optimizer.state.values() for k, v in s.items() if k in "PQ"]
    return {"weights": [p.detach() for p in model.parameters()], "bases": bases, "sent": sent}


def both_modes_and_kinds(meeting: str, folder: str) -> None:
    """One process's part of every case; its findings go to ``folder/RANK.pt``."""
    global sent
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    dist.all_reduce = counted(dist.all_reduce)
    found = {}
    for mode in (ddp, in_backward, in_backward_exact, fsdp):
        for kind in ("std", "full"):
            sent = 0
            found[f"{mode.__name__} {kind}"] = mode(rank, kind)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
