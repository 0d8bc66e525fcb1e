"""Files that somebody else made, for every command that reads some: refused in one sentence, cheaply, and never run.

Each is harmless: it is refused by a limit or a check of ours, before anything of it is unpacked, built or run.
"""

import gzip
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Found, Whole, place, resuming, words_of
from memtrain_common.files import unsealed
from support import Command

DEEP = "[" * 20_000 + "]" * 20_000
MARK = "it-ran"
"""A file that code of a stranger would make."""
CODE = f"import pathlib\npathlib.Path({MARK!r}).write_text('ran')\n"


class Measured(Command):
    """A command with the peak of its memory, in MiB."""

    peak_mib = 0.0

    def _await(self, options: int) -> bool:
        _, status, used = os.wait4(self.pid, options)
        self.peak_mib = used.ru_maxrss / 1024
        self.returncode = os.waitstatus_to_exitcode(status)
        return False


def as_rows(text: str) -> Callable[[Path, Whole], list[str]]:
    def make(cwd: Path, whole: Whole) -> list[str]:
        (cwd / "inputs" / "sums.jsonl").write_text(text + "\n", errors="surrogateescape")
        return words_of("lora-xs-instruct")

    return make


def as_config(model: str, name: str, text: str) -> Callable[[Path, Whole], list[str]]:
    """The config.json of a model that a command loads."""

    def make(cwd: Path, whole: Whole) -> list[str]:
        (cwd / "inputs" / model / "config.json").write_text(text)
        return words_of(name)

    return make


def as_run(name: str, file: str, change: Callable[[str], str]) -> Callable[[Path, Whole], list[str]]:
    """A file of a finished run that is gone on with."""

    def make(cwd: Path, whole: Whole) -> list[str]:
        shutil.copytree(whole.run(name)[0], cwd / "run")
        path = cwd / "run" / file
        path.write_text(change(path.read_text()))
        return resuming(name)

    return make


def setting(key: str, value: Any) -> Callable[[str], str]:
    def change(text: str) -> str:
        content = unsealed(json.loads(text))
        content["config"][key] = value
        return json.dumps(content)

    return change


def without(*keys: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        return json.dumps({k: v for k, v in unsealed(json.loads(text)).items() if k not in keys})

    return change


def own_code(cwd: Path, whole: Whole) -> list[str]:
    folder = cwd / "inputs" / "bert"
    (folder / "own.py").write_text(CODE)
    names = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M", "AutoTokenizer": ["own.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "its-own", "auto_map": names}))
    return words_of("lora-xs-glue")


def pickled(cwd: Path, whole: Whole) -> list[str]:
    """An object in a file of weights: harmless, and refused as any object would be."""
    import torch

    torch.save({"model": Path("/")}, cwd / "w.pth")
    words = words_of("backrazor-train")
    words[words.index("--weights") + 1] = "w.pth"
    return words


def objects(cwd: Path, whole: Whole) -> list[str]:
    np.savez(cwd / "w.npz", a=np.array([{"a": 1}], dtype=object))
    words = words_of("backrazor-train")
    words[words.index("--weights") + 1] = "w.npz"
    return words


def zipped(cwd: Path, whole: Whole) -> list[str]:
    """Zeros that pack well: 300 MiB in 300 KB, refused by what the zip's table says."""
    with zipfile.ZipFile(cwd / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "val", "test"):
            for name in ("cat", "dog"):
                source = cwd / "inputs" / "pets" / split / name / "0.png"
                archive.write(source, f"{split}/{name}/0.png")
        with archive.open("train/cat/1.png", "w") as entry:
            for _ in range(300):
                entry.write(bytes(1 << 20))
    words = words_of("backrazor-train")
    words[words.index("--data-dir") + 1] = "p.zip"
    return words


def long_line(name: str) -> Callable[[Path, Whole], list[str]]:
    """One line of 70 MiB, packed."""

    def make(cwd: Path, whole: Whole) -> list[str]:
        (cwd / "long").mkdir()
        with gzip.open(cwd / "long" / name, "wb", compresslevel=1) as file:
            file.write(b'{"text": "' if "jsonl" in name else b"text\n")
            for _ in range(70):
                file.write(b"a" * (1 << 20))
        return ["lte-prepare", "long", "--tokenizer", "bytes", "--out", "bins"]

    return make


def tsv_line(cwd: Path, whole: Whole) -> list[str]:
    with (cwd / "inputs" / "glue" / "SST-2" / "train.tsv").open("a") as file:
        file.write("a" * (66 << 20) + "\t1\n")
    return words_of("lora-xs-glue")


def link_out(cwd: Path, whole: Whole) -> list[str]:
    (cwd / "inputs" / "text" / "b.txt").symlink_to("/etc/hostname")
    return words_of("lte-train")


def adapter_claim(cwd: Path, whole: Whole) -> list[str]:
    shutil.copytree(whole.run("lora-xs-glue")[0], cwd / "run")
    path = cwd / "run" / "adapter" / "adapter.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    return ["lora-xs", "info", "--adapter", "run/adapter"]


def grid(text: str) -> Callable[[Path, Whole], list[str]]:
    def make(cwd: Path, whole: Whole) -> list[str]:
        (cwd / "grid.toml").write_text(text)
        return ["ablate", "./grid.toml", "--out", "abl"]

    return make


def result(text: str) -> Callable[[Path, Whole], list[str]]:
    def make(cwd: Path, whole: Whole) -> list[str]:
        (cwd / "abl" / "results").mkdir(parents=True)
        (cwd / "abl" / "results" / "a.json").write_text(text)
        return ["ablate", "--report", "abl"]

    return make


def planned(text: str) -> Callable[[Path, Whole], list[str]]:
    def make(cwd: Path, whole: Whole) -> list[str]:
        (cwd / "m").mkdir()
        (cwd / "m" / "config.json").write_text(text)
        return ["plan", "--model", "m", "--budget", "1GiB"]

    return make


def ledger(text: str | None) -> Callable[[Path, Whole], list[str]]:
    def make(cwd: Path, whole: Whole) -> list[str]:
        shutil.copytree(whole.run("lte-train")[0], cwd / "run")
        path = cwd / "run" / "memory.json"
        path.unlink() if text is None else path.write_text(text)
        return ["lte-train", "--figures", "run", "run", "--out", "figures"]

    return make


BERT = {"model_type": "bert", "num_hidden_layers": 10**9}
TABLE: dict[str, Callable[[Path, Whole], list[str]]] = {
    "rows nested deeply": as_rows(DEEP),
    "a row nested deeply": as_rows('{"a": ' * 20_000 + "1" + "}" * 20_000),
    "half of a surrogate pair": as_rows('{"question": "\\ud800 plus", "answer": "1"}'),
    "rows that are numbers": as_rows("[1, 2, 3]"),
    "rows cut short": as_rows('{"question": "a", "ans'),
    "bytes that are no text": as_rows("\udcff\udcfe"),
    "a model's configuration nested deeply": as_config("bert", "backrazor-glue", DEEP),
    "a list for a model's configuration": as_config("bert", "lora-xs-glue", "[]"),
    "a model of a thousand million layers": as_config("bert", "lora-xs-glue", json.dumps(BERT)),
    "layers as text": as_config("llama", "lora-xs-instruct", '{"model_type": "llama", "num_hidden_layers": "x"}'),
    "a ViT's configuration cut short": as_config("vit", "backrazor-train", '{"model_type": "vi'),
    "a ViT's configuration nested deeply": as_config("vit", "galore-vit", DEEP),
    "a model with code of its own": own_code,
    "an object in a file of weights": pickled,
    "an object array in an npz": objects,
    "a picture that unpacks to 300 MiB": zipped,
    "a line of JSON Lines of 70 MiB": long_line("a.jsonl.gz"),
    "a line of CSV of 70 MiB": long_line("a.csv.gz"),
    "a line of TSV of 66 MiB": tsv_line,
    "a link out of the text folder": link_out,
    "an adapter's header of a TiB": adapter_claim,
    "a grid nested deeply": grid("seeds = " + DEEP),
    "a grid that is no TOML": grid("seeds = ["),
    "a result nested deeply": result(DEEP),
    "a result cut short": result('{"name": "a", "status": "do'),
    "a result without keys": result("{}"),
    "a result with text for numbers": result('{"name": 1}'),
    "plan's model nested deeply": planned(DEEP),
    "plan's model of a thousand million layers": planned(json.dumps(BERT)),
    "a ledger that is missing": ledger(None),
    "a ledger nested deeply": ledger(DEEP),
    "a ledger of texts": ledger('{"totals": {"weights": "1"}}'),
    "a run's configuration nested deeply": as_run("lte-train", "config.json", lambda _: DEEP),
    "a run's configuration cut short": as_run("finetune", "config.json", lambda text: text[:-30]),
    "a run's configuration without its own": as_run("galore-vit", "config.json", without("config")),
    "text for a number of steps": as_run("lte-train", "config.json", setting("max_iters", "8")),
    "text for a batch": as_run("backrazor-train", "config.json", setting("batch_size", "x")),
    "a number for a name": as_run("pretrain", "config.json", setting("tokenizer", 3)),
    "a setting that is unknown": as_run("lora-xs-glue", "config.json", setting("no_such", 1)),
    "metrics nested deeply": as_run("lte-train", "metrics.jsonl", lambda text: DEEP + "\n" + text),
}


def tried(whole: Whole, number: int, draw: random.Random, cwd: Path, idle_mib: float) -> Found:
    """The number-th of the table, round and round."""
    name = list(TABLE)[number % len(TABLE)]
    words = TABLE[name](place(cwd, copied=True), whole)
    command = Measured(words, cwd)
    done = command.wait()
    above = command.peak_mib - idle_mib
    ran = any(cwd.rglob(MARK))
    one = done.stderr.count("\n") == 1 and "Traceback" not in done.stdout
    right = done.returncode == 2 and one and not ran and above <= 300
    why = f"{done.returncode}, {above:.0f} MiB, {'code ran, ' if ran else ''}{done.stderr[-400:]}"
    return Found("hostile", name, right, "" if right else why, above_mib=round(above, 1))


def idle(cwd: Path) -> float:
    """Peak memory of a command that refuses an unknown flag, in MiB."""
    command = Measured(["lte-train", "--no-such-flag"], cwd)
    assert command.wait().returncode == 2
    return command.peak_mib
