"""The CPU's packing in C (cpu_kernels.c): built once with the system's C compiler, as Triton builds for a GPU.

Each function gives the same numbers as the vectorised torch of :mod:`.packing`, :mod:`.bits`, :mod:`.coded` and
:mod:`.values`, several times faster, or None where it does not apply (another dtype, a GPU's tensor). Without a
compiler a warning says so once and the vectorised torch is used; ``BACKRAZOR_KERNELS=off`` asks for that.

The library stands in ``$XDG_CACHE_HOME/backrazor`` (``~/.cache/backrazor``) under a name that depends on its source,
the compiler and the processor. ``CC`` names another compiler. Its threads are those of torch (one OpenMP runtime).
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .rows import Rows

SOURCE = Path(__file__).with_name("cpu_kernels.c")
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
TUNED: tuple[list[str], ...] = (
    ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
    ["-march=native", "-fopenmp"],
    ["-fopenmp"],
    [],
)
"""Tried in turn: the first that the compiler takes and that loads is used."""
GENERATOR_BYTES = 5056
"""Of the state of PyTorch's CPU generator, as br_bernoulli reads it."""
KINDS = {torch.float32: 0, torch.bfloat16: 1}

# p: a tensor's memory, i: int, l: 64-bit integer, f: float
SIGNATURES = {
    "br_pack_bytes": "plip",
    "br_unpack_bytes": "plip",
    "br_code": "plppiiip",
    "br_decode": "pliffpp",
    "br_pack": "pilllilippiilp",
    "br_unpack": "pippllllililp",
    "br_encode8": "pllpp",
    "br_decode8": "ppllp",
    "br_lowbit_pack": "pippllllifpp",
    "br_lowbit_unpack": "ppllllip",
    "br_bernoulli": "pllp",
    "br_dropout": "pplfp",
}


@functools.cache
def library() -> Any:
    """The C functions, built if they are not yet; None (and a warning, once) where they cannot be."""
    if os.environ.get("BACKRAZOR_KERNELS", "on") == "off":
        return None
    compiler = shlex.split(os.environ.get("CC", "cc"))
    reasons = []
    for tuned in TUNED:
        try:
            return _load(_build(compiler, tuned))
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(getattr(error, "stderr", None) or str(error))
    warnings.warn(
        f"Back Razor's CPU kernels could not be built with {shlex.join(compiler)!r}, so packing is done by torch, "
        f"which is slower, and several times so in the mode pruned: install a C compiler or name one in CC "
        f"({reasons[-1].strip().splitlines()[-1]})",
        stacklevel=2,
    )
    return None


def _build(compiler: list[str], tuned: list[str]) -> Path:
    """The library's file; an unfinished one is never seen under its name."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = "\n".join((SOURCE.read_text(), version, *compiler, *tuned, _processor()))
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    path = _folder() / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made, linked = Path(folder, "kernels.o"), Path(folder, name)
            for command in (
                [*compiler, *FLAGS, *tuned, "-c", str(SOURCE), "-o", str(made)],
                # Not linked with an OpenMP runtime: two of them would fight, and torch has loaded its own.
                [*compiler, "-shared", str(made), "-lm", "-o", str(linked)],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True)
            linked.replace(path)
    return path


def _folder() -> Path:
    """The cache's folder, of this user alone; one for this process where it cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "backrazor"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="backrazor-")
    _own_folder.kept = made  # type: ignore[attr-defined]
    return Path(made.name)


def _processor() -> str:
    """What decides which instructions -march=native uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {flags}"


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOW)  # now: a missing symbol is an error here, not later
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}
    for name, signature in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = [types[letter] for letter in signature]
        function.restype = ctypes.c_int
    return loaded


def _fits(*tensors: Tensor) -> bool:
    """Plain tensors (a fake one has no memory) of the CPU, without holes."""
    plain = all(type(t) is Tensor and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return plain and library() is not None


def pack(x: Tensor, layout: Layout, dtype: torch.dtype, binomials: Tensor, n_bytes: int) -> Any:
    """Values (spans, k, m) in ``dtype`` and packed ranks, uint8 (spans, n_bytes), of ``x`` (spans, size)."""
    groups, m = layout.groups, layout.columns
    if x.dtype not in KINDS or dtype not in KINDS or x.shape[1] <= (groups.n - 1) * m or not _fits(x):
        return None
    kept = x.new_empty((layout.spans, groups.k, m), dtype=dtype)
    ranks = x.new_empty((layout.spans, n_bytes), dtype=torch.uint8)
    failed = library().br_pack(
        x.data_ptr(), KINDS[x.dtype], layout.spans, x.shape[1], groups.n, groups.k, m, groups.place_bits,
        binomials.data_ptr(), kept.data_ptr(), KINDS[dtype], groups.rank_bits, n_bytes, ranks.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the ranks of an activation's groups")
    return kept, ranks


def unpack(values: Tensor, ranks: Tensor, layout: Layout, dtype: torch.dtype, subsets: Tensor) -> Tensor | None:
    """Zeros with ``values`` (spans, k, m) at the places of the packed ``ranks``: (spans · size,) in float32.

    ``subsets`` is the table of :mod:`.groups` in uint16.
    """
    groups, m = layout.groups, layout.columns
    short = layout.size <= (groups.n - 1) * m
    if dtype != torch.float32 or values.dtype not in KINDS or short or not _fits(values, ranks):
        return None
    out = torch.empty(layout.spans * layout.size)
    library().br_unpack(
        values.data_ptr(), KINDS[values.dtype], ranks.data_ptr(), subsets.data_ptr(), subsets.shape[1], layout.spans,
        layout.size, groups.n, groups.k, m, groups.rank_bits, ranks.shape[1], out.data_ptr(),
    )  # fmt: skip
    return out


def pack_codes(codes: Tensor, width: int, n_bytes: int) -> Tensor | None:
    """One row of codes, uint8 (n,) of at most 8 bits, in ``n_bytes``."""
    if codes.dim() != 1 or codes.dtype != torch.uint8 or width > 8 or not _fits(codes):
        return None
    out = codes.new_empty(n_bytes)
    library().br_pack_bytes(codes.data_ptr(), codes.numel(), width, out.data_ptr())
    return out


def unpack_codes(packed: Tensor, n: int, width: int) -> Tensor | None:
    """One row of packed codes as uint8 (n,)."""
    if packed.dim() != 1 or width > 8 or not _fits(packed):
        return None
    out = packed.new_empty(n)
    library().br_unpack_bytes(packed.data_ptr(), n, width, out.data_ptr())
    return out


def code(x: Tensor, points: Tensor, steps: Tensor, first: int, width: int, n_bytes: int) -> Tensor | None:
    """Packed codes of ``x`` (n,): ``first`` plus the int32 steps of the float32 points that an element exceeds."""
    if x.dtype != torch.float32 or not _fits(x):
        return None
    out = x.new_empty(n_bytes, dtype=torch.uint8)
    library().br_code(
        x.data_ptr(), x.numel(), points.data_ptr(), steps.data_ptr(), points.numel(), first, width, out.data_ptr()
    )
    return out


def decode(packed: Tensor, n: int, width: int, first: float, step: float, factor: Tensor | None = None) -> Any:
    """first + step · code, times ``factor`` (n, contiguous float32) if it is given: float32 (n,)."""
    if not _fits(packed):
        return None
    out = packed.new_empty(n, dtype=torch.float32)
    other = factor.data_ptr() if factor is not None else None
    library().br_decode(packed.data_ptr(), n, width, first, step, other, out.data_ptr())
    return out


def encode8(x: Tensor, blocks: int) -> tuple[Tensor, Tensor] | None:
    """int8 codes (spans, n) and bfloat16 scales (spans, blocks of 128) of ``x`` (spans, n)."""
    if x.dtype != torch.float32 or not _fits(x):
        return None
    spans, n = x.shape
    codes = x.new_empty((spans, n), dtype=torch.int8)
    scales = x.new_empty((spans, blocks), dtype=torch.bfloat16)
    library().br_encode8(x.data_ptr(), spans, n, codes.data_ptr(), scales.data_ptr())
    return codes, scales


def decode8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What :func:`encode8` wrote, float32 (spans, n)."""
    if dtype != torch.float32 or not _fits(codes, scales):
        return None
    out = codes.new_empty(codes.shape, dtype=torch.float32)
    library().br_decode8(codes.data_ptr(), scales.data_ptr(), *codes.shape, out.data_ptr())
    return out


def lowbit_pack(
    x: Tensor, cut: Rows, shrink: float, ends: Tensor, n_bytes: int, norm: "tuple[Tensor | None, Tensor] | None" = None
) -> Tensor | None:
    """Packed codes, uint8 (n_bytes,), of ``x`` (blocks, rows, columns); fills in the ends.

    With ``norm``, mean and rstd of each row, of (x − mean) · rstd, which then is never there as a whole.
    """
    if x.dtype not in KINDS or not _fits(x, ends):
        return None
    mean, rstd = norm if norm is not None else (None, None)
    given = [t for t in (mean, rstd) if t is not None]
    whole = all(t.dtype == torch.float32 and t.numel() == cut.blocks * cut.rows for t in given)
    if given and (x.dtype != torch.float32 or cut.columns == 1 or not whole or not _fits(*given)):
        return None
    out = x.new_empty(n_bytes, dtype=torch.uint8)
    failed = library().br_lowbit_pack(
        x.data_ptr(), KINDS[x.dtype], mean.data_ptr() if mean is not None else None,
        rstd.data_ptr() if rstd is not None else None, cut.blocks, cut.rows, cut.columns, cut.group, cut.width, shrink,
        ends.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the codes of an activation")
    return out


def lowbit_unpack(codes: Tensor, ends: Tensor, cut: Rows, dtype: torch.dtype) -> Tensor | None:
    """first + code · step, float32 (elements,)."""
    if dtype != torch.float32 or not _fits(codes, ends):
        return None
    out = torch.empty(cut.elements)
    library().br_lowbit_unpack(
        codes.data_ptr(), ends.data_ptr(), cut.blocks, cut.rows, cut.columns, cut.group, cut.width, out.data_ptr()
    )
    return out


def bernoulli(state: Tensor, p: float, kept: Tensor) -> bool:
    """Fill ``kept``, bool, as ``bernoulli_(p)`` would by a generator in ``state``, which moves on; False: not done."""
    if kept.dtype != torch.bool or state.numel() != GENERATOR_BYTES or not _fits(state, kept):
        return False
    below = math.ceil(math.ldexp(p, 53))
    return bool(library().br_bernoulli(state.data_ptr(), kept.numel(), below, kept.data_ptr()) == 0)


def dropout(x: Tensor, kept: Tensor, scale: float) -> Tensor | None:
    """x · scale where ``kept``, bool, and x · 0 elsewhere; both without holes, in the same order of memory."""
    if x.dtype != torch.float32 or x.stride() != kept.stride() or type(x) is not Tensor or x.device.type != "cpu":
        return None
    y = torch.empty_like(x)
    if y.stride() != x.stride() or library() is None:
        return None
    library().br_dropout(x.data_ptr(), kept.data_ptr(), x.numel(), scale, y.data_ptr())
    return y
