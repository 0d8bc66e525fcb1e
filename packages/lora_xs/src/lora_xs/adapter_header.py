"""The header of an adapter file: what it says, and how it is packed."""

from __future__ import annotations

import base64
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import LoRAXSConfig
from .errors import LoRAXSError

ADAPTER, ADAPTER_FORMAT = "adapter.safetensors", "lora-xs adapter 1"
MOST_UNPACKED = 64 << 20
"""Bytes of the list of modules: a million of them have less."""
HEAD_FILE, HEAD_FORMAT = "head.safetensors", "lora-xs head 1"


@dataclass(frozen=True)
class AdaptedModule:
    """One module (or parameter) of an adapter file."""

    name: str
    kind: str
    out: int
    width: int
    rank: int
    stack: int = 0
    """Matrices one after another; 0 is a single one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W: (out, in), or (n, out, in)."""
        return (self.stack, self.out, self.width) if self.stack else (self.out, self.width)

    @property
    def r_shape(self) -> tuple[int, ...]:
        """Of R: (r, r), or (n, r, r)."""
        return (self.stack, self.rank, self.rank) if self.stack else (self.rank, self.rank)

    @property
    def trained(self) -> int:
        """Entries of R."""
        return math.prod(self.r_shape)

    def to_list(self) -> list[str | int]:
        """As the header holds it; without `stack`, where that is 0, as files had it before there were stacks."""
        entries: list[str | int] = [self.name, self.kind, self.out, self.width, self.rank]
        return [*entries, self.stack] if self.stack else entries


@dataclass(frozen=True)
class AdapterInfo:
    """What the header of an adapter file says."""

    config: LoRAXSConfig
    modules: tuple[AdaptedModule, ...]
    base_sha256: str
    stored_bases: bool
    heads: tuple[str, ...]

    @property
    def trained(self) -> int:
        """Entries of all R together."""
        return sum(module.trained for module in self.modules)


def parse_header(file: Path, header: dict[str, str]) -> AdapterInfo:
    try:
        return AdapterInfo(
            config=LoRAXSConfig.from_json(header["config"]),
            modules=tuple(AdaptedModule(*m) for m in unpack(header["modules"])),
            base_sha256=header["base_sha256"],
            stored_bases=json.loads(header["stored_bases"]),
            heads=tuple(json.loads(header["heads"])),
        )
    except (KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:
        raise LoRAXSError(f"{file} has no complete LoRA-XS header ({error})") from error


def pack(value: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(value).encode(), 9)).decode()


def unpack(text: str) -> Any:
    """The inverse of :func:`pack`; nothing larger than ``MOST_UNPACKED`` is unpacked."""
    unpacking = zlib.decompressobj()
    found = unpacking.decompress(base64.b64decode(text), MOST_UNPACKED)
    if not unpacking.eof:
        raise ValueError(f"its list of modules is incomplete, or larger than {MOST_UNPACKED >> 20} MiB")
    return json.loads(found)
