"""The few places where a parameter sharded by FSDP2 (a DTensor of row shards) differs from a whole one.

A weight G sharded by rows needs no communication for R = G Qᵀ (each process has its rows of R); for R = Pᵀ G each
process has a summand, and R (r×n) is what is reduced.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _dtensor(x: Tensor):  # type: ignore[no-untyped-def]  # DTensor | None, without importing it for whole tensors
    if type(x).__name__ not in ("DTensor", "Parameter"):
        return None
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return x if isinstance(x, DTensor) else None


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor."""
    return _dtensor(x) is not None


def refuse(x: Tensor, what: str, instead: str) -> None:
    """Raises where x is a DTensor."""
    if is_sharded(x):
        raise ValueError(f"{what} cannot be updated while sharded by FSDP2: {instead}")


def zeros(p: Tensor, shape: tuple[int, ...], *, rows: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of `shape`, sharded like p where they share its rows, whole on every process otherwise."""
    d = _dtensor(p)
    if d is None or device.type == "meta":
        return torch.zeros(shape, dtype=dtype, device=device)
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import zeros as sharded_zeros

    placements = d.placements if rows else [Replicate()] * d.device_mesh.ndim
    return sharded_zeros(*shape, dtype=dtype, device_mesh=d.device_mesh, placements=placements)


def gathered(x: Tensor) -> Tensor:
    """x whole on every process."""
    d = _dtensor(x)
    return x if d is None else d.full_tensor()


def local(x: Tensor) -> Tensor:
    """The part of x that this process holds, sharing its memory."""
    d = _dtensor(x)
    return x if d is None else d.to_local()


def spread_like(x: Tensor, part: Tensor) -> Tensor:
    """The tensor of x's shape and sharding of which this process holds `part`."""
    d = _dtensor(x)
    if d is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, d.device_mesh, d.placements, run_check=False)


def in_whole_blocks(p: Tensor, shape: tuple[int, ...], block: int, *, rows: bool) -> bool:
    """Whether every process has equally many whole blocks of `block` numbers of a tensor as `zeros` shards it."""
    d = _dtensor(p)
    if d is None or not rows:
        return True
    shards = math.prod(n for n, s in zip(d.device_mesh.shape, d.placements, strict=True) if s.is_shard())
    return shape[0] % shards == 0 and math.prod(shape) // shards % block == 0


def reduced(R: Tensor) -> Tensor:
    """R with any pending sum over the processes carried out."""
    d = _dtensor(R)
    if d is None or not any(s.is_partial() for s in d.placements):
        return R
    from torch.distributed.tensor import Replicate

    return d.redistribute(placements=[Replicate() if s.is_partial() else s for s in d.placements])


def placed_as(x: Tensor, y: Tensor) -> Tensor:
    """x, of y's shape, spread over the processes as y is."""
    d, wanted = _dtensor(x), _dtensor(y)
    if d is None or wanted is None or d.placements == wanted.placements:
        return x
    return d.redistribute(placements=wanted.placements)


def placed(p: Tensor, x: Tensor | None, *, rows: bool) -> Tensor | None:
    """x, which every process has whole and alike, on p's mesh; nothing is sent."""
    d = _dtensor(p)
    if d is None or x is None:
        return x
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = d.placements if rows else [Replicate()] * d.device_mesh.ndim
    return distribute_tensor(x, d.device_mesh, placements, src_data_rank=None)


def like(p: Tensor, x: Tensor | None, *, rows: bool) -> Tensor | None:
    """x, the same on every process, placed on p's mesh: the first process's copy goes to all."""
    d = _dtensor(p)
    if d is None or x is None:
        return x
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(x, d.device_mesh, d.placements if rows else [Replicate()] * d.device_mesh.ndim)
