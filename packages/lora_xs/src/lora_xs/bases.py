"""Bases for many modules: one weight at a time, from the disk cache where they are known, once per process
group."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from . import files
from .config import LoRAXSConfig
from .digest import weight_digests
from .errors import LoRAXSError
from .kinds import matrix_of, matrix_shape
from .svd import METHOD_VERSION, official_bases, random_bases, svd_bases
from .targets import Target

CACHE_FORMAT = "lora-xs bases 1"

SMALLEST_CACHED = 2**17
"""Entries of the smallest weight worth a file: below, decomposing takes less time than reading."""

Progress = Callable[[int, int, str], None]
"""Called with (done, total, module name)."""


@dataclass(frozen=True)
class Request:
    """A weight that needs bases."""

    target: Target
    rank: int

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def weight(self) -> Tensor:
        return self.target.weight

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (n, out, in) of a stack."""
        return matrix_shape(self.weight, self.target.kind)


def default_cache() -> Path:
    """The folder in LORA_XS_CACHE, else `lora_xs` in the user's cache folder."""
    if folder := os.environ.get("LORA_XS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_xs"


def make_bases(
    requests: list[Request], config: LoRAXSConfig, cache: Path | None, progress: Progress | None
) -> list[tuple[Tensor, Tensor]]:
    """A (r×in) and B (out×r) for each request, each with n before for a stack; on its weight's device, in its type.

    In a process group every process must call this with the same model: each computes its share of the
    layers, all get the same bytes.
    """
    for request in requests:
        out, width = request.shape[-2:]
        if request.rank > min(out, width):
            raise LoRAXSError(
                f"rank {request.rank} is larger than {request.name}, a {out}×{width} matrix; "
                f"use at most {min(out, width)}, or give this module its own rank in rank_pattern"
            )
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1 or any(isinstance(request.weight, FakeTensor) for request in requests):  # nothing to share
        return _compute(requests, config, cache, progress)
    rank = dist.get_rank()
    failure = None
    try:
        mine = iter(_compute(requests[rank::world], config, cache, progress))
    except Exception as error:  # the others must hear of it, or they would wait for ever
        mine, failure = iter(()), f"{type(error).__name__}: {error}"
    failures: list[str | None] = [None] * world
    dist.all_gather_object(failures, failure)
    for other, message in enumerate(failures):
        if message is not None:
            raise LoRAXSError(f"process {other} could not make its bases: {message}")
    shared = []
    for i, request in enumerate(requests):
        A, B = next(mine) if i % world == rank else _empty(request, config)
        shared.append((_broadcast(A, i % world), _broadcast(B, i % world)))
    return shared


def _compute(
    requests: list[Request], config: LoRAXSConfig, cache: Path | None, progress: Progress | None
) -> list[tuple[Tensor, Tensor]]:
    cached = [cache is not None and config.init == "svd" and _worth_caching(request) for request in requests]
    wanted = [request.weight for request, use in zip(requests, cached, strict=True) if use]
    digests = iter(weight_digests(wanted, reuse=True))
    result = []
    for i, (request, use) in enumerate(zip(requests, cached, strict=True)):
        if use:
            assert cache is not None
            key = _cache_key(next(digests), request, config)
            pair = _from_cache(cache / f"{key}.safetensors", request, config)
        else:
            pair = _decompose(request, config)
        result.append(pair)
        if progress is not None:
            progress(i + 1, len(requests), request.name)
    return result


def _decompose(request: Request, config: LoRAXSConfig) -> tuple[Tensor, Tensor]:
    A, B = _empty(request, config)
    if A.is_meta:
        return A, B
    W = None
    if config.init != "random":
        W = matrix_of(request.weight, request.target.kind)  # the only other copy of this one weight
        if not bool(torch.isfinite(W).all()):
            raise LoRAXSError(f"{request.name} has weights that are not finite; no bases can be made of them")
    # A stack's matrices one after another; a matrix is itself.
    parts = [(request.name, W, A, B)]
    if len(request.shape) == 3:
        parts = [(f"{request.name}.{i}", None if W is None else W[i], A[i], B[i]) for i in range(request.shape[0])]
    for name, matrix, a, b in parts:
        if matrix is None:
            values = random_bases((b.shape[0], a.shape[1]), request.rank, config.seed, name)
        elif config.svd == "official":
            values = official_bases(matrix, request.rank)
        else:
            values = svd_bases(matrix, request.rank, exact=config.svd == "exact")
        a.copy_(values[0])
        b.copy_(values[1])
    return A, B


def _empty(request: Request, config: LoRAXSConfig) -> tuple[Tensor, Tensor]:
    weight = request.weight
    *n, out, width = request.shape
    # Bases that are trained take small steps, which bf16 would swallow.
    dtype = torch.promote_types(weight.dtype, torch.float32) if config.train_bases else weight.dtype
    A = torch.empty(*n, request.rank, width, dtype=dtype, device=weight.device)
    return A, torch.empty(*n, out, request.rank, dtype=dtype, device=weight.device)


def _broadcast(tensor: Tensor, source: int) -> Tensor:
    # NCCL moves only CUDA memory; gloo takes what it is given.
    staged = tensor.contiguous()
    if dist.get_backend() == "nccl":
        staged = staged.cuda()
    dist.broadcast(staged, source)
    return tensor.copy_(staged)


def _worth_caching(request: Request) -> bool:
    weight = request.weight
    return not weight.is_meta and weight.numel() >= SMALLEST_CACHED


def _cache_key(digest: bytes, request: Request, config: LoRAXSConfig) -> str:
    stored = _empty(request, config)[0].dtype
    method = (METHOD_VERSION, config.svd, request.rank, request.target.kind.name, str(stored))
    return hashlib.sha256(digest + repr(method).encode()).hexdigest()


def _from_cache(path: Path, request: Request, config: LoRAXSConfig) -> tuple[Tensor, Tensor]:
    """The bases in `path`; computed and stored where the file is missing or damaged."""
    if path.exists():
        try:
            tensors, _ = files.read(path, CACHE_FORMAT)
        except LoRAXSError as error:
            warnings.warn(f"{error}. The bases of {request.name} are computed again.", stacklevel=2)
        else:
            A, B = _empty(request, config)
            return A.copy_(tensors["A"]), B.copy_(tensors["B"])
    A, B = _decompose(request, config)
    try:
        files.write(path, {"A": A, "B": B}, {}, CACHE_FORMAT)
    except OSError as error:
        warnings.warn(f"The bases of {request.name} could not be cached: {error}", stacklevel=2)
    return A, B
