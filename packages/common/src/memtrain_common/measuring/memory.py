"""The memory ledger: bytes by category and by layer, measured on a training step.

Categories (design: weights, gradients, optimizer state, saved activations, buffers) are counted as unique storages:
a tied weight, a view, or a tensor that several operations save is counted once, with its whole storage, because
that is what stays allocated. What an operation saves for the backward pass is seen through
``torch.autograd.graph.saved_tensors_hooks``, so a method that saves packed values is counted by what it packs; what
selective checkpointing caches besides is counted too.

Not seen: workspace and temporaries within an operation, and tensors that a custom ``autograd.Function`` stashes on
its ``ctx`` instead of giving them to ``save_for_backward``. The process's peak
(:mod:`memtrain_common.measuring.peak`) contains those too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import UserError
from ..files import read_json, write_json
from .internals import innermost_hooks, selective_checkpoints

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True)
class Ledger:
    """Bytes by category and layer. A layer is a module's path; the model's own is "(model)"."""

    bytes_by_layer: dict[str, dict[str, int]] = field(default_factory=lambda: {c: {} for c in CATEGORIES})

    def total(self, category: str) -> int:
        """Bytes of one category over all layers."""
        return sum(self.bytes_by_layer[category].values())

    @property
    def totals(self) -> dict[str, int]:
        return {category: self.total(category) for category in CATEGORIES}

    def save(self, path: Path, **more: Any) -> None:
        """Write ``memory.json``: totals, then every layer, in bytes."""
        content = {"unit": "bytes", "totals": self.totals, **more, "by_layer": self.bytes_by_layer}
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """What :meth:`save` wrote.

        Raises:
            UserError: if the file is missing or damaged.
        """
        try:
            layers = read_json(path)["by_layer"]
            return cls({str(c): {str(k): int(v) for k, v in sizes.items()} for c, sizes in layers.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a memory ledger ({error}): the run's memory.json is needed") from None


class SavedActivations:
    """Context around a forward pass that records what is saved for the backward pass, by layer.

    Use::

        with SavedActivations(model) as saved:
            loss = loss_fn(model, batch)
        bytes_by_layer = saved.by_layer()  # before backward frees them
        loss.backward()

    A batch that is itself saved (an embedding keeps its indices) counts; parameters and buffers do not. Entered within
    other saved-tensor hooks (``save_on_cpu``), it leaves them at work and counts what they pack.

    Args:
        model: whose modules are the layers.
        by_layer: False gives everything to "(model)" and hooks no module: a compiled model has no layers left.
        by_operation: also note in which operation each tensor was saved, for :meth:`by_operation`.
    """

    def __init__(self, model: nn.Module, *, by_layer: bool = True, by_operation: bool = False) -> None:
        self._model = model
        self._hook_layers = by_layer
        self._stack = ["(model)"]
        self._operations = _Operations() if by_operation else None
        # a storage's key -> (reference, (layer, operation))
        self._seen: dict[int, tuple[StorageWeakRef, tuple[str, str]]] = {}
        self._handles: list[Any] = []
        self._hooks: Any = None

    def __enter__(self) -> "SavedActivations":
        for name, module in self._model.named_modules() if self._hook_layers else ():
            layer = name or "(model)"
            enter = lambda *_, layer=layer: self._stack.append(layer)  # noqa: E731
            leave = lambda *_: self._stack.pop() and None  # noqa: E731
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        outer = innermost_hooks()  # autograd itself applies the innermost only
        # Detached: a node that held its own output with its history would be a cycle, and outlive a graph let go.
        pack, unpack = outer if outer is not None else (Tensor.detach, _same)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._note(pack(tensor)), unpack)
        self._hooks.__enter__()
        self._cached = selective_checkpoints(self._note)
        self._cached.__enter__()
        if self._operations is not None:
            self._operations.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._operations is not None:
            self._operations.__exit__(kind, error, trace)
        self._cached.__exit__(kind, error, trace)
        self._hooks.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def _note(self, packed: Any) -> Any:
        for tensor in _tensors_in(packed):
            for storage in storages_of(tensor):
                if _key(storage) not in self._seen:
                    place = self._stack[-1], self._operations.now if self._operations is not None else ""
                    self._seen[_key(storage)] = (StorageWeakRef(storage), place)
        return packed

    def by_layer(self) -> dict[str, int]:
        """Bytes by layer of what is still held, without parameters and buffers; call it before ``backward``."""
        layers: dict[str, int] = {}
        for (layer, _), n_bytes in self.by_operation().items():
            layers[layer] = layers.get(layer, 0) + n_bytes
        return layers

    def by_operation(self) -> dict[tuple[str, str], int]:
        """The same by (layer, operation): the first that saved a tensor; "" where operations were not noted."""
        own = {_key(s) for t in _model_tensors(self._model) for s in storages_of(t)}
        places: dict[tuple[str, str], int] = {}
        for key, (reference, place) in self._seen.items():
            if key not in own and not reference.expired():
                # Read now, not when it was saved: FSDP2 empties a layer's gathered weights after its forward.
                n_bytes = torch.UntypedStorage._new_with_weak_ptr(reference.cdata).nbytes()
                places[place] = places.get(place, 0) + n_bytes
        return {place: n_bytes for place, n_bytes in places.items() if n_bytes}


class _Operations(TorchFunctionMode):
    """Knows the name of the function of torch that is running: the outermost one."""

    def __init__(self) -> None:
        super().__init__()
        self.now = "(none)"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.now
        if before == "(none)":
            self.now = getattr(func, "__name__", str(func)).strip("_")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.now = before


def _same(value: Any) -> Any:
    return value


def measure(model: nn.Module, optimizer: torch.optim.Optimizer | None, activations: dict[str, int]) -> Ledger:
    """The ledger after a backward pass and an optimizer step, with the activations recorded before them.

    Args:
        model: gradients are what its parameters hold now, so call it before ``zero_grad``.
        optimizer: every tensor in its state is counted, at the layer of its parameter. None counts none.
        activations: :meth:`SavedActivations.by_layer`.
    """
    seen: set[int] = set()
    owner = {p: _layer(name) for name, p in model.named_parameters()}
    buffers = ((_layer(name), b) for name, b in model.named_buffers())
    gradients = ((layer, p.grad) for p, layer in owner.items() if p.grad is not None)
    return Ledger(
        {
            "weights": _count(((layer, p) for p, layer in owner.items()), seen),
            "gradients": _count(gradients, seen),
            "optimizer": _count(_optimizer_tensors(optimizer, owner), seen),
            "activations": dict(activations),
            "buffers": _count(buffers, seen),
        }
    )


def _count(tensors: Iterable[tuple[str, Tensor]], seen: set[int]) -> dict[str, int]:
    layers: dict[str, int] = {}
    for layer, tensor in tensors:
        for storage in storages_of(tensor):
            if storage.nbytes() and _key(storage) not in seen:
                seen.add(_key(storage))
                layers[layer] = layers.get(layer, 0) + storage.nbytes()
    return layers


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer | None, owner: dict[nn.Parameter, str]
) -> Iterator[tuple[str, Tensor]]:
    for parameter, state in (optimizer.state if optimizer is not None else {}).items():
        layer = owner.get(parameter, "(optimizer)") if isinstance(parameter, nn.Parameter) else "(optimizer)"
        for tensor in _tensors_in(state):
            yield layer, tensor


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor; a wrapper subclass (DTensor, a quantised tensor) has those of its parts."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a DTensor also names its device mesh
                yield from storages_of(part)
    elif tensor.layout == torch.strided:
        yield tensor.untyped_storage()
    else:  # sparse: its values and indices are ordinary tensors
        parts = (tensor._values(), tensor._indices()) if tensor.layout == torch.sparse_coo else ()
        for part in parts:
            yield from storages_of(part)


def _key(storage: torch.UntypedStorage) -> int:
    """What tells a storage from every other: the address of its record, which a weak reference keeps from being given
    away, and which a storage without memory (of a fake tensor) has too."""
    return storage._cdata


def _model_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or "(model)"
