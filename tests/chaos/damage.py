"""Files that were damaged, and inputs that changed: each must be told before a run goes on with it."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import ON_BINS, Found, Whole, place, resuming, vit
from memtrain_common.commands.result import read_result
from memtrain_common.data.text.bins import read_bins
from memtrain_common.errors import UserError
from memtrain_common.files import read_json, write_json
from memtrain_common.measuring.memory import Ledger
from memtrain_common.runs.checkpoint import Checkpoints
from memtrain_common.runs.run_folder import RunFolder
from support import Command, newest_checkpoint

CHECKPOINT = ("model.safetensors", "training.safetensors", "state.json", "manifest.json")
# Kind of file -> runs that have it, and where. The project wrote them all, and reads them again.
ADAPTED = ("lora-xs-glue", "lora-xs-instruct")
SEVERAL = ("lte-train", "galore-vit")
FILES: dict[str, tuple[tuple[str, ...], str]] = {
    **{name: (SEVERAL, name) for name in CHECKPOINT},
    "config.json": (SEVERAL, "config.json"),
    "metrics.jsonl": (SEVERAL, "metrics.jsonl"),
    "memory.json": (SEVERAL, "memory.json"),
    "result.json": (SEVERAL, "result.json"),
    "adapter.safetensors": (ADAPTED, "adapter/adapter.safetensors"),
    "head.safetensors": (ADAPTED[:1], "adapter/head.safetensors"),
    "task.json": (ADAPTED, "adapter/task.json"),
    "MeLo's adapter": ((), "melo.safetensors"),
    "an arm's result": ((), "arm.json"),
    "train.bin": ((), "bins/train.bin"),
    "val.bin": ((), "bins/val.bin"),
    "meta.json": ((), "bins/meta.json"),
}
KINDS = tuple(FILES)


def damage(path: Path, draw: random.Random) -> str:
    """One flipped bit, a block of zeros, a cut or bytes behind the end, at a random position; -> what was done."""
    content = bytearray(path.read_bytes())
    before = bytes(content)
    at = draw.randrange(len(content.rstrip()))  # a text without its last line break is whole
    how = draw.choice(("flip", "zeros", "cut", "more"))
    if how == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif how == "zeros":
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    elif how == "cut":
        del content[at:]
    else:
        content += bytes(draw.randrange(256) for _ in range(7))
    if bytes(content) == before:  # there were zeros already
        content[at] ^= 1
    path.write_bytes(bytes(content))
    return f"{how} at {at} of {len(before)}"


def damaged(whole: Whole, kind: str, draw: random.Random, cwd: Path) -> Found:
    """A file that a command wrote, read by the function that the commands read it with: it is refused by its name, or,
    of a checkpoint's files, that one is passed over for the one before."""
    names, place_in_run = FILES[kind]
    name = draw.choice(names) if names else ""
    run = cwd / "run"
    shutil.copytree(whole.run(name)[0] if name else whole.others(), run)
    if kind in CHECKPOINT:
        newest = newest_checkpoint(run)
        what = f"{name} {kind}: {damage(newest / kind, draw)}"
        said: list[str] = []
        found = Checkpoints(run / "checkpoints").load_newest(said.append)
        right = found is not None and found[0] < int(newest.name.rpartition("-")[2]) and newest.name in said[0]
        return Found("damage", what, right, "" if right else f"loaded {found and found[0]}, said {said}")
    path = run / place_in_run
    before = path.read_bytes()
    what = f"{name or 'a file'} {kind}: {damage(path, draw)}"
    try:
        READERS[kind](path)
    except (UserError, ValueError) as error:  # ValueError: a library's, of which lora_xs's errors are
        right = path.name in str(error)
        return Found("damage", what, right, "" if right else f"it is not named: {error}")
    mended = kind == "metrics.jsonl" and path.read_bytes() == before  # rows behind the checkpoint are taken back
    return Found("damage", what, mended, "" if mended else "it was read")


def _read_metrics(path: Path) -> None:
    """As a resumed run takes them up."""
    found = Checkpoints(path.parent / "checkpoints").load_newest()
    assert found is not None
    progress = found[1]["progress"]
    RunFolder.open(path.parent).take_back_metrics(progress["metrics_bytes"], progress["metrics_sha256"])


def _read_adapter(path: Path) -> None:
    from lora_xs import files
    from lora_xs.adapter_header import ADAPTER, ADAPTER_FORMAT, HEAD_FORMAT

    files.read(path, ADAPTER_FORMAT if path.name == ADAPTER else HEAD_FORMAT)


def _read_task(path: Path) -> None:
    from lora_xs.tasks.models import read_task

    read_task(path.parent)


def _read_melo(path: Path) -> None:
    from galore_vit.melo_file import read_melo

    read_melo(vit(), path)


def _read_arm(path: Path) -> None:
    from memtrain_apps.ablate.results import read_arm

    read_arm(path)


READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda path: RunFolder.open(path.parent).read_config(),
    "metrics.jsonl": _read_metrics,
    "memory.json": Ledger.read,
    "result.json": lambda path: read_result(path.parent),
    "adapter.safetensors": _read_adapter,
    "head.safetensors": _read_adapter,
    "task.json": _read_task,
    "MeLo's adapter": _read_melo,
    "an arm's result": _read_arm,
    "train.bin": lambda path: read_bins(path.parent),
    "val.bin": lambda path: read_bins(path.parent),
    "meta.json": lambda path: read_bins(path.parent),
}


# -- changed inputs --------------------------------------------------------------------------------------------------


def swap_pictures(inputs: Path, draw: random.Random) -> str:
    """The contents of two pictures of different classes, whose sizes need not differ."""
    number = draw.randrange(16)
    cat, dog = (inputs / "pets" / "train" / name / f"{number}.png" for name in ("cat", "dog"))
    one, other = cat.read_bytes(), dog.read_bytes()
    cat.write_bytes(other)
    dog.write_bytes(one)
    return str(cat.relative_to(inputs))


def move_picture(inputs: Path, draw: random.Random) -> str:
    """A picture under another label."""
    source = inputs / "pets" / "train" / "cat" / f"{draw.randrange(16)}.png"
    shutil.move(source, inputs / "pets" / "train" / "dog" / "other.png")
    return str(source.relative_to(inputs))


def change_label(inputs: Path, draw: random.Random) -> str:
    path = inputs / "glue" / "SST-2" / "train.tsv"
    lines = path.read_text().splitlines()
    number = draw.randrange(1, len(lines))
    text, label = lines[number].split("\t")
    lines[number] = f"{text}\t{1 - int(label)}"
    path.write_text("\n".join(lines) + "\n")
    return f"line {number}"


def change_sentence(inputs: Path, draw: random.Random) -> str:
    path = inputs / "glue" / "SST-2" / "train.tsv"
    lines = path.read_text().splitlines()
    number = draw.randrange(1, len(lines))
    lines[number] = lines[number].replace("the", "good", 1)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number}"


def change_tokenizer(model: str) -> Callable[[Path, random.Random], str]:
    def change(inputs: Path, draw: random.Random) -> str:
        path = inputs / model / "tokenizer.json"
        content = json.loads(path.read_text())
        vocab = content["model"]["vocab"]
        used = {"bert": (" film", " good"), "llama": (" plus", "1")}[model]
        first, second = used if all(u in vocab for u in used) else draw.sample([v for v in vocab if v.strip()], 2)
        vocab[first], vocab[second] = vocab[second], vocab[first]
        path.write_text(json.dumps(content))
        return f"{first!r} and {second!r} of {model}"

    return change


def change_config(model: str) -> Callable[[Path, random.Random], str]:
    def change(inputs: Path, draw: random.Random) -> str:
        path = inputs / model / "config.json"
        content = json.loads(path.read_text())
        content["hidden_act"] = draw.choice(("relu", "tanh", "gelu_new"))
        path.write_text(json.dumps(content))
        return f"hidden_act {content['hidden_act']} of {model}"

    return change


def change_text(inputs: Path, draw: random.Random) -> str:
    path = inputs / "text" / "a.txt"
    text = list(path.read_text())
    at = draw.choice([i for i, c in enumerate(text) if c.isdigit()])
    text[at] = str((int(text[at]) + 1) % 10)
    path.write_text("".join(text))
    return f"character {at}"


def change_sum(inputs: Path, draw: random.Random) -> str:
    path = inputs / "sums.jsonl"
    lines = path.read_text().splitlines()
    number = draw.randrange(len(lines))
    row = json.loads(lines[number])
    row["question"] = f"{draw.randrange(3, 10)}{row['question'][1:]}"  # the words are all one token
    lines[number] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number}"


def change_bins(inputs: Path, draw: random.Random) -> str:
    """One token, with what another preparation would have written beside the bins."""
    folder = inputs.parent / "bins"
    split = draw.choice(("train", "val"))
    tokens = np.fromfile(folder / f"{split}.bin", "<u2")
    at = draw.randrange(len(tokens))
    tokens[at] = (tokens[at] + 1) % (int(tokens.max()) + 1)
    tokens.tofile(folder / f"{split}.bin")
    meta = read_json(folder / "meta.json")
    meta["splits"][split]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    write_json(folder / "meta.json", meta)
    return f"token {at} of {split}.bin"


CHANGES: tuple[tuple[str, str, Callable[[Path, random.Random], str]], ...] = (
    *(("pictures", n, swap_pictures) for n in ("backrazor-train", "galore-vit", "finetune")),
    *(("labels", n, move_picture) for n in ("backrazor-train", "galore-vit", "finetune")),
    *(("labels", n, change_label) for n in ("backrazor-glue", "lora-xs-glue")),
    *(("texts", n, change_sentence) for n in ("backrazor-glue", "lora-xs-glue")),
    *(("tokenizer", n, change_tokenizer("bert")) for n in ("backrazor-glue", "lora-xs-glue")),
    ("tokenizer", "lora-xs-instruct", change_tokenizer("llama")),
    *(("config", n, change_config("bert")) for n in ("backrazor-glue", "lora-xs-glue")),
    ("config", "lora-xs-instruct", change_config("llama")),
    *(("texts", n, change_text) for n in ("lte-train", "pretrain")),
    ("texts", "lora-xs-instruct", change_sum),
    ("bins", ON_BINS, change_bins),
)


def changed(whole: Whole, number: int, draw: random.Random, cwd: Path) -> Found:
    """An input that changed since the run began: resumed, it is told in one sentence, with exit code 2."""
    kind, name, change = CHANGES[number % len(CHANGES)]
    reference, _ = whole.run(name)
    place(cwd, copied=True)
    shutil.copytree(reference, cwd / "run")
    config = cwd / "run" / "config.json"  # which names the inputs by where they are
    write_json(config, json.loads(json.dumps(read_json(config)).replace(str(reference.parent), str(cwd))))
    if kind == "bins":
        shutil.copytree(whole.others() / "bins", cwd / "bins")
    what = f"{name} {kind}: {change(cwd / 'inputs', draw)}"
    done = Command(resuming(name), cwd).wait()
    right = done.returncode == 2 and done.stderr.count("\n") == 1 and "was trained on other data" in done.stderr
    return Found("changed", what, right, "" if right else f"{done.returncode}: {done.stderr[-500:]}")
