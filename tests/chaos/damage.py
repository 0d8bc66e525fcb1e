"""Files that were damaged, and inputs that changed: each must be told before a run goes on with it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from harness import Found, Whole, place, resuming
from memtrain_common.runs.checkpoint import Checkpoints
from support import Command, newest_checkpoint, without_pictures

CHECKPOINT = ("model.safetensors", "training.safetensors", "state.json", "manifest.json")
KINDS = (*CHECKPOINT, "adapter.safetensors")


def damage(path: Path, draw: random.Random) -> str:
    """One flipped bit, a block of zeros, a cut or bytes behind the end, at a random position; -> what was done."""
    content = bytearray(path.read_bytes())
    before = bytes(content)
    at = draw.randrange(len(content))
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
    """A file of a finished run: its checkpoint is passed over for the one before, its adapter is refused."""
    from lora_xs import LoRAXSError, files
    from lora_xs.adapter_header import ADAPTER_FORMAT

    names = ("lora-xs-glue", "lora-xs-instruct") if kind == "adapter.safetensors" else ("lte-train", "galore-vit")
    name = draw.choice(names)
    run = Path(shutil.copytree(whole.run(name)[0], cwd / "run"))
    if kind == "adapter.safetensors":
        how = damage(run / "adapter" / kind, draw)
        try:
            files.read(run / "adapter" / kind, ADAPTER_FORMAT)
        except LoRAXSError:
            return Found("damage", f"{name} {kind}: {how}", True)
        return Found("damage", f"{name} {kind}: {how}", False, "it was read")
    newest = newest_checkpoint(run)
    how = damage(newest / kind, draw)
    said: list[str] = []
    found = Checkpoints(run / "checkpoints").load_newest(said.append)
    right = found is not None and found[0] < int(newest.name.rpartition("-")[2]) and newest.name in said[0]
    return Found("damage", f"{name} {kind}: {how}", right, "" if right else f"loaded {found and found[0]}, said {said}")


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
    lines[number] = lines[number].replace("plus", "times", 1)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number}"


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
)


def changed(whole: Whole, number: int, draw: random.Random, cwd: Path) -> Found:
    """An input that changed since the run began: resumed, it is told in one sentence, with exit code 2."""
    kind, name, change = CHANGES[number % len(CHANGES)]
    reference, _ = whole.run(name)
    place(cwd, copied=True)
    shutil.copytree(reference, cwd / "run")
    what = f"{name} {kind}: {change(cwd / 'inputs', draw)}"
    done = Command(resuming(name), cwd, before=without_pictures).wait()
    right = done.returncode == 2 and done.stderr.count("\n") == 1 and "was trained on other data" in done.stderr
    return Found("changed", what, right, "" if right else f"{done.returncode}: {done.stderr[-500:]}")
