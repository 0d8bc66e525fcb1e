"""What each of two processes does."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import problems
from galore_vit import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreScaled,
    InBackward,
    Refresh,
    projected_all_reduce,
)
from galore_vit.galore import GaLore

STEPS, HALF = 25, 8
WIDE_HALF = 40  # with the other half more rows than dimensions, so that a gradient determines its basis
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
    first, *groups = problems.mlp_groups(model, proj_type=proj_type)
    optimizer, others = GaLoreAdamW(groups, lr=1e-2), torch.optim.AdamW([first], lr=1e-2, weight_decay=0.0)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, projected_all_reduce(optimizer))
    for step in range(STEPS):
        loss_of(wrapped, step, rank).backward()
        for each in (optimizer, others):
            each.step()
            each.zero_grad()
    return {**result(model, optimizer), "said": said_of_wrapped(wrapped)}


def said_of_wrapped(model: DistributedDataParallel) -> list[str]:
    """What InBackward says without a process group: of the wrapped model, and where it does not know of it."""
    groups = problems.mlp_groups(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        InBackward(GaLoreAdamW(groups)).close()
    try:
        InBackward(GaLoreAdamW(groups), model=model, norm="sketch")
    except ValueError as error:
        return [*(str(w.message) for w in found), str(error)]
    return []


def in_backward(rank: int, proj_type: str, norm: str = "sketch", factored: bool = False) -> dict:
    model = problems.mlp().double()
    inner = GaLoreAdamW(problems.mlp_groups(model, proj_type=proj_type), lr=1e-2)
    optimizer = InBackward(inner, process_group=dist.group.WORLD, norm=norm, model=model if factored else None)
    norms = []
    for step in range(STEPS):
        loss_of(model, step, rank).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(optimizer.parameters(), 1e9))
        optimizer.step()
        optimizer.zero_grad()
    return {**result(model, inner), "norms": torch.stack(norms)}


def in_backward_exact(rank: int, proj_type: str) -> dict:
    return in_backward(rank, proj_type, "exact")


def in_backward_factored(rank: int, proj_type: str) -> dict:
    return in_backward(rank, proj_type, factored=True)


def fsdp(rank: int, proj_type: str) -> dict:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = problems.mlp().double()
    shard(model)
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
            refusal(model, partial(GaLoreAdamW, residual=True)),
            refusal(model, partial(GaLoreAdamW8bit, residual=True)),
            refusal(model, GaLoreAdamW, split=2),
        ],
    }


def wide_groups(model: torch.nn.Module) -> list[dict]:
    """The first two matrices projected to 32 dimensions, from either side; the last is plain."""
    *projected, plain = (p for p in model.parameters() if p.ndim == 2)
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": [*vectors, plain]}, {"params": projected, "rank": 32, "update_proj_gap": 5}]


def wide_loss(model: torch.nn.Module, step: int, rows: slice) -> torch.Tensor:
    x = torch.randn(2 * WIDE_HALF, 64, generator=torch.Generator().manual_seed(step)).double()[rows]
    return ((model(x) - x.sin().repeat(1, 2)) ** 2).mean()


class ScaledByGradient(GaLoreScaled):
    """With bases that are kept."""

    def __init__(self, params: list[dict]) -> None:
        super().__init__(params, refresh=Refresh())


ONE_ROW = (GaLoreAdamW, GaLoreAdafactor, GaLoreScaled)
WIDE = (GaLoreAdamW8bit, GaLoreAdafactor, GaLoreScaled, ScaledByGradient)


def wide(optimizer_type: type[GaLore], rank: int | None, *, stops: bool = True) -> dict:
    """Moments of 4096 numbers and more, sharded by FSDP2 (or, with no rank, whole in one process).

    A fresh optimizer takes over in the middle of a gap, unless told otherwise.
    """
    torch.manual_seed(0)
    sizes = (64, 192, 64, 128)
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise(sizes))).double()
    rows = slice(None)
    if rank is not None:
        shard(model)
        rows = slice(rank * WIDE_HALF, (rank + 1) * WIDE_HALF)
    optimizer = optimizer_type(wide_groups(model))
    for step in range(12):
        if step == 7 and stops:
            state = optimizer.state_dict()
            optimizer = optimizer_type(wide_groups(model))
            optimizer.load_state_dict(state)
        wide_loss(model, step, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = [v for s in optimizer.state.values() for v in s.values()]
    return {
        "weights": [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()],
        "local_bytes": sum(t.nbytes for t in (getattr(v, "to_local", lambda v=v: v)() for v in tensors)),
        "keys": [sorted(s) for s in optimizer.state.values()],
    }


class OneRow(torch.nn.Module):
    """Weights whose first dimension is 1, as a ViT's class token: one process has all of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = torch.nn.Parameter(torch.randn(1, 1, 20, dtype=torch.float64))
        self.layer, self.head = torch.nn.Linear(20, 20).double(), torch.nn.Linear(20, 1).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x[:, None] + self.token).tanh())


def one_row(optimizer_type: type[GaLore], rank: int | None) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = OneRow()
    if rank is not None:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    beta1 = {"beta1": 0.9} if optimizer_type is GaLoreAdafactor else {}
    optimizer = optimizer_type([{"params": list(model.parameters())}], **beta1)
    for step in range(3):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step)).double()
        model(x if rank is None else x[4 * rank : 4 * rank + 4]).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def uneven_shards() -> list[str]:
    """What the 8-bit optimizer warns of for 130 rows of 32 numbers, which two processes cannot share in blocks."""
    model = torch.nn.Linear(64, 130)
    shard(torch.nn.Sequential(model))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        GaLoreAdamW8bit([{"params": [model.weight], "rank": 32}]).init_state()
    return [str(w.message) for w in found]


def shard(model: torch.nn.Sequential) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


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
    for mode in (ddp, in_backward, in_backward_exact, in_backward_factored, fsdp):
        for kind in ("std", "full"):
            sent = 0
            found[f"{mode.__name__} {kind}"] = mode(rank, kind)
    for optimizer_type in WIDE:
        found[f"wide {optimizer_type.__name__}"] = wide(optimizer_type, rank)
        found[f"wide {optimizer_type.__name__}, undisturbed"] = wide(optimizer_type, rank, stops=False)
    for optimizer_type in ONE_ROW:
        found[f"one row {optimizer_type.__name__}"] = one_row(optimizer_type, rank)
    found["uneven"] = uneven_shards()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
