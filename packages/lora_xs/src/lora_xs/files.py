"""Safetensors files that are written whole or not at all, and verified when they are read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .digest import weight_digest
from .errors import LoRAXSError


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str], kind: str) -> None:
    """Write `tensors` and `header` to `path`, by way of a file beside it that is renamed when it is
    complete."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": kind, **header}
    data = save(tensors, metadata={**header, "sha256": _checksum(tensors, header)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_header(path: Path, kind: str) -> dict[str, str]:
    """The header of a file that `write` made, without its tensors (which are then not verified)."""
    return _open(path, kind, tensors=False)[1]


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and header of a file that `write` made; a damaged one is refused."""
    tensors, header = _open(path, kind, tensors=True)
    if _checksum(tensors, {k: v for k, v in header.items() if k != "sha256"}) != header.get("sha256"):
        raise LoRAXSError(f"{path} is damaged: its contents do not have the SHA-256 that its header states.")
    return tensors, header


def _open(path: Path, kind: str, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != kind:
                raise LoRAXSError(
                    f"{path} is no {kind} file: its header gives the format {header.get('format')!r}."
                )
            return {name: file.get_tensor(name) for name in file.keys()} if tensors else {}, header  # noqa: SIM118
    except FileNotFoundError as error:
        raise LoRAXSError(f"there is no file {path}.") from error
    except SafetensorError as error:
        raise LoRAXSError(f"{path} is no complete safetensors file ({error}); was it truncated?") from error


def _checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    sha = hashlib.sha256(repr(sorted(header.items())).encode())
    for name in sorted(tensors):
        sha.update(name.encode() + weight_digest(tensors[name]))
    return sha.hexdigest()
