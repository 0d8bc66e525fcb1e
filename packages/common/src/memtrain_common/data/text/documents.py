"""The documents of a data set, one after another: text files, a column of CSV, JSON Lines or parquet, or the hub's.

Nothing is read before it is asked for, and never more than a batch of rows at a time, so a data set may be larger than
memory. The order is that of the files' names and of the rows in them, every time.
"""

import csv
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError
from ...files import MOST_LINE, lines_of, parse_json, visible_files
from ..fingerprint import file_digests
from ..splits import SPLIT_WORDS

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
PLAIN = (".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".html")
_SAMPLE = 2**20
_QUOTES = "some programs quote the texts of a TSV file and some do not, so write it as CSV or JSON Lines"


@dataclass(frozen=True)
class Source:
    """One file, or one split of the hub, with its documents."""

    name: str
    """The file's name below the data folder, or the hub's."""
    size: int
    """Bytes of a file, rows of the hub: the progress that ``documents`` counts towards."""
    split: str | None = None
    """"train", "val" or "test" where the name says so."""
    path: Path | None = None
    column: str = ""
    rows: Any = field(default=None, repr=False)
    """The hub's rows, where it is no file."""

    def documents(self) -> Iterator[tuple[str | None, int]]:
        """Each document with the position behind it, in ``size``'s unit; None where a row has no text.

        Raises:
            UserError: naming the file, and the line where there is one.
        """
        if self.path is None:
            for i, row in enumerate(self.rows, start=1):
                yield _cell(row, self.column, f"{self.name}, row {i}"), i
            return
        kind = _suffix(self.path)
        reader = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl}.get(
            kind, _text
        )
        try:
            yield from reader(self.path, self.column)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text ({error.reason}): convert it, or take it out") from None
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise UserError(f"{self.path} is not a whole gzip file: mend it, or take it out") from None
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror}): mend it, or take it out") from None

    def earlier_fingerprint(self) -> dict[str, Any]:
        """What versions before :func:`fingerprints` kept: name, size, and a hash of the first and last MiB."""
        if self.path is None:
            return {"name": self.name, "rows": self.size}
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, self.size - _SAMPLE))
            digest.update(file.read())
        return {"name": self.name, "bytes": self.size, "sha256_of_ends": digest.hexdigest()}


def find_sources(data_dir: Path, column: str) -> list[Source]:
    """The files of a folder that hold documents, in the order of their names; or the one file that is named.

    Tables (CSV, TSV, JSON Lines, parquet; the first three may be gzipped) come before text: where a folder has both,
    the text files are taken for its description and left alone.

    Raises:
        UserError: if there is nothing to read.
    """
    if data_dir.is_file():
        paths, root = [data_dir], data_dir.parent
    elif data_dir.is_dir():
        paths, root = sorted(visible_files(data_dir)), data_dir
    else:
        raise UserError(f"{data_dir} does not exist: --data-dir needs a folder of text, CSV, JSON Lines or parquet")
    chosen = [p for p in paths if _suffix(p) in TABLES] or [p for p in paths if _suffix(p) in PLAIN]
    if not chosen:
        there = (
            f"only {paths[0].name}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") if paths else "nothing"
        )
        raise UserError(f"{data_dir} holds {there}: --data-dir needs files that end in {', '.join(TABLES + PLAIN)}")
    sources = []
    for path in chosen:
        name = path.relative_to(root).as_posix()
        sources.append(Source(name, path.stat().st_size, split_of(name), path, column))
    return sources


def fingerprints(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What tells each source from a changed one: its name and size, and of a file the hash of all its bytes."""
    digests = iter(file_digests([s.path for s in sources if s.path is not None]))
    return [
        {"name": s.name, "rows": s.size}
        if s.path is None
        else {"name": s.name, "bytes": s.size, "sha256": next(digests)}
        for s in sources
    ]


def split_of(name: str) -> str | None:
    """The split that a file's name speaks of: ``train-00000-of-00003.parquet`` -> "train"; None if of none."""
    stem = name.lower().rpartition(".")[0]
    found = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", stem) if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def is_table(source: Source) -> bool:
    return source.path is None or _suffix(source.path) in TABLES


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return "." + name.rpartition(".")[2]


def _open(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """(the file, whose position is the progress; its bytes, unzipped where it is zipped)."""
    raw = path.open("rb")
    return raw, (gzip.open(raw) if path.suffix.lower() == ".gz" else raw)  # type: ignore[return-value]


def _text(path: Path, column: str) -> Iterator[tuple[str | None, int]]:
    raw, data = _open(path)
    with raw:
        text = data.read().decode("utf-8-sig")  # a byte order mark is no character of the text
        yield text or None, raw.tell()


def _csv(path: Path, column: str) -> Iterator[tuple[str | None, int]]:
    csv.field_size_limit(MOST_LINE)
    raw, data = _open(path)
    with raw:
        lines = lines_of(io.TextIOWrapper(data, "utf-8-sig", newline=""), path)
        tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes]
        rows = csv.DictReader(lines, dialect="excel-tab" if tabs else "excel", strict=tabs)
        try:
            if column not in (rows.fieldnames or ()):
                raise UserError(_no_column(str(path), column, rows.fieldnames or ()))
            for row in rows:
                text, where = row[column], f"{path}, line {rows.line_num}"
                if any(row.get(None) or ()) or text is None:  # empty cells at the end of a line are a spreadsheet's
                    cells = len(row) - 1 + len(row[None]) if None in row else "fewer"
                    raise UserError(f"{where} has {cells} cells, and the heading {len(rows.fieldnames or ())}: mend it")
                if tabs and "\n" in text and "\t" in text:
                    raise UserError(f"{where} ends a text that a quotation mark began, over tabs and lines: {_QUOTES}")
                yield text or None, raw.tell()
        except csv.Error as error:
            kind = "TSV" if tabs else "CSV"
            hint = f": {_QUOTES}" if tabs else ""
            raise UserError(f"{path}, line {rows.line_num} is not {kind} ({error}){hint}") from None


def _jsonl(path: Path, column: str) -> Iterator[tuple[str | None, int]]:
    raw, data = _open(path)
    with raw:
        for number, line in enumerate(lines_of(data, path), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = parse_json(line)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise UserError(f"{where} is not JSON: {error}") from None
            yield _cell(row, column, where), raw.tell()


def _parquet(path: Path, column: str) -> Iterator[tuple[str | None, int]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{path} needs the package pyarrow: pip install pyarrow, or convert the file to JSON Lines"
        ) from None
    from pyarrow import ArrowException

    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(_no_column(str(path), column, file.schema_arrow.names))
            done, total = 0, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    done += 1
                    yield _string(value, column, f"{path}, row {done}"), size * done // total
    except ArrowException as error:
        raise UserError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}") from None


def _cell(row: Any, column: str, where: str) -> str | None:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is not an object with named fields")
    if column not in row:
        raise UserError(_no_column(where, column, row))
    return _string(row[column], column, where)


def _string(value: Any, column: str, where: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is {type(value).__name__}, not text: choose another --column")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _no_column(where: str, column: str, there: Any) -> str:
    return f"{where} has no column {column!r}, only {', '.join(map(repr, there))}: choose one with --column"
