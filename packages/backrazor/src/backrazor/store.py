"""A tensor that several operations save is stored once, as long as the graph that needs it lives."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .saved import Saved


class Holder:
    """Keeps one stored tensor in the store; every graph node that needs it holds this object, until its backward."""

    __slots__ = ("__weakref__", "saved")

    def __init__(self, saved: Saved) -> None:
        self.saved = saved


class Store:
    """From a tensor (its memory, version and geometry) to what stands for it.

    An entry is forgotten when the last graph node that holds it is gone. A tensor changed in place has a new version, and
    memory given to another tensor is another storage: neither is mistaken for what was stored.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[StorageWeakRef, weakref.ref[Holder]]] = {}

    def hold(self, x: Tensor, kind: str, make: Callable[[], Saved]) -> Holder:
        """What stands for ``x``, made only if it is not stored yet. ``kind`` tells formats of one tensor apart."""
        found = self.find(x, kind)
        return found if found is not None else self.put(x, kind, make())

    def find(self, x: Tensor, kind: str) -> Holder | None:
        entry = self._entries.get(_key(x, kind))
        return entry[1]() if entry is not None else None

    def put(self, x: Tensor, kind: str, saved: Saved) -> Holder:
        key = _key(x, kind)
        holder = Holder(saved)
        forget = weakref.ref(holder, lambda _, key=key, entries=self._entries: entries.pop(key, None))
        # The weak reference to the storage keeps its address from being used again while the entry stands.
        self._entries[key] = (StorageWeakRef(x.untyped_storage()), forget)
        return holder

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def _key(x: Tensor, kind: str) -> tuple[Any, ...]:
    return (kind, x.untyped_storage()._cdata, x._version, x.storage_offset(), x.dtype, tuple(x.shape), x.stride())
