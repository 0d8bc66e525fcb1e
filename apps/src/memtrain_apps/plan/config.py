"""What ``plan`` is asked: flags and their checks. No torch here."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from memtrain_common.commands.cli import parse
from memtrain_common.commands.configure import at_least, flag, required
from memtrain_common.commands.units import parse_bytes
from memtrain_common.errors import UserError
from memtrain_common.files import check_targets

from ..compose.axes import OPTIM, SAVE, TRAIN, Axes, Optim, Save, Train, check
from .shapes import Shape, find_shape

DESCRIPTION = """Which combinations of --train, --save and --optim fit a memory budget, without allocating the model.

plan --model google/vit-large-patch16-224 --batch 64 --budget 8GiB"""
TOKENS = {"text": 128, "language": 512, "pairs": 128}
"""Tokens of a row where --seq-len is not given."""


@dataclass(frozen=True)
class PlanConfig:
    """Every flag of plan."""

    model: str = ""
    """A well-known model's name (google/vit-*, facebook/deit-*, bert-*, roberta-*, gpt2*, Llama-2, Llama-3, TinyLlama,
    Mistral-7B, Qwen2.5; finetune's names too), a folder with a config.json of transformers, or a model of timm. Empty
    asks for four well-known ones, and prints a line for each."""
    list_models: bool = False
    """Only list the names that are known."""
    budget: str = ""
    """Memory of one device, with its unit: 8GiB (8,589,934,592 bytes) or 8GB (8,000,000,000). Empty takes what is free
    on this machine's GPU."""
    batch: int = 32
    """Samples a micro-batch, over all GPUs (finetune's --batch-size)."""
    gradient_accumulation_steps: int = 1
    """Micro-batches an optimizer step."""
    # -- the model's input and precision
    seq_len: int = 0
    """Tokens of a row; 0 takes 128 of an encoder or an encoder-decoder and 512 of a language model."""
    image_size: int = 0
    """Pixels of an image's side; 0 takes the model's."""
    classes: int = 0
    """Outputs of the task head; 0 takes 1000 of pictures and 2 of text."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """The weights' dtype, and with it that of gradients and optimizer state. finetune and pretrain train float32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Autocast's dtype (finetune's --dtype); weights keep theirs."""
    # -- the machine
    device: Literal["cuda", "cpu"] = "cuda"
    """Where the step would run; nothing runs there now."""
    gpus: int = 1
    """Processes, each with a device and the budget of its own."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several GPUs: whole copies of the model, or shards."""
    reserve: str = "768MiB"
    """Part of the budget that no tensor gets: the CUDA context, kernels and their workspace; on the CPU Python and
    libraries."""
    margin: float = 0.05
    """Part of the predicted peak that is added for the allocator's rounding and fragmentation."""
    # -- the axes: which choices are planned, and their settings
    train: tuple[Train, ...] = TRAIN
    """Choices of --train."""
    save: tuple[Save, ...] = SAVE
    """Choices of --save."""
    optim: tuple[Optim, ...] = OPTIM
    """Choices of --optim."""
    rank: int = 8
    """r of lora, melo, lora-xs and lte."""
    adapt: Literal["attention", "all"] = "all"
    """Matrices that get adapters: those of attention, or those of the MLP too."""
    dropout: float = 0.0
    """Dropout before LoRA's A."""
    heads: int = 4
    """lte's heads a layer."""
    checkpoint_blocks: str = ""
    """Blocks that checkpoint checkpoints, as --save checkpoint:4 says it for the first four; empty takes all."""
    razor_blocks: str = ""
    """Blocks in which Back Razor works, as --save backrazor:8-11 says it, with the others checkpointed; empty takes
    all."""
    keep: float = 0.1
    """Back Razor's part of each activation that is kept."""
    razor_mode: Literal["low-bit", "pruned", "paper"] = "low-bit"
    """Back Razor's low-bit codes, its pruning to the largest elements, or the paper's."""
    recompute: Literal["auto", "none", "attention", "block"] = "auto"
    """What Back Razor makes again in the backward pass."""
    galore_rank: int = 4
    """GaLore's r."""
    # -- the answer
    order: Literal["best", "time", "peak"] = "best"
    """best: what trains the most numbers, of those what keeps gradients exact, of those the fastest; time: the fastest
    first; peak: the least memory."""
    top: int = 15
    """Rows of each table; 0 shows all."""
    png: str = ""
    """Also draw what fills the memory for the three best choices, to this file."""
    json: bool = False
    """Print one JSON object instead of tables: every combination, bytes as numbers."""
    measure: bool = False
    """Also train two steps of the best that fits on --device, here, and set what it held beside the prediction."""
    reserved: bool = False
    """Also replay two steps of the best that fits through the rules of CUDA's caching allocator: what is reserved, with
    and without expandable_segments."""
    recount: bool = False
    """Count everything anew, whatever comes with the package or is in the cache ($XDG_CACHE_HOME/memtrain/plan, else
    ~/.cache)."""
    workers: int = 0
    """Processes that count; 0 takes one a core, at most 4."""

    def axes(self, train: Train, save: Save, optim: Optim) -> Axes:
        """A combination with the settings of these flags."""
        own = {f.name for f in dataclasses.fields(Axes)} - {"train", "save", "optim"}
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        return Axes(train, save, optim, **settings)

    @property
    def budget_bytes(self) -> int:
        return parse_bytes(self.budget, "--budget")

    @property
    def reserve_bytes(self) -> int:
        return 0 if self.reserve == "0" else parse_bytes(self.reserve, "--reserve")

    @property
    def usable_bytes(self) -> int:
        """What the predicted peak may be."""
        return int((self.budget_bytes - self.reserve_bytes) / (1 + self.margin))


def configure(argv: Sequence[str]) -> PlanConfig:
    """Flags into a checked configuration.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(PlanConfig, argv, prog="plan", description=DESCRIPTION)
    if config.list_models:
        return config
    if not config.budget and config.device == "cuda":
        config = replace(config, budget=f"{free_gpu_bytes(config.gpus)}B")
    required(config, budget="a device's memory with its unit, as 8GiB")
    at_least(
        config, batch=1, gradient_accumulation_steps=1, seq_len=0, image_size=0, classes=0, gpus=1, margin=0, top=0,
        workers=0,
    )  # fmt: skip
    if not config.margin <= 1:
        raise UserError(f"--margin {config.margin} must be at most 1: it is a part of the peak, 0.05 for a twentieth")
    for name in ("train", "save", "optim"):
        if not getattr(config, name):
            raise UserError(f"{flag(name)} names no choice: leave it out for all")
    check(config.axes("lora", "all", "adamw"))
    if config.usable_bytes <= 0:
        raise UserError(
            f"--budget {config.budget} leaves nothing for tensors: {config.reserve} are set aside for what is none of "
            "them (--reserve)"
        )
    if config.batch % config.gpus:
        raise UserError(f"--batch {config.batch} must be divisible by the {config.gpus} GPUs (--gpus)")
    if config.gpus > 1 and config.device == "cpu":
        raise UserError("--gpus is of --device cuda: a plan for the CPU is for one process")
    for name in ("measure", "reserved"):
        if getattr(config, name) and config.gpus > 1:
            raise UserError(f"--{name} is of one process: leave --gpus out")
        if getattr(config, name) and config.json:
            raise UserError(f"--{name} prints a table: leave --json out")
    if not config.model and (config.json or config.measure or config.png):
        raise UserError(
            "--json, --measure and --png are of one model: name it by --model, as --model bert-base-uncased"
        )
    if config.png and not config.png.endswith(".png"):
        raise UserError(f"--png {config.png} must be a file's name that ends in .png")
    check_targets({"--png": config.png})
    return config


def free_gpu_bytes(gpus: int) -> int:
    """What is free now on each of the first GPUs that this process may see, by NVML.

    Raises:
        UserError: if there are not so many.
    """
    missing = "--budget is missing, and no GPU is found whose free memory it could be: give a device's memory as 8GiB"
    try:
        import pynvml

        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = visible.split(",") if visible is not None else [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        by_name = pynvml.nvmlDeviceGetHandleByUUID
        handles = [pynvml.nvmlDeviceGetHandleByIndex(int(w)) if w.isdigit() else by_name(w) for w in words if w]
        free = [int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles]
    except ImportError:
        raise UserError(missing) from None
    except pynvml.NVMLError:
        raise UserError(missing) from None
    if not free:
        raise UserError(missing)
    if len(free) < gpus:
        raise UserError(f"--gpus {gpus}: this machine has {len(free)}; give --budget to plan for another one")
    return min(free[:gpus])


def planned_shape(config: PlanConfig) -> tuple[Shape, int]:
    """The model's shape with the flags' input and head, and the tokens of a row (0 of pictures).

    Raises:
        UserError: if the model is not known, or a flag does not fit it.
    """
    shape = find_shape(config.model)
    if shape.task != "pictures" and config.image_size:
        raise UserError(f"--image-size is for pictures, and {config.model} reads text: leave it out")
    if shape.task == "pictures" and config.seq_len:
        raise UserError(f"--seq-len is for text, and {config.model} sees pictures: choose --image-size")
    if shape.task in ("language", "pairs") and config.classes:
        raise UserError(f"--classes is for classifiers, and {config.model} is a language model: leave it out")
    if config.classes:
        shape = shape.changed(num_labels=config.classes)
    if config.image_size:
        patch = int(shape.config.get("patch_size", 1))
        if config.image_size % patch:
            raise UserError(f"--image-size {config.image_size} is not filled by patches of {patch}: choose a multiple")
        shape = shape.changed(image_size=config.image_size)
    if shape.task == "pictures":
        return shape, 0
    tokens = config.seq_len or min(TOKENS[shape.task], shape.positions or TOKENS[shape.task])
    if tokens < 2:
        raise UserError("--seq-len must be at least 2")
    if shape.positions and tokens > shape.positions:
        raise UserError(f"--seq-len {tokens} is more than the {shape.positions} positions of {config.model}")
    return shape, tokens
