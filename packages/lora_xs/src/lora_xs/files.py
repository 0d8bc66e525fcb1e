"""Safetensors files that are written whole or not at all, and verified when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .digest import memory_of, weight_digest
from .errors import LoRAXSError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


MOST_HEADER = 64 << 20
"""Bytes of a file's header."""


Contents = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and header of a file."""


def sealed(tensors: dict[str, Tensor], header: dict[str, str], kind: str) -> Contents:
    """What is to be written, with the SHA-256 of all of it in its header."""
    tensors = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    header = {"format": kind, **header}
    return tensors, {**header, "sha256": _checksum(tensors, header)}


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str], kind: str) -> None:
    """Write `tensors` and `header` to `path`, whole or not at all."""
    write_together({path: sealed(tensors, header, kind)})


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a plain safetensors file, whole or not at all."""
    write_together({path: (tensors, metadata)})


def write_together(files: dict[Path, Contents]) -> None:
    """Write files that belong together, by way of files beside them: all are complete before the first is renamed."""
    partial: dict[Path, Path] = {}
    try:
        for path, contents in files.items():
            partial[path] = path.with_name(f".{path.name}.{os.getpid()}")
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(partial[path], *contents)
        for path, complete in partial.items():
            os.replace(complete, path)
    finally:
        for left in partial.values():
            left.unlink(missing_ok=True)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file. The same tensors give the same bytes, which the safetensors package does not promise (its
    metadata come in any order), and numpy is not needed."""
    tensors = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(memory_of(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def _plain(name: str, tensor: Tensor) -> Tensor:
    """On the CPU, with its values in its memory, where a lazy conjugate or negative has only a flag."""
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        raise LoRAXSError(
            f"{name} cannot be written: it is {tensor.layout} of {tensor.dtype}, which these files do not hold"
        )
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def read_header(path: Path, kind: str) -> dict[str, str]:
    """The header of a file that `write` made, without its tensors (which are then not verified)."""
    return _open(path, kind, tensors=False)[1]


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and header of a file that `write` made; a damaged one is refused."""
    tensors, header = _open(path, kind, tensors=True)
    if _checksum(tensors, {k: v for k, v in header.items() if k != "sha256"}) != header.get("sha256"):
        raise LoRAXSError(f"{path} is damaged: its contents do not have the SHA-256 that its header states")
    return tensors, header


def _open(path: Path, kind: str, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > MOST_HEADER:
            raise LoRAXSError(
                f"{path} claims a header of {length / 2**20:.0f} MiB: an adapter's has at most {MOST_HEADER >> 20} MiB"
            )
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != kind:
                raise LoRAXSError(f"{path} is no {kind} file: its header gives the format {header.get('format')!r}")
            return {name: file.get_tensor(name) for name in file.keys()} if tensors else {}, header  # noqa: SIM118
    except FileNotFoundError as error:
        raise LoRAXSError(f"there is no file {path}") from error
    except SafetensorError as error:
        raise LoRAXSError(f"{path} is no complete safetensors file ({error}); was it truncated?") from error


def _checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    sha = hashlib.sha256(repr(sorted(header.items())).encode())
    for name in sorted(tensors):
        sha.update(name.encode() + weight_digest(tensors[name]))
    return sha.hexdigest()
