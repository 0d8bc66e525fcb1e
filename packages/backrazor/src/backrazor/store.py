"""A tensor that several operations save is stored once, as long as the graph that needs it lives."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .saved import Dense, Geometry, Recipe, Saved


class Holder:
    """Keeps one stored tensor in the store; every graph node that needs it holds this object, until its backward."""

    __slots__ = ("__weakref__", "rebuilt", "saved", "shared")

    def __init__(self, saved: Saved, rebuilt: "Rebuilt | None" = None) -> None:
        self.saved = saved
        self.shared: list[Holder] = []
        """What is made from the same tensors, and stays in the store as long as they do."""
        self.rebuilt = rebuilt if rebuilt is not None else Rebuilt()
        """Common to what is made from the same tensors."""


class Rebuilt:
    """What was made dense again of one stored tensor, while graph nodes are left that need it.

    q, k and v, or a norm and the layer after it, run their backward passes one after the other and are served by one
    dense tensor. At most ``MOST`` such tensors are kept at a time: an attention's Q, K, V and P.
    """

    __slots__ = ("__weakref__", "dense", "users")
    MOST = 4
    _recent: ClassVar["list[weakref.ref[Rebuilt]]"] = []

    def __init__(self) -> None:
        self.users = 0
        """Graph nodes that have yet to run."""
        self.dense: Tensor | None = None

    def get(self, recipe: Recipe, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """The dense tensor, and whether the caller alone has it."""
        x, alone = self.dense, self.users == 0
        if x is None or x.dtype != dtype:
            x = recipe.rebuild(tensors, dtype)
            if not alone:
                self._remember(x)
        if alone:
            self.dense = None
        return x, alone

    def _remember(self, x: Tensor) -> None:
        recent = [other for ref in Rebuilt._recent if (other := ref()) is not None and other.dense is not None]
        recent = [other for other in recent if other is not self]
        for other in recent[: max(0, len(recent) - Rebuilt.MOST + 1)]:
            other.dense = None
        Rebuilt._recent = [weakref.ref(other) for other in [*recent[-Rebuilt.MOST + 1 :], self]]
        self.dense = x


@dataclass(frozen=True)
class Held:
    """What stands for a tensor, seen by one operation: it may have been stored in another shape of the same memory."""

    holder: Holder
    geometry: Geometry | None
    """Of the tensor that this operation has; None where it has the stored shape."""

    @property
    def saved(self) -> Saved:
        return self.holder.saved


class Store:
    """From a tensor (its memory and version) to what stands for it.

    An entry is forgotten when the last graph node that holds it is gone. A tensor changed in place has a new
    version, and memory given to another tensor is another storage: neither is mistaken for what was stored. Of memory
    that may be changed without a new version (``.data``) nothing is shared.
    """

    def __init__(self) -> None:
        self._uncounted: dict[int, StorageWeakRef] = {}
        self._entries: dict[Any, tuple[StorageWeakRef, weakref.ref[Holder]]] = {}

    def hold(self, x: Tensor, kind: str, make: Callable[[], Saved]) -> Held:
        """What stands for ``x``, made only if it is not stored yet. ``kind`` tells formats of one tensor apart."""
        found = self.find(x, kind)
        return found if found is not None else self.put(x, kind, make())

    def find(self, x: Tensor, kind: str) -> Held | None:
        key, geometry = _key(x, kind)
        entry = self._entries.get(key)
        holder = entry[1]() if entry is not None else None
        return Held(holder, geometry) if holder is not None else None

    def put(self, x: Tensor, kind: str, saved: Saved, rebuilt: Rebuilt | None = None) -> Held:
        """Remember that ``saved`` stands for ``x``."""
        key, geometry = _key(x, kind)
        holder = Holder(saved, rebuilt)
        if self._uncounted and key[0] in self._uncounted:
            return Held(holder, geometry)
        if isinstance(saved.recipe, Dense):  # PyTorch's own saving shares what is saved by reference
            return Held(holder, None)
        entries = self._entries

        def gone(_: Any) -> None:
            entries.pop(key, None)

        forget = weakref.ref(holder, gone)
        # The weak reference to the storage keeps its address from being used again while the entry stands.
        self._entries[key] = (StorageWeakRef(x.untyped_storage()), forget)
        return Held(holder, geometry)

    def unshare(self, x: Tensor) -> None:
        """Forget what stands for the memory of ``x``, and for what is made of it from here on."""
        if x.layout is not torch.strided or x.is_nested:
            return
        storage = x.untyped_storage()
        self._uncounted[storage._cdata] = StorageWeakRef(storage)
        for key in [key for key in self._entries if key[0] == storage._cdata]:
            del self._entries[key]

    def clear(self) -> None:
        self._entries.clear()
        self._uncounted.clear()

    def __len__(self) -> int:
        return len(self._entries)


def _key(x: Tensor, kind: str) -> tuple[tuple[Any, ...], Geometry | None]:
    """A key that all shapes of the same stretch of memory share, and the geometry that tells them apart."""
    geometry = Geometry.of(x)
    fills = geometry.stride == tuple(x.stride())
    memory = (x.untyped_storage()._cdata, x.storage_offset(), x._version, x.dtype, x.is_neg(), kind)
    if fills:
        return (*memory, x.numel()), geometry
    return (*memory, tuple(x.shape), tuple(x.stride())), None


def seen_as(x: Tensor, geometry: Geometry | None) -> Tensor:
    """A rebuilt tensor in the shape that an operation had."""
    if geometry is None or (geometry.shape == tuple(x.shape) and geometry.stride == tuple(x.stride())):
        return x
    return torch.as_strided(x, geometry.shape, geometry.stride, x.storage_offset())
