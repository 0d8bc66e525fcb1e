"""SHA-256 of weights: the name of a weight in the cache, and what an adapter checks before it is loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .kinds import is_quantized

_known: Any = WeakIdKeyDictionary()  # weight → ((address, version), digest)


def weight_digest(weight: Tensor) -> bytes:
    """SHA-256 of the weight's type, shape and bytes; of a quantised weight, those of what it stores."""
    sha = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    if is_quantized(weight):
        names, context = weight.__tensor_flatten__()  # type: ignore[attr-defined]
        sha.update(f"{type(weight).__name__} {names} {context}".encode())
        parts = [getattr(weight, name) for name in names]
        for part in parts:
            if isinstance(part, Tensor):
                sha.update(weight_digest(part))
        return sha.digest()
    data = weight.detach().cpu().contiguous()
    sha.update(memory_of(data))  # hashlib reads it in place and releases the interpreter lock
    return sha.digest()


def memory_of(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, without a copy and without numpy; valid while the tensor
    lives."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else b""


def weight_digests(weights: Iterable[Tensor], *, reuse: bool = False) -> list[bytes]:
    """The digest of each weight, hashed on all cores.

    `reuse` takes a digest from an earlier call while the weight has the same address and version counter
    (frozen weights that only `.data` can change unseen).
    """
    weights = list(weights)

    def one(weight: Tensor) -> bytes:
        stamp = (weight.data_ptr(), weight._version) if not is_quantized(weight) else None
        known = _known.get(weight) if reuse and stamp else None
        if known is not None and known[0] == stamp:
            return known[1]
        digest = weight_digest(weight)
        _known[weight] = (stamp, digest)
        return digest

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, weights))
