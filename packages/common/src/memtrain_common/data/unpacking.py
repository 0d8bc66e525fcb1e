"""What is packed, looked at before it is unpacked: a file of kilobytes may claim more than the machine has."""

import os
import zipfile
import zlib
from pathlib import Path

from ..errors import UserError

MOST_PICTURE = 256 << 20
"""Bytes of one file in a zip of pictures."""

NPZ_ERRORS = (ValueError, TypeError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What numpy raises at an npz that is none, or that holds something else than numbers."""


def check_unpacked(path: Path) -> None:
    """Refuse an npz whose arrays would not fit into this machine's memory.

    Raises:
        UserError: naming how much they take.
        OSError, zipfile.BadZipFile: if it is no zip.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"{path} unpacks to {size / 2**30:.0f} GiB, and this machine has {memory / 2**30:.0f} GiB of memory: it is "
            "read as a whole"
        )


def npz_reason(error: Exception) -> str:
    """Why an npz was not read, without numpy's advice to unpickle it anyway."""
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    return "it holds Python objects, which are never unpickled" if "pickle" in text.lower() else text
