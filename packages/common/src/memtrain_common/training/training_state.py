"""Everything that a resumed run needs, taken from the objects of a training and given back to them.

The same state serves one process, DDP and FSDP2: sharded tensors are saved whole and sharded again when loaded.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..runs.state_tree import same_shapes, shard_like
from .distributed import gather_objects, world
from .rng import rng_state, set_rng_state


class Stateful(Protocol):
    """Something whose state belongs into a checkpoint, besides the model and the optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Parts(Protocol):
    """Processes that each hold a part of the model and its optimizer, which no wrapper keeps together for them."""

    apart: bool
    """Whether they do: False where this process holds everything, and a state is only converted."""
    speaks_each_step: bool
    """Whether :meth:`average_gradients` sends anything."""

    def average_gradients(self) -> None:
        """After the backward pass: parameters that all processes have get the mean of their gradients."""

    def gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """The whole state, on the process that writes; collective."""

    def scatter(self, state: dict[str, Any]) -> dict[str, Any]:
        """This process's part of a whole state; ValueError where it cannot be cut so."""

    def alone(self, state: dict[str, Any]) -> dict[str, Any]:
        """A whole state from this process's own, when others are lost."""

    def own_rows(self, state: dict[str, Any]) -> tuple[int, dict[str, tuple[int, Tensor]]] | None:
        """What no other process could save then, out of that state: a mark and rows, as
        :class:`~memtrain_common.runs.rescued_rows.Rows` has them."""


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, Stateful],
    *,
    parts: Parts | None = None,
    alone: bool = False,
    **plain: Any,
) -> dict[str, Any]:
    """The state as nested dicts. A collective call: every process's random generators are in it.

    Args:
        others: further objects with a state, by name.
        parts: makes the state whole.
        alone: not collective: others are lost.
        plain: values that need no object: the progress, the run's identity.
    """
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "others": {name: other.state_dict() for name, other in others.items()},
        "rng": [rng_state()] if alone else gather_objects(rng_state()),
        **plain,
    }
    if parts is None:
        return state
    return parts.alone(state) if alone else parts.gather(state)


def put_back(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, Stateful],
    *,
    where: Path,
    say: Callable[[str], None],
    parts: Parts | None = None,
) -> None:
    """Load what :func:`capture` took.

    Args:
        parts: cuts the whole state.
        where: the checkpoint, for messages.
        say: told when the random generators cannot be restored (another number of processes).

    Raises:
        UserError: if the checkpoint is of another model.
    """
    if parts is not None:
        try:
            state = parts.scatter(state)
        except ValueError as error:
            raise UserError(f"{where} cannot be gone on with: {error}") from None
    now = model.state_dict()
    difference = same_shapes(state["model"], now)
    if difference is not None:
        raise UserError(f"{where} belongs to another model: {difference}")
    model.load_state_dict(shard_like(state["model"], now))
    optimizer.load_state_dict(_shard_moments(state["optimizer"], optimizer))
    for name, other in others.items():
        other.load_state_dict(state["others"][name])
    if len(state["rng"]) == world().size:
        set_rng_state(state["rng"][world().rank])
    else:
        n = len(state["rng"])
        say(
            f"{where} was made by {n} process{'' if n == 1 else 'es'}, not {world().size}: dropout masks will differ "
            "from an uninterrupted run's; the data order does not"
        )


def check_resume_key(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuse a checkpoint that was made by another configuration, naming the first value that differs."""
    for name, value in now.items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{where} was made with {name}={saved[name]!r}, and this run has {name}={value!r}: give the value it "
                "was made with, or begin a new run"
            )


def infinite_buffers(model: nn.Module) -> frozenset[str]:
    """Names of the buffers that hold infinite numbers, as a mask of −∞ does."""
    found = model.named_buffers(remove_duplicate=False)
    dense = ((name, b) for name, b in found if b.layout == torch.strided and not b.is_meta)
    return frozenset(name for name, b in dense if not bool(b.isfinite().all()))


def all_finite(model: nn.Module, but: frozenset[str] = frozenset()) -> Tensor:
    """Whether every number in the model's state is finite, as a boolean tensor; of this process's shards.

    Args:
        but: names that are left out.
    """
    flags = [
        (value.to_local() if hasattr(value, "to_local") else value).isfinite().all()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and name not in but
    ]
    return torch.stack(flags).all() if flags else torch.tensor(True)


def _shard_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Give moments the sharding of their parameter (FSDP2); where nothing is sharded the state stays as it is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # in the order of the state's keys

    def moment(value: Any, parameter: Tensor) -> Any:
        same = isinstance(value, Tensor) and value.shape == parameter.shape
        return shard_like(value, parameter) if same else value

    sharded = {i: {k: moment(v, parameters[i]) for k, v in entries.items()} for i, entries in state["state"].items()}
    return {**state, "state": sharded}
