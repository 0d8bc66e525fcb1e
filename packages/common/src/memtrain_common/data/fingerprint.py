"""What tells a run's data from other data: by all their bytes, which are hashed once.

A file's SHA-256 is kept in the user's cache (``$XDG_CACHE_HOME/memtrain/fingerprints.sqlite``, else ``~/.cache``) with
its path, size, time of change and inode, and is taken from there while these are the same. The cache is a help and
nothing else: where it cannot be read or written, every file is hashed.

A run's ``config.json`` keeps hashes under ``data`` as ``parts``. A run of a version that kept none is compared by its
``sha256`` alone, which is of names and sizes of pictures, or of texts.
"""

import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError

MOST_PARTS = 256
"""Files that are kept one by one; where there are more, folders are."""
_RECENT_NS = 2_000_000_000  # a file changed this lately may change again within the same tick of its clock
_BLOCK = 2**20
_AS = ("utf-8", "surrogateescape")  # names of files are bytes
Stamp = tuple[int, int, int]  # size, time of change in ns, inode


def changed_part(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What is not as it was, as part of a sentence; None if all is.

    Args:
        before: a run's ``data``: a "name", a "sha256" and, but for runs of versions that had none, "parts": what the
            data consist of (a file's or folder's path, a split) with a hash of its content.
        now: the same, of what is found now.
    """
    if "parts" in before and "parts" in now:
        was, parts = before["parts"], now["parts"]
        found = [f"{name} is gone" for name in was if name not in parts]
        found += [f"{name} has another content" for name in was if parts.get(name, was[name]) != was[name]]
        found += [f"{name} is new" for name in parts if name not in was]
        if found:
            return found[0] + (f" (and {len(found) - 1} more have changed)" if len(found) > 1 else "")
    if before.get("sha256") == now["sha256"]:
        return None
    names = (f"{data.get('name', 'unnamed')} (SHA-256 {str(data.get('sha256'))[:12]}…)" for data in (before, now))
    return " before, and now ".join(names)


def changed_meaning(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What a model's numbers stand for that is not as it was, as part of a sentence; None if all is.

    Whoever goes on with other data asks for other pictures or texts: no one for another order of classes or letters.

    Args:
        before: a run's ``data``: "classes" (their names in the order of the outputs; older runs have their number), the
            "tokenizer" and its "characters".
        now: the same, of what is found now.
    """
    was, classes = before.get("classes"), now.get("classes")
    if isinstance(was, list) and isinstance(classes, list) and was != classes:
        gone, new = ([c for c in one if c not in other] for one, other in ((was, classes), (classes, was)))
        found = [f"{word} {', '.join(map(str, names[:3]))}" for word, names in (("not", gone), ("but", new)) if names]
        return f"the classes are others ({' '.join(found) or 'in another order'})"
    if isinstance(was, int) and isinstance(classes, list) and was != len(classes):
        return f"the classes are {len(classes)} and were {was}"
    if "tokenizer" in before and before["tokenizer"] != now.get("tokenizer"):
        return f"the tokens are {now.get('tokenizer')} and were {before['tokenizer']}"
    if "tokenizer" in before and before.get("characters") != now.get("characters"):
        return "the tokens are other characters"
    return None


def combined(parts: Iterable[tuple[str, str]]) -> str:
    """One SHA-256 of names with their hashes, whatever their order."""
    return hashlib.sha256("".join(f"{name}\0{value}\0" for name, value in sorted(parts)).encode(*_AS)).hexdigest()


def by_file_or_folder(digests: Mapping[str, str], most: int = MOST_PARTS) -> dict[str, str]:
    """Files' hashes as parts: one a file or, where there are more than ``most``, one a folder."""
    if len(digests) <= most:
        return dict(digests)
    folders: dict[str, list[tuple[str, str]]] = {}
    for name, value in digests.items():
        folders.setdefault(name.rpartition("/")[0] or ".", []).append((name, value))
    return {folder: combined(files) for folder, files in folders.items()}


def file_digests(paths: Sequence[Path], label: str = "hashing", cache: Path | None = None) -> list[str]:
    """The SHA-256 of each file's content, in hexadecimal.

    Args:
        paths: files; all cores read them.
        label: of the progress bar, which is there after two seconds.
        cache: where hashes are kept; None takes the user's cache.

    Raises:
        UserError: naming a file that cannot be read.
    """
    stamps = [_stamp(path) for path in paths]
    with _open(cache) as known:
        found = known.get(paths, stamps)
        left = [i for i, digest in enumerate(found) if digest is None]
        total = sum(stamps[i][0] for i in left)
        done: list[tuple[Path, Stamp, str]] = []
        stop, pool = threading.Event(), ThreadPoolExecutor(os.cpu_count())
        try:
            with tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, delay=2, disable=None) as bar:
                for i, digest in zip(left, pool.map(lambda i: _hash(paths[i], bar, stop), left), strict=True):
                    found[i] = digest
                    done.append((paths[i], stamps[i], digest))
        finally:  # what was hashed before a stop is known at the next start
            stop.set()
            pool.shutdown(cancel_futures=True)
            known.put(done)
    return [str(digest) for digest in found]


def cache_path() -> Path:
    """Where hashes are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memtrain" / "fingerprints.sqlite"


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _hash(path: Path, bar: "tqdm[Any]", stop: threading.Event) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while not stop.is_set() and (block := file.read(_BLOCK)):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


class _Cache:
    """Hashes by path and stamp. Whatever is wrong with the file, the answer is that nothing is known."""

    def __init__(self, base: sqlite3.Connection | None) -> None:
        self.base = base

    def get(self, paths: Sequence[Path], stamps: Sequence[Stamp]) -> list[str | None]:
        found: list[str | None] = [None] * len(paths)
        if self.base is None:
            return found
        with suppress(sqlite3.Error):
            for i, (path, stamp) in enumerate(zip(paths, stamps, strict=True)):
                asked = "SELECT sha256 FROM files WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?"
                row = self.base.execute(asked, (_key(path), *_signed(stamp))).fetchone()
                if row is not None and isinstance(row[0], str) and len(row[0]) == 64:
                    found[i] = row[0]
        return found

    def put(self, rows: Sequence[tuple[Path, Stamp, str]]) -> None:
        """Keep those of files that did not change while they were read, and not just before."""
        if self.base is None:
            return
        sure, kept = time.time_ns() - _RECENT_NS, []
        for path, stamp, digest in rows:
            with suppress(UserError):
                if stamp[1] < sure and _stamp(path) == stamp:
                    kept.append((_key(path), *_signed(stamp), digest))
        with suppress(sqlite3.Error):
            self.base.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", kept)
            self.base.commit()


def _key(path: Path) -> bytes:
    return os.fsencode(path.resolve())


def _signed(stamp: Stamp) -> Stamp:
    """Inodes of some file systems need the 64th bit, which SQLite's integers have for the sign."""
    size, changed, inode = stamp
    return size, changed, inode - 2**64 if inode >= 2**63 else inode


@contextmanager
def _open(cache: Path | None) -> Iterator[_Cache]:
    """The cache; a damaged one is begun anew, and one that cannot be had knows nothing and keeps nothing."""
    base = None
    for _ in range(2):
        try:
            path = cache or cache_path()
            path.parent.mkdir(parents=True, exist_ok=True)
            base = sqlite3.connect(path, timeout=5)
            base.execute(
                "CREATE TABLE IF NOT EXISTS files "
                "(path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT)"
            )
            base.execute("SELECT path, size, mtime_ns, inode, sha256 FROM files LIMIT 1").fetchone()
            break
        except RuntimeError:  # the user has no home
            break
        except (sqlite3.Error, OSError) as error:
            if base is not None:
                base.close()
                base = None
            if isinstance(error, sqlite3.OperationalError) and "no such column" not in str(error):
                break  # read-only, locked, or on a full disk
            with suppress(OSError):
                path.unlink()
    try:
        yield _Cache(base)
    finally:
        if base is not None:
            base.close()
