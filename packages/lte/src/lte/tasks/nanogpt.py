"""nanoGPT's way of giving configurations: ``--key=value`` by its names, and files of assignments. No torch here.

Files are read by :mod:`lte.tasks.nanogpt_files`. What a file leaves open has the defaults of the project that it is
of, which its keys tell: nanoGPT, nanoGPT-LTE or nanoGPT-LoRA.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from memtrain_common.errors import UserError

from .nanogpt_files import read_assignments

# The same under another name: nanoGPT's, nanoGPT-LTE's and nanoGPT-LoRA's.
_RENAMED = {"out_dir": "out", "eval_batches": "eval_iters", "lora_rank": "lora_r"}
# Keys that have one meaning here, whatever the value: said in a line, not passed over in silence.
_NOTES = {
    "backend": "the backend is chosen by the device: nccl on CUDA, gloo on CPU",
    "save_checkpoint": "checkpoints are always written; always_save_checkpoint=False keeps the best one and the last",
    "compute_grad_memory": "gradient memory is always measured: see memory.json",
}
# Keys of which only one value can be had.
_ONLY = {
    "skip_logit": ("True", "the output layer is tied to the embedding and cannot have heads"),
    "lora_dropout": ("0.0", "heads have no dropout of their own"),
}

# Keys that only nanoGPT-LTE has, and only nanoGPT-LoRA.
_LTE_KEYS = {
    "eval_batches", "save_checkpoint", "wrap_lte", "freeze_n", "lora_r", "lte_heads", "lte_mode", "lte_merge_steps",
    "skip_attn", "skip_mlp", "skip_logit",
}  # fmt: skip
_LORA_KEYS = {"lora_rank", "lora_dropout", "compute_grad_memory"}
_MODES = {"mhlora": "sequential", "ddp": "parallel", "dmp": "parallel"}  # nanoGPT-LTE's words


@dataclasses.dataclass
class Flag:
    """One flag as it was given: its name with underscores, and the words after it."""

    key: str
    values: list[str]

    def words(self, booleans: set[str]) -> list[str]:
        name = self.key.replace("_", "-")
        if self.key in booleans and self.values in (["True"], ["False"]):
            return [f"--{name}" if self.values == ["True"] else f"--no-{name}"]
        if self.key in booleans and self.values:
            raise UserError(f"--{name} takes True or False, got {' '.join(self.values)}")
        if len(self.values) == 1:
            return [f"--{name}={self.values[0]}"]
        return [f"--{name}", *self.values]


def translate(argv: Sequence[str], config_type: type) -> tuple[list[str], list[str]]:
    """Words in nanoGPT's form to our commands': -> (words, notes for the user).

    Args:
        config_type: the command's dataclass; its bool fields take ``=True`` and ``=False``.

    Raises:
        UserError: for a file that cannot be read as assignments, and a value that cannot be had.
    """
    leading: list[str] = []
    rest = list(argv)
    while rest and not rest[0].startswith("-"):
        leading.append(rest.pop(0))
    files = [word for word in leading if word.endswith(".py")]
    presets = [word for word in leading if not word.endswith(".py")]
    notes: list[str] = []
    given = _flags(rest)
    spoken_for = {flag.key for flag in given}  # the command line comes after the files, as in nanoGPT
    in_files: dict[str, Flag] = {}
    for file in files:
        values = read_assignments(Path(file), notes, spoken_for)
        in_files.update({key: Flag(key, [str(value)]) for key, value in values.items()})
    from_files = _mapped([flag for key, flag in in_files.items() if key not in spoken_for], notes)
    given = _mapped(given, notes)
    ours = {flag.key.removeprefix("no_") for flag in given}
    flags = _resumed([flag for flag in from_files if flag.key not in ours] + given)
    booleans = {f.name for f in dataclasses.fields(config_type) if f.type in (bool, "bool")}
    if files and not presets and not any(flag.key == "resume" for flag in flags):
        project = _project(in_files, flags)
        presets = [project]
        if project == "nanogpt" and _LORA_KEYS & set(in_files) and "method" not in {flag.key for flag in flags}:
            flags.append(Flag("method", ["full"]))  # nanoGPT-LoRA without a rank
    words = [word for flag in flags for word in flag.words(booleans)]
    return [*presets, *words], notes


def asked(words: Iterable[str]) -> set[str]:
    """The fields that translated words set: what is not among them, nobody asked for."""
    names = (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    return {name.removeprefix("no_") for name in names}


def _project(in_files: Iterable[str], flags: list[Flag]) -> str:
    """Whose defaults hold for what a file leaves open."""
    keys = set(in_files)
    if keys & _LORA_KEYS:
        return "nanogpt-lora" if any(flag.key == "lora_r" for flag in flags) else "nanogpt"
    return "nanogpt-lte" if keys & _LTE_KEYS else "nanogpt"


def _flags(words: Sequence[str]) -> list[Flag]:
    flags: list[Flag] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            flags.append(Flag(key.replace("-", "_"), [value] if equals else []))
        elif flags and not (word.startswith("-") and not _is_number(word)):
            flags[-1].values.append(word)
        else:
            flags.append(Flag(word, []))
    return flags


def _mapped(flags: list[Flag], notes: list[str]) -> list[Flag]:
    """nanoGPT's keys that mean something else here, or the same by another name."""
    out: list[Flag] = []
    for flag in flags:
        without = flag.key == "lora_rank" and flag.values in (["0"], ["0.0"])  # nanoGPT-LoRA: no adapters
        flag = Flag(_RENAMED.get(flag.key, flag.key), flag.values)
        value = flag.values[0] if len(flag.values) == 1 else None
        if flag.key in _NOTES:
            notes.append(f"{flag.key}: {_NOTES[flag.key]}")
        elif flag.key in _ONLY:
            only, why = _ONLY[flag.key]
            if value not in (only, only.removesuffix(".0")):
                raise UserError(f"{flag.key} can only be {only}: {why}")
        elif without:
            out.append(Flag("method", ["full"]))
        elif flag.key == "lora_alpha" and value in ("0", "0.0"):
            pass  # beside a rank of 0
        elif flag.key == "dataset" and value is not None:
            out.append(Flag("data_dir", [f"data/{value}"]))
        elif flag.key == "wandb_log":
            if value == "True":
                out.append(Flag("tracker", ["wandb"]))
        elif flag.key == "lte_mode" and value in _MODES:
            out.append(Flag("lte_mode", [_MODES[value]]))
        elif flag.key == "wrap_lte":
            out.append(Flag("method", ["full" if value == "False" else "lte"]))
        else:
            out.append(flag)
    return out


def _resumed(flags: list[Flag]) -> list[Flag]:
    """nanoGPT's ``init_from=resume``, which goes on with what lies in ``out_dir``, as our ``--resume``."""
    start = next((f for f in reversed(flags) if f.key == "init_from"), None)
    if start is None or start.values != ["resume"]:
        return flags
    folders = [f.values[0] for f in flags if f.key == "out" and f.values] or ["out"]
    return [f for f in flags if f.key not in ("init_from", "out")] + [Flag("resume", folders[-1:])]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
