"""What ``galore-vit`` is asked to do: flags and presets. No torch here: the command builds its help from these."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from memtrain_common.commands import configure
from memtrain_common.commands.configure import flag, refuse_unused
from memtrain_common.commands.run_flags import ImageFlags, Lr, RunFlags, Select, StepFlags
from memtrain_common.errors import UserError

PROG = "galore-vit"
# What a resumed run may do otherwise than it began. The data's hash is compared besides.
MAY_CHANGE = {*configure.MAY_CHANGE, "verify", "workers"}
LORA = ("melo", "lora")
GALORE_FLAGS = ("galore_rank", "gap", "galore_scale", "proj_type", "refresh", "paper")
Data = Literal[
    "digits", "folder", "pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist",
    "breastmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist",
]  # fmt: skip
Size = Literal["mini", "ti", "s", "b", "l", "h"]
Optim = Literal["adamw", "galore-adamw", "galore-adamw8bit", "galore-adafactor", "galore-scaled", "galore-torch"]


@dataclass(frozen=True)
class TrainConfig(RunFlags, ImageFlags, StepFlags):
    """Every flag of galore-vit train; kept in the run folder's config.json."""

    ALIASES: ClassVar[Mapping[str, str]] = {"lora_rank": "rank", "lora_alpha": "alpha", "scale": "galore_scale"}
    PLACES: ClassVar[tuple[str, ...]] = ("data_dir", "weights")
    MOVABLE: ClassVar[frozenset[str]] = frozenset({"weights"})

    def trainings(self) -> int:
        return self.seeds * max(1, self.folds)

    @classmethod
    def modernise(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Where an adapter's rank was ``lora_rank``, ``rank`` was GaLore's."""
        if "lora_rank" in values:
            values = {"galore_rank" if name == "rank" else name: value for name, value in values.items()}
        return super().modernise(values)

    # -- input and output
    data: Data = "digits"
    """Images: scikit-learn's digits (no file needed), a MedMNIST set, or a folder of pictures by class."""
    # -- model
    model: Size = "mini"
    """ViT built with random weights: mini (96 wide, 4 blocks), or Ti, S, B, L, H."""
    weights: str = ""
    """Pretrained model instead: a folder of transformers (a ViT, or any other image classifier: Dinov2, DeiT, Swin),
    Google's .npz, timm's .safetensors, or timm:NAME (a ViT by its name, where timm is installed); decides the size. A
    resumed run may name its place anew."""
    patch_size: int = 0
    """Pixels of a patch's side; 0 takes the weights', or the largest divisor up to a quarter of the image and 16."""
    dropout: float = 0.0
    """Dropout probability of a ViT with random weights."""
    # -- what is trained
    train: Literal["full", "head", "melo", "lora"] = "full"
    """All weights; the head; MeLo (LoRA on q and v) and the head; or LoRA on all the blocks' matrices and the head."""
    rank: int = 4
    """r of melo and lora."""
    alpha: float = 4.0
    """α of melo and lora: an adapter is multiplied by α/r."""
    # -- optimizer
    optim: Optim = "galore-adamw"
    """AdamW; GaLore around AdamW, 8-bit AdamW or Adafactor; whole gradients scaled by projected moments (APOLLO; at
    --galore-rank 1 its Mini form); or the published package's GaLoreAdamW."""
    galore_rank: int = 16
    """GaLore's r: dimensions of a gradient's subspace."""
    gap: int = 50
    """GaLore's T: optimizer steps between two refreshes of a subspace."""
    galore_scale: float = 1.0
    """GaLore's α on the update of a projected weight; of galore-scaled 1 is about AdamW's step."""
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Which side of a gradient is projected; std takes the smaller."""
    refresh: Literal["auto", "power", "svd", "random"] = "auto"
    """How a subspace is found: warm-started iteration, the full SVD as published, or at random, which keeps no basis
    (galore-scaled). auto: random for galore-scaled, else power."""
    paper: bool = False
    """The published code's arithmetic (galore-adamw, galore-adafactor). It takes a rank above every side of a weight,
    whose gradient it then turns whole instead of projecting it."""
    lr: Lr = 3e-3
    """Peak learning rate."""
    epochs: float = 25.0
    """Passes over the training images; the last batch of a pass may begin the next."""
    batch_size: int = 64
    """Images a micro-batch, over all processes."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """Cosine to zero after a warm-up of a twentieth; tenfold lower at 1/2 and 3/4, as MedMNIST has it; or constant."""
    augment: Literal["none", "flip", "flip-shift"] = "none"
    """Mirror half of the training images; also move them by up to an eighth. MedMNIST's protocol has none."""
    # -- evaluation
    seeds: int = 1
    """Runs with seeds --seed, --seed + 1, …; the summary gives their mean and 95 % confidence interval."""
    folds: int = 0
    """k: train k times, with each k-th part of train and val together as val; 0 keeps the set's own split."""
    eval_epochs: float = 1.0
    """Epochs between evaluations; a checkpoint follows each."""
    select: Select = "best"
    """Weights that are tested: the last, or those of the best validation AUC."""
    # -- system
    compile: bool = False
    """Run the model through torch.compile."""
    workers: int = 0
    """Processes that prepare batches ahead."""


@dataclass(frozen=True)
class EvalConfig:
    """Every flag of galore-vit eval."""

    run: str = ""
    """Run folder of galore-vit train, whose best checkpoint is evaluated (of every seed and fold)."""
    predictions: str = ""
    """Instead of --run: a CSV in MedMNIST's official form (index, then scores) to compare with the labels."""
    data: Data = "digits"
    """With --predictions: the set that they are of."""
    data_dir: str = ""
    """Folder with the set's npz file, or of pictures; with --run empty takes the run's, whose pictures they must be."""
    data_changed: Literal["refuse", "ok"] = "refuse"
    """With --run: ok evaluates it on other pictures of its classes, into --out."""
    weights: str = ""
    """With --run: where its --weights lie now, if they have moved; what is evaluated is in its checkpoint."""
    size: int = 28
    """With --predictions: pixels of the MedMNIST file."""
    verify: bool = True
    """With --predictions: compare the MedMNIST file's MD5 with the published one."""
    split: Literal["train", "val", "test"] = "test"
    """Which images."""
    out: str = ""
    """Folder for predictions and pictures; empty takes the run's own, and none for --predictions."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class InfoConfig:
    """Every flag of galore-vit info."""

    data_dir: str = ""
    """Also say which MedMNIST files lie in this folder, and whether their MD5 is the published one."""
    model: Size = "b"
    """ViT whose optimizer state is predicted, without allocating it."""
    image_size: int = 224
    """Pixels that it sees."""
    patch_size: int = 16
    """Pixels of a patch's side."""
    classes: int = 1000
    """Outputs of its head."""
    ranks: tuple[int, ...] = (16, 64, 128, 256)
    """GaLore's ranks to compare."""


PROTOCOL = TrainConfig(
    data="breastmnist", optim="adamw", lr=1e-3, batch_size=128, epochs=100.0, schedule="steps", grad_clip=0.0, seeds=3,
)  # fmt: skip
PRESETS = {
    "default": TrainConfig(),
    "medmnist-v2": PROTOCOL,
    "medmnist-v2-galore": replace(PROTOCOL, optim="galore-adamw"),
    "path-224": TrainConfig(
        data="pathmnist", size=224, model="b", patch_size=16, galore_rank=512, gap=50, galore_scale=1.0, lr=5e-3,
        batch_size=128, epochs=1.0, schedule="constant", grad_clip=0.0,
    ),
    "path-224-melo": TrainConfig(
        data="pathmnist", size=224, model="b", patch_size=16, train="melo", rank=8, alpha=4.0, galore_rank=512, gap=50,
        galore_scale=1.0, paper=True, lr=5e-3, batch_size=128, epochs=10.0, schedule="constant", grad_clip=0.0,
    ),
    "melo": TrainConfig(
        data="breastmnist", image_size=224, model="b", patch_size=16, train="melo", optim="adamw", rank=4,
        alpha=4.0, lr=1e-3, batch_size=16, epochs=20.0, grad_clip=0.0,
    ),
}  # fmt: skip


def check(config: TrainConfig, plain: TrainConfig) -> TrainConfig:
    """The configuration itself.

    Args:
        config: flags over a preset.
        plain: the preset: what stands there without flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    at_least = {
        "size": 4, "image_size": 0, "patch_size": 0, "rank": 1, "galore_rank": 1, "gap": 1, "weight_decay": 0,
        "max_iters": 0, "batch_size": 1, "gradient_accumulation_steps": 1, "grad_clip": 0, "seed": 0, "seeds": 1,
        "folds": 0, "log_interval": 1, "workers": 0, "dropout": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        if not least <= getattr(config, name) < math.inf:
            raise UserError(f"{flag(name)} must be at least {least}, got {getattr(config, name)}")
    for name in ("lr", "galore_scale", "alpha", "epochs", "eval_epochs"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{flag(name)} must be positive, got {getattr(config, name)}")
    if not config.dropout < 1:
        raise UserError(f"--dropout must be below 1, got {config.dropout}")
    if config.folds == 1:
        raise UserError("--folds 1 leaves nothing to train on: give 2 or more, or 0 for the set's own split")
    if config.data == "digits":
        refuse_unused(config, plain, ("size", "verify"), "the digits have 8 pixels and no file")
    elif config.data == "folder":
        refuse_unused(config, plain, ("verify",), "no MD5 of your pictures is published")
    if not config.optim.startswith("galore"):
        refuse_unused(config, plain, GALORE_FLAGS, f"--optim {config.optim} projects nothing")
    elif config.optim == "galore-torch":
        refuse_unused(config, plain, ("refresh", "paper"), "galore-torch is the published code, by SVD alone")
    elif config.optim == "galore-adamw8bit":
        refuse_unused(config, plain, ("paper",), "the published 8-bit arithmetic is bitsandbytes' own")
    elif config.optim == "galore-scaled":
        refuse_unused(config, plain, ("paper",), "galore-scaled is none of galore-torch's rules")
        if config.proj_type == "full" and config.galore_rank > 1:
            raise UserError("--proj-type full leaves galore-scaled no channel to scale: choose std, or --galore-rank 1")
    if config.refresh == "random" and config.optim != "galore-scaled":
        raise UserError(
            f"--refresh random is for --optim galore-scaled: {config.optim} projects back, for which it is not "
            "orthonormal; choose power or svd"
        )
    if config.paper:
        refuse_unused(config, plain, ("refresh",), "--paper finds subspaces as published, by SVD")
    if config.train not in LORA:
        refuse_unused(
            config, plain, ("rank", "alpha"), f"--train {config.train} has no adapters; GaLore's rank is --galore-rank"
        )
    if config.weights:
        refuse_unused(config, plain, ("model", "patch_size", "dropout"), "--weights brings its own")
    return config


def check_eval(config: EvalConfig) -> EvalConfig:
    """The configuration itself.

    Raises:
        UserError: if it is not clear what to evaluate.
    """
    if bool(config.run) == bool(config.predictions):
        raise UserError(f"{PROG} eval needs either --run, a folder of {PROG} train, or --predictions, a CSV")
    for name in ("data", "size", "verify"):
        if config.run and getattr(config, name) != getattr(EvalConfig(), name):
            raise UserError(f"{flag(name)} goes with --predictions: a run has its own")
    for name in ("out", "device", "weights", "data_changed"):
        if config.predictions and getattr(config, name) != getattr(EvalConfig(), name):
            raise UserError(f"{flag(name)} goes with --run: predictions are only compared with the labels")
    return config


def check_info(config: InfoConfig) -> InfoConfig:
    """The configuration itself.

    Raises:
        UserError: naming the flag that is out of its range.
    """
    for name in ("image_size", "patch_size", "classes"):
        if getattr(config, name) < 1:
            raise UserError(f"{flag(name)} must be at least 1, got {getattr(config, name)}")
    if not config.ranks or min(config.ranks) < 1:
        raise UserError(f"--ranks takes whole numbers of at least 1, got {' '.join(map(str, config.ranks)) or 'none'}")
    return config
