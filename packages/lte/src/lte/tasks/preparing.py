"""The work of ``lte-prepare``: documents in, bins out; in parallel, and going on where a kill left it.

Documents are gathered into pieces of about a million characters. Threads tokenize pieces (tiktoken lets go of Python's
lock), and their tokens are appended in order to the bins in ``OUT/.preparing``, where a journal says how many pieces
are in the files and how long these are then. Whoever goes on cuts the files to those lengths and skips those pieces, so
the bins come out as if nothing had happened. When all is there, files are moved into place, ``meta.json`` last.
"""

import contextlib
import datetime
import hashlib
import os
import re
import shlex
import shutil
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from memtrain_common.console import Console, format_bytes, format_count, format_table
from memtrain_common.data.hub import hub_rows
from memtrain_common.data.text.bins import META, META_PICKLE, SPLITS, UNFINISHED
from memtrain_common.data.text.documents import Source, find_sources, fingerprints, is_table
from memtrain_common.data.text.nanogpt_meta import write_meta_pickle
from memtrain_common.data.text.pieces import Cutting, Piece
from memtrain_common.data.text.tokenizers import (
    GPT2_FILES,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    Tokens,
    gpt2_files,
)
from memtrain_common.errors import Stopped, UserError
from memtrain_common.files import read_json, write_json
from memtrain_common.runs.lock import LOCK, lock_folder
from memtrain_common.training.stop_signals import StopSignals

from .prepare_flags import PROG, DataSet, PrepareConfig

JOURNAL = "journal.json"
_FLUSH_SECONDS = 2.0  # between two entries of the journal: at most this much work is done again
Counts = dict[str, dict[str, int]]


def run(config: PrepareConfig, known: DataSet | None, words: list[str]) -> None:
    """Prepare, or go on, or say that it is done."""
    console, out = Console(), Path(config.out)
    work = out / UNFINISHED
    finished = (out / META).exists()
    if not finished and not work.exists() and any((out / f"{s}.bin").exists() for s in SPLITS):
        raise UserError(f"{out} holds bins that {PROG} did not make: choose another --out")
    made = [p for p in (work, *work.parents) if not p.exists()]  # innermost first
    if not finished:
        work.mkdir(parents=True, exist_ok=True)
        lock_folder(work)
    try:
        plan, coder, cutting = _plan(config, known, work, console)
        if finished:
            before = _read(out / META, "plan")["plan"]
            _compare(before, plan, cutting.sources, f"{out} was prepared", "choose another --out")
            shutil.rmtree(work, ignore_errors=True)
            console.say(f"{out} is prepared already: {PROG} has nothing to do")
            return
        if not (work / META).exists():
            counts = _tokenize(config, plan, coder, cutting, work, console)
            _describe(config, plan, coder, counts, work, words)
    except UserError:
        if made and not (work / JOURNAL).exists():
            shutil.rmtree(made[-1], ignore_errors=True)
        raise
    _publish(work, out)
    _report(_read(out / META, "splits"), out, console)


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """A file that this command wrote.

    Raises:
        UserError: if it is damaged.
    """
    try:
        content = read_json(path)
        if all(key in content for key in keys):
            return dict(content)
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{path} is damaged: remove {path.parent} to prepare anew, or choose another --out")


def _plan(
    config: PrepareConfig, known: DataSet | None, work: Path, console: Console
) -> tuple[dict[str, Any], Tokenizer, Cutting]:
    """What the bins depend on, the tokenizer, and how the documents are cut."""
    sources = _sources(config, known, work, console)
    texts = Counter(s.split for s in sources)
    single = not is_table(sources[0]) and max(texts.values()) == 1
    separator = config.separator or ("nothing" if single else "eot" if config.tokenizer == "gpt2" else "newline")
    cutting = Cutting(tuple(sources), config.val_fraction, separator, single)
    coder: Tokenizer
    if config.tokenizer == "gpt2":
        coder = GPT2Tokenizer(Path(config.tokenizer_dir) if config.tokenizer_dir else None)
    elif config.tokenizer == "bytes":
        coder = ByteTokenizer()
    else:
        coder = CharTokenizer(_characters(cutting, console))
    if coder.vocab_size > 2**16:
        raise UserError(f"a vocabulary of {coder.vocab_size} does not fit into uint16: use --tokenizer gpt2")
    plan = {
        "tokenizer": coder.name,
        "vocab_size": coder.vocab_size,
        "characters": coder.characters if isinstance(coder, CharTokenizer) else None,
        "separator": separator,
        "val_fraction": config.val_fraction if cutting.divides else None,
        "column": config.column if is_table(sources[0]) else None,
        "sources": [{**found, "split": s.split} for s, found in zip(sources, fingerprints(sources), strict=True)],
    }
    return plan, coder, cutting


def _sources(config: PrepareConfig, known: DataSet | None, work: Path, console: Console) -> list[Source]:
    """The files or the hub's rows; which of them are for training and which for validation."""
    if config.data_dir:
        found = find_sources(Path(config.data_dir), config.column)
        sources = found if Path(config.data_dir).is_file() else _splits_kept(found)
    elif known is not None and known.hub is not None:
        name, subset, revision = known.hub
        sources = []
        for theirs, ours in known.hub_splits.items():
            rows = hub_rows(name, subset, theirs, revision=revision)
            if hasattr(rows, "select_columns"):
                rows = rows.select_columns([config.column])
            sources.append(Source(f"{name} {theirs}", len(rows), ours, None, config.column, rows))
    else:
        assert known is not None
        return [_download(known, work / "input.txt", console)]
    if "train" not in {s.split for s in sources}:
        return [replace(s, split=None) for s in sources]
    return sources


def _splits_kept(sources: list[Source]) -> list[Source]:
    """The files of a folder with the splits that their names speak of, or with none where that is by chance.

    Code names none (test_model.py), and a text is not for training only because its name has the word.

    Raises:
        UserError: if what some names say cannot be kept: nothing would be trained on, or another file names no split.
    """
    tables = is_table(sources[0])
    sources = [replace(s, split=None) if s.name.endswith(_CODE) else s for s in sources]
    if not tables and any(s.split is None for s in sources):
        sources = [s if _is_split(s.name) else replace(s, split=None) for s in sources]
    named = {s.split for s in sources} - {None}
    astray = next((s.name for s in sources if s.split is None), None)
    if "train" not in named:
        held = next((s for s in sources if s.split and (astray is None or _is_split(s.name))), None)
        if held is not None and (astray is not None or len(named) > 1):  # files of one split alone mix nothing
            raise UserError(
                f"{held.name} is of the split {held.split} by its name, and no file is of train: name what is to be "
                "trained on after train, or give this one another name"
            )
    elif astray is not None and (tables or len(named) > 1):
        raise UserError(
            f"{astray} names no split, and other files do: name it after train, val or test, or take it out"
        )
    kept = "train" in named and (tables or len(named) > 1)
    return sources if kept else [replace(s, split=None) for s in sources]


_CODE = (".py", ".c", ".h")


def _is_split(name: str) -> bool:
    """Whether a file, or a folder that it lies in, is called after a split and nothing else: test-00000-of-00002. A
    page of a manual may be called training or validation."""
    parts = [re.findall("[a-z]+", part.partition(".")[0]) for part in name.lower().split("/")]
    return any(words and set(words) <= {"train", "val", "valid", "dev", "test", "of"} for words in parts)


def _download(known: DataSet, path: Path, console: Console) -> Source:
    """Tiny Shakespeare from where nanoGPT takes it, its hash checked."""
    if not path.exists():
        from urllib.request import urlopen

        console.say(f"downloading {known.url}")
        try:
            with urlopen(known.url, timeout=60) as answer:
                raw = answer.read()
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
            raise UserError(f"{known.url} could not be downloaded ({reason}): give the text by --data-dir") from None
        if hashlib.sha256(raw).hexdigest() != known.sha256:
            raise UserError(f"{known.url} is not the text that was expected: give the text by --data-dir")
        partial = path.with_suffix(".part")
        partial.write_bytes(raw)
        os.replace(partial, path)
    return Source(path.name, path.stat().st_size, None, path)


def _characters(cutting: Cutting, console: Console) -> str:
    """All characters of all documents: a pass of its own, since tokens are numbers in their order."""
    found = set("\n") if cutting.separator == "newline" else set()
    with contextlib.closing(console.progress(cutting.size, label="characters", scale=True, lines=True)) as bar:
        for piece in cutting.pieces():
            found.update(*(part.text for part in piece.parts))
            bar.update(piece.position - bar.n)
    return "".join(sorted(found))


def _compare(before: dict[str, Any], now: dict[str, Any], sources: Sequence[Source], what: str, way_out: str) -> None:
    """Refuse to mix two preparations, naming the first difference.

    Sources of which hashes of their ends were kept, as versions before 2026-12 did, are compared by those.
    """
    was = before.get("sources", [])
    if any("sha256_of_ends" in source for source in was):
        ends = [{**source.earlier_fingerprint(), "split": source.split} for source in sources]
        now = {**now, "sources": ends}
    for name, value in now.items():
        if name == "sources" and was != value:
            other = next(a or b for a, b in zip_longest(was, value) if a != b)["name"]
            raise UserError(f"{what} from other files, {other} the first: {way_out}")
        if before.get(name) != value:
            raise UserError(f"{what} with {name.replace('_', '-')} {before.get(name)!r}, not {value!r}: {way_out}")


def _tokenize(
    config: PrepareConfig, plan: dict[str, Any], coder: Tokenizer, cutting: Cutting, work: Path, console: Console
) -> Counts:
    """Every piece into ``work``'s bins: -> tokens, documents and bytes of text by split."""
    journal: dict[str, Any] = {"pieces": 0, "counts": {}}
    path = work / JOURNAL
    if path.exists():
        journal = _read(path, "plan", "pieces", "counts")
        way_out = f"give what it was begun with, or remove {work} to begin anew"
        _compare(journal["plan"], plan, cutting.sources, f"{work.parent} holds a preparation that was begun", way_out)
        console.say(f"going on with {work.parent} after {journal['pieces']} pieces")
    done: int = journal["pieces"]
    counts: Counts = journal["counts"]
    files = {}
    for split in SPLITS:
        files[split] = (work / f"{split}.bin").open("ab")
        files[split].truncate(2 * counts.setdefault(split, {"tokens": 0, "documents": 0, "text_bytes": 0})["tokens"])
    ends = plan["separator"] == "eot"
    bar = console.progress(cutting.size, label="tokenizing", scale=True, lines=True)
    workers = config.workers or os.cpu_count() or 1
    flushed = time.monotonic()

    def flush() -> None:
        nonlocal flushed
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(path, {"plan": plan, "pieces": done, "counts": counts})
        flushed = time.monotonic()

    def write(piece: Piece, tokens: dict[str, Tokens]) -> None:
        nonlocal done
        for split, array in tokens.items():
            files[split].write(array.data)
            counts[split]["tokens"] += len(array)
        for part in piece.parts:
            counts[part.split]["documents"] += part.ends_document
            counts[part.split]["text_bytes"] += len(part.text.encode())
        done += 1
        bar.update(piece.position - bar.n)
        bar.set_postfix_str(f", {format_count(sum(c['tokens'] for c in counts.values()))} tokens", refresh=False)
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            flush()

    pending: deque[tuple[Piece, Future[dict[str, Tokens]]]] = deque()
    with StopSignals() as stop, ThreadPoolExecutor(workers) as pool, contextlib.ExitStack() as closing:
        for file in files.values():
            closing.callback(file.close)
        closing.callback(bar.close)
        for number, piece in enumerate(cutting.pieces()):
            if number < done:
                bar.update(piece.position - bar.n)
                continue
            if stop.received:
                break
            pending.append((piece, pool.submit(_encode, piece, coder, ends)))
            if len(pending) > 2 * workers:
                first, tokens = pending.popleft()
                write(first, tokens.result())
        while pending:
            first, tokens = pending.popleft()
            write(first, tokens.result())
        flush()
        if stop.received:
            name = Stopped(stop.received, "").name
            raise Stopped(stop.received, f"stopped by {name} after {done} pieces; the same command goes on")
    for split, what in (("train", "training"), ("val", "validation")):
        if not counts[split]["tokens"]:
            shutil.rmtree(work)
            raise UserError(
                f"{cutting.documents} documents leave none for {what} at --val-fraction {config.val_fraction}: use "
                "more documents or another fraction"
            )
    if cutting.skipped:
        console.say(f"{cutting.skipped:,} rows without text were passed over")
    return counts


def _encode(piece: Piece, coder: Tokenizer, ends: bool) -> dict[str, Tokens]:
    """A piece's tokens by split, in order; with ``ends``, <|endoftext|> behind each document."""
    tokens: dict[str, Tokens] = {}
    for split in SPLITS:
        parts = [part for part in piece.parts if part.split == split]
        if not parts:
            continue
        if isinstance(coder, GPT2Tokenizer):
            all_tokens = coder.encode_documents([part.text for part in parts])
            kept = all_tokens != coder.end_of_text
            kept[~kept] = [ends and part.ends_document for part in parts]
            tokens[split] = all_tokens[kept].astype("<u2")
        else:
            tokens[split] = coder.encode("".join(part.text for part in parts).encode()).astype("<u2")
    return tokens


def _describe(
    config: PrepareConfig, plan: dict[str, Any], coder: Tokenizer, counts: Counts, work: Path, words: list[str]
) -> None:
    """The files beside the bins; ``meta.json`` last, which says that all are whole."""
    splits: dict[str, dict[str, Any]] = {}
    for split, numbers in counts.items():
        path = work / f"{split}.bin"
        if not numbers["tokens"]:  # no test split
            path.unlink()
            continue
        with path.open("rb") as file:
            splits[split] = {**numbers, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if config.tokenizer == "gpt2" and config.tokenizer_dir:
        for path, name in zip(gpt2_files(Path(config.tokenizer_dir)) or (), GPT2_FILES, strict=True):
            shutil.copyfile(path, work / name)
    if isinstance(coder, CharTokenizer):
        write_meta_pickle(work / META_PICKLE, coder.characters)
    made = {"command": shlex.join(words), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    top = {k: plan[k] for k in ("tokenizer", "vocab_size", "characters", "separator")}
    write_json(work / META, {"dataset": config.dataset or None, **top, "splits": splits, **made, "plan": plan})


def _publish(work: Path, out: Path) -> None:
    """Move the finished files into place, ``meta.json`` last; a kill in between is mended by doing it again."""
    for path in sorted(p for p in work.iterdir() if p.name not in (JOURNAL, LOCK, META) and p.suffix != ".partial"):
        os.replace(path, out / path.name)
    os.replace(work / META, out / META)
    shutil.rmtree(work)


def _report(meta: dict[str, Any], out: Path, console: Console) -> None:
    after = {"eot": "<|endoftext|>", "newline": "a newline", "nothing": "nothing"}[meta["separator"]]
    rows: list[tuple[str, ...]] = [("", "documents", "tokens", "text", "bytes/token")]
    for split, numbers in meta["splits"].items():
        ratio = f"{numbers['text_bytes'] / numbers['tokens']:.3f}"
        size = format_bytes(numbers["text_bytes"])
        rows.append((split, f"{numbers['documents']:,}", f"{numbers['tokens']:,}", size, ratio))
    console.say(format_table(rows))
    console.say(f"{meta['tokenizer']} tokens, vocabulary {meta['vocab_size']}; {after} after each document")
    console.say(f"{out}: train on it with lte-train --data-dir {out}")
