"""What ``finetune`` and ``pretrain`` are asked to do: flags and presets. No torch here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from memtrain_common.commands import configure as common
from memtrain_common.commands.run_flags import CLASSIFIERS, ImageFlags, Lr, RunFlags, Select, StepFlags
from memtrain_common.commands.units import parse_bytes
from memtrain_common.errors import UserError

from ..compose.axes import Axes, check, names, refuse_unused

Config = TypeVar("Config", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig(RunFlags, StepFlags, Axes):
    """Flags of both commands, after those of the axes."""

    OLD_VALUES: ClassVar[Mapping[tuple[str, Any], Any]] = {("razor_mode", "default"): "pruned"}
    WITHOUT: ClassVar[Mapping[str, Any]] = {"lte_rest": "trained"}

    GROUPS: ClassVar[tuple[str, ...]] = (
        "train: which numbers are trained", "save: what is kept for the backward pass",
        "optim: what state the optimizer keeps", "data and model", "optimization", "run", "system",
    )  # fmt: skip

    # -- save: what is kept for the backward pass
    budget: str = ""
    """Memory of one device with its unit, as 6GiB: --save is chosen for it, the fastest exact choice whose predicted
    peak fits; on the CPU of tensors alone."""
    # -- run
    explain_memory: bool = False
    """Print what each choice saves and which change would save most; nothing is trained."""
    save_model: bool = True
    """Write the trained model, adapters merged, to the run folder's model/."""
    # -- optimization
    lr: Lr = 0.0
    """Peak learning rate; 0 takes the usual one of --train and --optim."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (sgd: added to the gradient)."""
    select: Select = "best"
    """Weights to test and save: the last, or those of the best validation."""
    batch_size: int = 64
    """Samples per micro-batch, over all processes."""
    grad_clip: float = 1.0
    """Gradient clipping norm, for lte of each head by itself; 0 does not clip."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_ratio: float = 0.05
    """Fraction of the steps that warm the learning rate up."""
    # -- system
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: replicate the model, or shard it."""
    compile: bool = False
    """Run the model through torch.compile."""
    threads: int = 0
    """CPU threads; 0 leaves it to torch. Results are bit-identical for the same number."""
    workers: int = 0
    """Processes that prepare batches."""


@dataclass(frozen=True)
class FinetuneConfig(RunConfig, ImageFlags):
    """Every flag of finetune; kept in the run folder's config.json."""

    ALIASES: ClassVar[Mapping[str, str]] = {"recipe": "augment"}
    PLACES: ClassVar[tuple[str, ...]] = ("data_dir", "model", "weights", "data")
    MOVABLE: ClassVar[frozenset[str]] = frozenset({"model", "weights", "data"})
    NAMES: ClassVar[frozenset[str]] = CLASSIFIERS
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "finetune --train lora --save backrazor",
        "finetune --data pets --data-dir PETS --model vit-s-16 --weights ViT-S_16.npz --optim galore-adamw",
        "finetune --data glue:sst2 --data-dir GLUE --model MiniLM --train lora-xs --rank 16",
        "finetune --train lora --dropout 0.1 --explain-memory",
        "finetune --resume runs/NAME",
    )

    # -- data and model
    data: str = "digits"
    """digits (embedded); cifar10, cifar100, aircraft, cars, cub200, flowers102, food101, pets; a MedMNIST set; folder;
    glue:TASK (glue:rte); metamathqa, commonsense or a JSON(L) file of instructions."""
    data_dir: str = ""
    """Folder (or zip) with the data in its public form."""
    bad_images: Literal["refuse", "skip", "unchecked"] = "refuse"
    """Damaged pictures: refuse the set, leave them out and say which, or do not look until they are used."""
    labels: tuple[int, ...] = ()
    """Classes to use, in this order; empty takes all."""
    model: str = ""
    """Images: vit-mini (default), vit-ti-16, vit-s-16, vit-b-16, vit-l-16, resnet18, resnet50, mobilenet_v2,
    proxyless_mobile, resnet20; a folder of transformers, or timm:NAME, with their weights. Text: a transformers folder,
    or a name on the hub."""
    weights: str = ""
    """Images: pretrained weights (transformers folder, Google's .npz, timm's .safetensors, a state dict). A resumed run
    may name anew where they, a model's folder or a file of --data lie."""
    max_length: int = 128
    """Text: longest input in tokens."""
    # -- optimization
    head_lr: float = 0.0
    """Peak learning rate of the task head beside something else; 0 takes --lr."""
    # -- run
    eval_epochs: float = 1.0
    """Epochs between evaluations."""


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Every flag of pretrain; kept in the run folder's config.json."""

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "pretrain --optim galore-adamw --save backrazor",
        "pretrain --model llama --data-dir TEXT --tokenizer chars --max-iters 2000",
        "pretrain --resume runs/NAME",
    )

    PLACES: ClassVar[tuple[str, ...]] = ("data_dir", "tokenizer_dir")

    # -- data and model
    data_dir: str = ""
    """Folder of text; empty takes the source of Python's standard library."""
    tokenizer: Literal["bytes", "chars", "gpt2"] = "bytes"
    """What a token is."""
    tokenizer_dir: str = ""
    """Folder with GPT-2's encoder.json and vocab.bpe."""
    model: Literal["gpt", "llama"] = "gpt"
    """nanoGPT's GPT, or transformers' Llama of the same size (RMSNorm, rotary positions, gated MLP)."""
    n_layer: int = 4
    """Blocks."""
    n_head: int = 4
    """Attention heads."""
    n_embd: int = 128
    """Width."""
    block_size: int = 64
    """Tokens of context."""
    bias: bool = False
    """Biases in linear layers and norms (gpt); bitfit needs them."""
    batch_size: int = 16
    """Crops per micro-batch, over all processes."""
    epochs: float = 0.0
    """Passes over the training tokens, instead of --max-iters; 0 leaves it to that."""
    max_iters: int = 500
    """Optimizer steps, where --epochs is 0."""
    eval_interval: int = 100
    """Steps between evaluations."""
    eval_iters: int = 20
    """Batches of an evaluation."""


VIT_S = FinetuneConfig(
    data="cifar100", model="vit-s-16", batch_size=32, augment="vit", optim="sgd", lr=1e-3, epochs=10, adapt="attention",
    rank=4, alpha=8.0, dropout=0.1,
)  # fmt: skip
FINETUNE_PRESETS = {
    "default": FinetuneConfig(),
    # the runs of the Back Razor + LoRA fork: ViT-S/16, SGD
    "vit-s-ftfull": replace(VIT_S, train="full"),
    "vit-s-bitfit": replace(VIT_S, train="bitfit"),
    "vit-s-backrazor": replace(VIT_S, train="full", save="backrazor", keep=0.2),
    "vit-s-lora": replace(VIT_S, train="lora", lr=3e-4),
    "vit-s-lora-mlp": replace(VIT_S, train="lora", lr=3e-4, adapt="all"),
    "vit-s-lora-backrazor": replace(VIT_S, train="lora", lr=3e-4, save="backrazor", keep=0.2),
    # ltegalorevit.py: LTE with GaLore over its heads' matrices
    "path-lte-galore": FinetuneConfig(
        train="lte", optim="galore-adamw", data="pathmnist", size=224, model="vit-b-16", image_size=224, batch_size=16,
        epochs=1, lr=5e-3, heads=8, rank=32, alpha=4096.0, lte_rest="trained", galore_rank=16, schedule="constant",
        warmup_ratio=0.0, grad_clip=0.0,
    ),
    "rte-lora-xs-backrazor": FinetuneConfig(
        train="lora-xs", save="backrazor", data="glue:rte", rank=16, batch_size=32, lr=1e-3, head_lr=5e-3, epochs=50,
    ),
}  # fmt: skip
PRETRAIN_PRESETS = {
    "default": PretrainConfig(),
    # GaLore with Back Razor on a Llama-shaped model: rank 128, gap 200, scale 0.25, a fifth of each activation
    "llama-galore-backrazor": PretrainConfig(
        model="llama", save="backrazor", keep=0.2, optim="galore-adamw", galore_rank=128, gap=200, galore_scale=0.25,
        lr=0.01, n_layer=8, n_head=8, n_embd=512, block_size=256, batch_size=32, max_iters=10_000,
    ),
}  # fmt: skip

# What a resumed run may do otherwise than it began. The data's hash is compared besides.
MAY_CHANGE = {*common.MAY_CHANGE, "workers", "save_model", "log_interval", "bad_images"}

# Usual peak learning rates: with Adam's state, and with sgd.
LEARNING_RATES = {
    "full": (5e-4, 1e-2), "head": (1e-3, 3e-2), "bitfit": (1e-3, 3e-2), "lora": (1e-3, 3e-2), "melo": (1e-3, 3e-2),
    "lora-xs": (4e-3, 1e-1), "lte": (1e-3, 3e-2),
}  # fmt: skip


def usual_lr(axes: Axes) -> float:
    """The learning rate where none is given."""
    adam, sgd = LEARNING_RATES[axes.train]
    return sgd if axes.optim == "sgd" else adam


def configure(
    argv: Sequence[str], config_type: type[Config], *, prog: str, description: str, presets: dict[str, Config]
) -> Config:
    """Flags, presets and a resumed run's own configuration into a checked configuration."""

    def check_all(config: Config, before: Config) -> Config:
        given = _given(common.with_new_names(argv, config_type))
        of_budget = {"keep", "razor_mode", "recompute"} if config.budget else set()  # Back Razor is one of its choices
        refuse_unused(config, (given & set(names())) - of_budget)
        if isinstance(config, FinetuneConfig):
            _refuse_what_the_data_have_not(config, given)
        if config.train == "head" and "head_lr" in given and given & {"lr", "learning_rate"}:
            raise UserError("--lr and --head-lr are one rate with --train head: leave one of the two out")
        return checked(config)

    return common.configure(
        config_type, argv, prog=prog, description=description, presets=presets, check=check_all, may_change=MAY_CHANGE
    )


def _given(argv: Sequence[str]) -> set[str]:
    """Names of the settings that stand on the command line."""
    return {w[2:].split("=")[0].replace("-", "_") for w in argv if w.startswith("--")}


def _refuse_what_the_data_have_not(config: FinetuneConfig, given: set[str]) -> None:
    """Flags on the command line that are for other data."""
    from memtrain_common.data.images.medmnist_sets import SETS
    from memtrain_common.data.images.sets import CIFAR, NAMES

    unused: dict[str, str] = {}
    if config.data not in NAMES:
        for name in ("labels", "weights", "image_size", "augment", "size", "verify", "bad_images"):
            unused[name] = f"is for pictures, and --data {config.data} has none"
    else:
        unused["max_length"] = f"is for text, and --data {config.data} are pictures"
        if config.data not in SETS:
            unused["size"] = f"is the size of MedMNIST's files, and --data {config.data} has none of them"
            unused["verify"] = f"compares MedMNIST's files with their MD5, and --data {config.data} has none of them"
        if config.data in ("digits", *CIFAR, *SETS):
            unused["bad_images"] = f"is for files of pictures, and those of --data {config.data} lie in one file"
    for name, why in unused.items():
        if name in given or f"no_{name}" in given:
            raise UserError(f"{common.flag(name)} {why}: leave it out")


def checked(config: Config) -> Config:
    """The configuration itself.

    Raises:
        UserError: naming the flag and what would be right.
    """
    check(config)
    if config.budget:
        parse_bytes(config.budget, "--budget")
        if config.save != "all":
            raise UserError(
                f"--budget chooses --save, and {config.save} was asked for: leave one of the two out, or predict that "
                "choice by --explain-memory"
            )
    at_least: dict[str, Any] = {
        "lr": 0, "weight_decay": 0, "batch_size": 1, "gradient_accumulation_steps": 1, "grad_clip": 0,
        "warmup_ratio": 0, "log_interval": 1, "seed": 0, "threads": 0, "workers": 0, "size": 4, "image_size": 0,
        "max_length": 2, "head_lr": 0, "n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 1, "max_iters": 0,
        "eval_interval": 1, "eval_iters": 1,
    }  # fmt: skip
    own = {f.name for f in fields(config)}
    for name, least in at_least.items():
        if name in own and not least <= getattr(config, name) < math.inf:
            raise UserError(f"{common.flag(name)} must be at least {least}, got {getattr(config, name)}")
    for name in ("epochs", "eval_epochs"):
        if name in own and not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{common.flag(name)} must be at least 0, got {getattr(config, name)}")
    if not config.epochs and not config.max_iters:
        raise UserError("--epochs and --max-iters are both 0: give one of them")
    if "eval_epochs" in own and not getattr(config, "eval_epochs", 1):
        raise UserError("--eval-epochs must be above 0, got 0")
    if not config.warmup_ratio < 1:
        raise UserError(f"--warmup-ratio must be below 1, got {config.warmup_ratio}")
    if "n_embd" in own:
        width, heads = getattr(config, "n_embd", 0), getattr(config, "n_head", 1)
        step = heads if getattr(config, "model", "") == "gpt" else 2 * heads  # a Llama turns pairs of a head's numbers
        if width % step:
            of = f"--n-head {heads}" if step == heads else f"twice --n-head {heads}"
            raise UserError(f"--n-embd {width} must be a multiple of {of}")
    if config.train == "lte" and config.batch_size % config.heads:
        raise UserError(
            f"--batch-size {config.batch_size} must be divisible by --heads {config.heads}: each of lte's heads sees "
            "its own share of a batch"
        )
    if config.train == "lte" and config.parallel == "fsdp":
        raise UserError("--parallel fsdp does not go with --train lte, which merges into whole weights: choose ddp")
    return config
