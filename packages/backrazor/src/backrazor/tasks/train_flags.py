"""``backrazor-train``: flags, presets, checks. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from memtrain_common.commands.configure import MAY_CHANGE, at_least, below_one, positive, refuse_unused
from memtrain_common.commands.run_flags import CLASSIFIERS, ImageFlags, LearningRate, RunFlags, StepFlags
from memtrain_common.errors import UserError

from .razor_flags import ModeFlags, check_razor

PROG = "backrazor-train"
DESCRIPTION = """Fine-tune an image classifier, and keep only the largest part of each activation for the backward pass.

Without --data, --model and --weights (the preset digits): a ResNet-20 on scikit-learn's digits, by Back Razor and
densely, within 2 minutes."""
Data = Literal[
    "digits", "folder", "cifar10", "cifar100", "aircraft", "cars", "cub200", "flowers102", "food101", "pets",
    "pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist",
    "tissuemnist", "organamnist", "organcmnist", "organsmnist",
]  # fmt: skip
MODELS = (
    "vit-mini", "vit-ti-16", "vit-s-16", "vit-b-16", "vit-l-16", "resnet18", "resnet50", "mobilenet_v2",
    "proxyless_mobile", "resnet20",
)  # fmt: skip

FREE = MAY_CHANGE | {"workers", "download", "bad_images"}
"""What a resumed run may change."""


@dataclass(frozen=True)
class TrainConfig(RunFlags, ImageFlags, StepFlags, ModeFlags):
    """Every flag of backrazor-train; kept in the run folder's config.json."""

    OLD_VALUES: ClassVar[Mapping[tuple[str, Any], Any]] = {("razor_mode", "default"): "pruned"}

    PLACES: ClassVar[tuple[str, ...]] = ("data_dir", "weights", "model")
    MOVABLE: ClassVar[frozenset[str]] = frozenset({"weights", "model"})
    NAMES: ClassVar[frozenset[str]] = CLASSIFIERS

    def trainings(self) -> int:
        return 1 + self.compare_dense

    # -- input and output
    data: Data = "digits"
    """Set of pictures: scikit-learn's digits (no file needed), a published set, or a folder (or zip) by class."""
    download: bool = False
    """First download the set into --data-dir (CIFAR, Aircraft, Flowers, Food-101, Pets)."""
    validate: Literal["auto", "none"] = "auto"
    """The set's own val, or a tenth of train where it has none; none trains on all of it, as the official runs do."""
    bad_images: Literal["refuse", "skip", "unchecked"] = "refuse"
    """Damaged pictures: refuse the set, leave them out and say which, or do not look until they are used."""
    # -- model
    model: str = "vit-mini"
    """vit-mini (96 wide, 4 blocks), vit-ti-16, vit-s-16, vit-b-16, vit-l-16; resnet18, resnet50, mobilenet_v2
    (torchvision's), proxyless_mobile, resnet20 (CIFAR's); any image classifier of transformers, by its folder; or
    timm:NAME."""
    weights: str = ""
    """Pretrained weights. ViT: a folder of transformers, Google's .npz, timm's .safetensors. CNN: .pth or .safetensors,
    or imagenet (torchvision's, downloaded). timm:NAME: a file of its tensors. Empty begins at random; a folder and
    timm:NAME bring theirs. A resumed run may name the place of either anew."""
    patch_size: int = 0
    """Of a ViT with random weights: pixels of a patch's side; 0 takes the model's usual."""
    freeze_bn: bool = False
    """Do not train the weights of batch norms (official: full_noBN)."""
    fix_bn_stat: bool = False
    """Batch norms use their running statistics in training too, and leave them as they are."""
    dense_first_last: bool = False
    """Leave the first convolution (of a ViT the patch embedding), the last layer norm and the head to PyTorch, as the
    official code does."""
    compare_dense: bool = False
    """Also train the same model on the same batches densely (--mode full), in the folder dense of the run."""
    # -- optimizer
    optim: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum (official for ViTs), or Adam (official for CNNs)."""
    learning_rate: LearningRate = 0.03
    """Peak learning rate."""
    head_lr_factor: float = 1.0
    """The head's learning rate is so many times as high (official HeadLr10times: 10)."""
    momentum: float = 0.9
    """SGD's."""
    weight_decay: float = 0.0
    """Added to the gradient as weights times it, of every trained weight."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: half a cosine or a line down to 0, or nothing."""
    warmup_iters: int = 0
    """Steps in which the learning rate rises."""
    batch_size: int = 64
    """Pictures a micro-batch, over all processes."""
    label_smoothing: float = 0.0
    """Part of the label that is spread over all classes."""
    color_jitter: Literal["none", "torch", "tf"] = "none"
    """Random colours: torch (all four, strong) or tf (brightness and saturation)."""
    # -- evaluation
    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates after each epoch."""
    eval_batch_size: int = 128
    """Pictures a batch in evaluation."""
    # -- system
    workers: int = 0
    """Processes that prepare batches ahead."""


def vit(data: Data, learning_rate: float, max_iters: int, keep: float, **more: object) -> TrainConfig:
    """What the official ViT commands have in common: ViT-B/16 at 224 pixels, batches of 128, 500 steps of warm-up."""
    base: dict[str, object] = {"model": "vit-b-16", "batch_size": 128, "warmup_iters": 500, "augment": "vit"}
    base |= {"eval_interval": 1000, "workers": 4}
    return TrainConfig(
        data=data, learning_rate=learning_rate, max_iters=max_iters, keep=keep,
        **{**base, **more},  # type: ignore[arg-type]
    )  # fmt: skip


def fork(data: Data, max_iters: int, **more: object) -> TrainConfig:
    """The LoRA fork's runs: ViT-S/16, batches of 32, learning rate 1e-3."""
    return vit(data, 1e-3, max_iters, 0.1, model="vit-s-16", batch_size=32, **more)


def cnn(data: Data, learning_rate: float, label_smoothing: float, **more: object) -> TrainConfig:
    """What the official CNN commands have in common: Adam, 50 epochs, batches of 8, batch norms' weights frozen."""
    base: dict[str, object] = {"model": "proxyless_mobile", "freeze_bn": True, "workers": 4, "eval_batch_size": 100}
    base |= {"keep": 0.1}
    return TrainConfig(
        data=data, learning_rate=learning_rate, label_smoothing=label_smoothing, optim="adam", epochs=50.0,
        batch_size=8, grad_clip=0.0, augment="cnn",
        **{**base, **more},  # type: ignore[arg-type]
    )  # fmt: skip


PRESETS = {
    # what the official command lines leave open
    "official-vit": vit(
        "cifar10", 0.03, 10_000, 0.2, mode="full", batch_size=512, eval_batch_size=64, eval_interval=100
    ),
    "official-cnn": cnn("flowers102", 0.05, 0.0, mode="full", freeze_bn=False, keep=0.2, color_jitter="tf"),
    "digits": TrainConfig(
        model="resnet20", image_size=8, compare_dense=True, learning_rate=0.1, weight_decay=5e-4, warmup_iters=20
    ),
    "vit-aircraft": vit("aircraft", 0.03, 6000, 0.2, augment="cotuning", head_lr_factor=10.0),
    "vit-cub200": vit("cub200", 0.01, 6000, 0.1),
    "vit-cars": vit("cars", 0.1, 16000, 0.2),
    "vit-cifar10": vit("cifar10", 0.01, 20000, 0.1),
    "vit-cifar100": vit("cifar100", 0.01, 20000, 0.1),
    "vit-food101": vit("food101", 0.01, 30000, 0.2),
    "vit-flowers102": vit("flowers102", 0.03, 2000, 0.2),
    "vit-pets": vit("pets", 1e-3, 20000, 0.1, augment="cotuning"),
    "vit-s-cifar100": fork("cifar100", 15640),
    "vit-s-flowers102": fork("flowers102", 1564),
    "vit-s-pets": fork("pets", 2300, augment="cotuning"),
    "cnn-aircraft": cnn("aircraft", 3e-4, 0.3, color_jitter="torch"),
    "cnn-cars": cnn("cars", 3e-4, 0.7, color_jitter="torch", freeze_bn=False),
    "cnn-cub200": cnn("cub200", 1e-4, 0.7),
    "cnn-food101": cnn("food101", 3e-5, 0.1),
    "cnn-flowers102": cnn("flowers102", 1e-4, 0.7),
    "cnn-pets": cnn("pets", 3e-5, 0.3, fix_bn_stat=True),
    "cnn-cifar10": cnn("cifar10", 3e-5, 0.1, fix_bn_stat=True),
    "cnn-cifar100": cnn("cifar100", 3e-5, 0.1, fix_bn_stat=True),
    "resnet18-cifar10": cnn("cifar10", 1e-5, 0.1, fix_bn_stat=True, model="resnet18"),
    "resnet18-cifar10-full": cnn("cifar10", 3e-5, 0.1, fix_bn_stat=True, model="resnet18", mode="full"),
    # the official sweep over learning rates
    **{
        f"resnet18-cifar100-{rate}": cnn("cifar100", float(rate), 0.1, fix_bn_stat=True, model="resnet18")
        for rate in ("1e-5", "3e-6", "1e-6")
    },
    **{
        f"resnet18-cifar100-full-{rate}": cnn(
            "cifar100", float(rate), 0.1, fix_bn_stat=True, model="resnet18", mode="full"
        )
        for rate in ("3e-5", "1e-5", "3e-6", "1e-6")
    },
}


def check(config: TrainConfig, plain: TrainConfig) -> TrainConfig:
    """The configuration itself.

    Args:
        config: flags over a preset.
        plain: the preset, or the run that is resumed.

    Raises:
        UserError: naming the flag and what would be right.
    """
    at_least(
        config, size=4, image_size=0, patch_size=0, momentum=0, weight_decay=0, warmup_iters=0, max_iters=0,
        batch_size=1, gradient_accumulation_steps=1, grad_clip=0, label_smoothing=0, eval_interval=0,
        eval_batch_size=1, log_interval=1, workers=0, seed=0,
    )  # fmt: skip
    positive(config, "learning_rate", "head_lr_factor", "epochs")
    below_one(config, "momentum", "label_smoothing")
    check_razor(config, plain)
    if config.mode.startswith("lite-residual") and config.model != "proxyless_mobile":
        raise UserError(f"--mode {config.mode} is of TinyTL's network: give --model proxyless_mobile")
    if config.mode != "backrazor":
        refuse_unused(config, plain, ("dense_first_last",), f"--mode {config.mode} leaves everything to PyTorch")
    if config.mode != "backrazor" and config.compare_dense:
        refuse_unused(config, plain, ("compare_dense",), f"--mode {config.mode} is dense itself")
        config = replace(config, compare_dense=False)  # the preset's
    if config.validate == "none" and config.select == "best":
        raise UserError("--select best needs pictures to validate on: leave --validate none out")
    if config.data == "digits":
        refuse_unused(config, plain, ("size", "verify", "download"), "the digits come with scikit-learn")
    own = config.model in MODELS
    if not own and "/" not in config.model and ":" not in config.model and not Path(config.model).exists():
        raise UserError(
            f"--model {config.model} is no known model: choose one of {', '.join(MODELS)}, a folder of transformers, "
            "or timm:NAME"
        )
    if own and config.model.startswith("vit"):
        for name in ("freeze_bn", "fix_bn_stat"):
            refuse_unused(config, plain, (name,), f"{config.model} has no batch norm")
    else:
        refuse_unused(config, plain, ("patch_size",), f"{config.model} has no patches")
    if config.weights and own and config.model.startswith("vit"):
        refuse_unused(config, plain, ("patch_size",), "--weights brings its own")
    if config.optim == "adam":
        refuse_unused(config, plain, ("momentum",), "Adam has betas of its own (0.9, 0.999)")
    return config


def needs_weights(argv: Sequence[str], config: TrainConfig) -> None:
    """A preset for pretrained weights is not run without them by mistake."""
    if argv and argv[0].startswith(("vit-", "cnn-", "resnet18-")) and not config.weights:
        usual = "ViT-B_16.npz or a folder of transformers" if config.model.startswith("vit") else "imagenet"
        usual = "the published proxyless_mobile.pth" if config.model == "proxyless_mobile" else usual
        raise UserError(f"the preset {argv[0]} fine-tunes pretrained weights: give --weights ({usual})")


def with_preset(argv: Sequence[str]) -> Sequence[str]:
    """Where neither a preset nor a model, weights or data are named, the flags are laid over the preset digits."""
    own = {"--data", "--model", "--weights", "--resume", "-h", "--help"} & {word.partition("=")[0] for word in argv}
    return argv if own or (argv and not argv[0].startswith("-")) else ["digits", *argv]
