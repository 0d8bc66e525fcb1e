"""Several processes under torchrun: which one this is, and wrapping a model for DDP or FSDP2.

Without torchrun everything here is the single process: rank 0 of 1.
"""

import datetime
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import LostRankError, UserError, lost_rank


@dataclass(frozen=True)
class World:
    """This process's place among all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launch(device: str = "auto", *, patience_s: float | None = None) -> tuple[World, torch.device]:
    """Read torchrun's environment, join the process group, and choose this process's device.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        patience_s: seconds that a process waits for another before it takes it for lost; None takes torch's own, half
            an hour with gloo.

    Raises:
        UserError: if CUDA is asked for and there is none.
        LostRankError: if not all processes begin within a minute.
    """
    world = World(*(int(os.environ.get(n, d)) for n, d in _ENVIRONMENT))
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if wanted.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"--device {device} needs a CUDA GPU and this machine has none: use --device cpu")
        try:
            chosen = torch.device("cuda", world.local_rank) if wanted == "cuda" else torch.device(wanted)
            torch.cuda.set_device(chosen)
        except (RuntimeError, AssertionError, ValueError):
            raise UserError(
                f"--device {device} is not one of the {torch.cuda.device_count()} CUDA GPUs here, cuda:0 and on"
            ) from None
    elif wanted == "cpu":
        chosen = torch.device("cpu")
    else:
        raise UserError(f"unknown device {device!r}: choose auto, cpu, cuda or cuda:N")
    if world.size > 1 and not dist.is_initialized():
        _stores.append(_meet("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", patience_s))
    return world, chosen


MEETING_S = 60.0
"""Seconds that a process waits for all the others to begin, and again for the connections to them."""


def _meet(backend: str, patience_s: float | None) -> dist.Store:
    """Wait until all processes have come, and make their group; -> its store.

    The waiting is done by a thread: this one stays with Python, which ends the command at a signal.

    Raises:
        LostRankError: if they do not come, or one is lost before the group is made, within ``MEETING_S`` each.
    """
    came: list[Any] = []

    def wait() -> None:
        soon = datetime.timedelta(seconds=MEETING_S)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=soon))
            store.set_timeout(soon)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=soon)
            came.append(store)
        except Exception as error:  # of the store, of the network, of what the variables hold
            came.append(error)

    waiting = threading.Thread(target=wait, daemon=True, name="rendezvous")
    waiting.start()
    while waiting.is_alive():
        waiting.join(0.2)
    if isinstance(came[0], ValueError):  # a variable of torchrun's is missing
        raise UserError(f"the processes do not find each other: {str(came[0]).splitlines()[0]}")
    if isinstance(came[0], Exception):
        raise LostRankError(
            f"the {os.environ['WORLD_SIZE']} processes did not come together within {MEETING_S:.0f} s: one ended "
            "before it began, or MASTER_ADDR and MASTER_PORT are not the same for all"
        ) from came[0]
    came[0].set_timeout(_TORCHS_OWN)
    _set_timeout(datetime.timedelta(seconds=patience_s) if patience_s else _TORCHS_OWN)
    return came[0]


_TORCHS_OWN = datetime.timedelta(minutes=30)


def _set_timeout(timeout: datetime.timedelta) -> None:
    """How long the group's processes wait for each other, from here on."""
    own = getattr(dist, "set_timeout", None)  # torch before 2.14 has it under another name
    (own or dist.distributed_c10d._set_pg_timeout)(timeout)


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


_stores: list[dist.Store] = []


def store(name: str) -> dist.Store:
    """Keys and values that all processes see, with a connection of its own, so that a thread may use it."""
    return dist.PrefixStore(name, _stores[-1].clone())


def world() -> World:
    """The world of a running process group; a single process where there is none."""
    if not dist.is_initialized():
        return World()
    local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), dist.get_world_size(), *local)


def parallelize(model: nn.Module, mode: str, device: torch.device, *, blocks: Iterable[nn.Module] = ()) -> nn.Module:
    """Wrap a model for training on several processes; call it before building the optimizer.

    Args:
        mode: "ddp" replicates the model and averages gradients; "fsdp" shards parameters, gradients and optimizer
            state (FSDP2's ``fully_shard``).
        blocks: with "fsdp", the modules that are gathered one at a time (a transformer's layers).

    Returns:
        the model itself in a single process and with "fsdp", else its DDP wrapper.
    """
    if mode not in ("ddp", "fsdp"):
        raise UserError(f"unknown parallel mode {mode!r}: choose ddp or fsdp")
    if world().size == 1:
        return model
    if mode == "ddp":
        # Buffers are what each process computes from the same numbers (LTE's offsets): no need to send them around.
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world().size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and ``torch.compile`` wrappers: the one whose names a checkpoint uses."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def synchronising(wrapper: Any, last: bool) -> AbstractContextManager[Any]:
    """Around a forward and backward pass: processes exchange gradients at the last micro-batch of a step only."""
    if hasattr(wrapper, "set_requires_gradient_sync"):  # FSDP2
        wrapper.set_requires_gradient_sync(last)
    elif not last and hasattr(wrapper, "no_sync"):  # DDP
        return wrapper.no_sync()
    return nullcontext()


def gpus_of(device: torch.device) -> list[int]:
    """The GPUs whose energy a run on ``device`` takes, on this machine; none on the CPU."""
    if device.type != "cuda":
        return []
    place = world()
    return list(range(place.local_size)) if place.size > 1 else [device.index or 0]


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a scalar over all processes."""
    if world().size > 1:
        with speaking():
            dist.all_reduce(value)
        value = value / world().size
    return value


def any_rank(flag: int) -> int:
    """The largest of an integer over all processes, agreed through CPU memory (no GPU waits for it)."""
    if world().size == 1:
        return flag
    cell = torch.tensor(flag)
    with speaking():
        dist.all_reduce(cell, op=dist.ReduceOp.MAX)
    return int(cell)


def gather_objects(value: Any) -> list[Any]:
    """One value a process, in the order of ranks, on every process."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    with speaking():
        dist.all_gather_object(values, value)
    return values


def refusing_together(action: Callable[[], None]) -> None:
    """Call it, and refuse in every process what one of them refuses: the others would wait for that one.

    Raises:
        UserError: with the sentence of the first process that has one.
    """
    why = ""
    try:
        action()
    except UserError as error:
        why = str(error)
    if said := next(filter(None, gather_objects(why)), ""):
        raise UserError(said)


@contextmanager
def speaking() -> Iterator[None]:
    """Around a collective call.

    Raises:
        ConnectionAbortedError: if another process is lost, or does not answer for as long as :func:`launch` was told.
    """
    try:
        yield
    except RuntimeError as error:
        why = lost_rank(error)
        if not why:
            raise
        raise ConnectionAbortedError(why) from error
