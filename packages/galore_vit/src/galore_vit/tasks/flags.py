"""What ``galore-vit`` is asked to do: flags and presets. No torch here: the command builds its help from these."""

from dataclasses import dataclass, replace
from typing import Literal

from memtrain_common.commands.run_flags import Lr, RunFlags

Data = Literal[
    "digits", "folder", "pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist",
    "breastmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist",
]  # fmt: skip
Size = Literal["mini", "ti", "s", "b", "l", "h"]
Optim = Literal["adamw", "galore-adamw", "galore-adamw8bit", "galore-adafactor", "galore-torch"]


@dataclass(frozen=True)
class TrainConfig(RunFlags):
    """Every flag of galore-vit train; kept in the run folder's config.json."""

    # -- input and output
    data: Data = "digits"
    """Images: scikit-learn's digits (no file needed), a MedMNIST set, or a folder of pictures by class."""
    data_dir: str = ""
    """Folder with the MedMNIST set's npz file, or the folder of pictures."""
    size: int = 28
    """Pixels of the MedMNIST file (28, 64, 128 or 224) or of a folder's pictures."""
    verify: bool = True
    """Compare a MedMNIST file's MD5 with the published one; --no-verify reads a file of your own in its form."""
    # -- model
    model: Size = "mini"
    """ViT built with random weights: mini (96 wide, 4 blocks), or Ti, S, B, L, H."""
    weights: str = ""
    """Pretrained ViT instead: a folder of transformers, Google's .npz, timm's .safetensors, or timm:NAME (by its name,
    where timm is installed); decides the size."""
    image_size: int = 0
    """Pixels that the model sees; 0 takes the data's, other sizes are reached by nearest neighbours."""
    patch_size: int = 0
    """Pixels of a patch's side; 0 takes the weights', or the largest divisor up to a quarter of the image and 16."""
    dropout: float = 0.0
    """Dropout probability of a ViT with random weights."""
    # -- what is trained
    train: Literal["full", "head", "melo", "lora"] = "full"
    """All weights; the head; MeLo (LoRA on q and v) and the head; or LoRA on all the blocks' matrices and the head."""
    lora_rank: int = 4
    """r of melo and lora."""
    lora_alpha: float = 4.0
    """α of melo and lora: an adapter is multiplied by α/r."""
    # -- optimizer
    optim: Optim = "galore-adamw"
    """AdamW, GaLore around AdamW, 8-bit AdamW or Adafactor, or the published package's GaLoreAdamW."""
    rank: int = 16
    """GaLore's r: dimensions of a gradient's subspace."""
    gap: int = 50
    """GaLore's T: optimizer steps between two refreshes of a subspace."""
    scale: float = 1.0
    """GaLore's α on the update of a projected weight."""
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Which side of a gradient is projected; std takes the smaller."""
    refresh: Literal["power", "svd"] = "power"
    """How a subspace is found: warm-started iteration, or the full SVD as published."""
    lr: Lr = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    epochs: int = 25
    """Passes over the training images; the last batch of a pass may begin the next."""
    batch_size: int = 64
    """Images a micro-batch, over all processes."""
    gradient_accumulation_steps: int = 1
    """Micro-batches an optimizer step."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """Cosine to zero after a warm-up of a twentieth; tenfold lower at 1/2 and 3/4, as MedMNIST has it; or constant."""
    augment: Literal["none", "flip", "flip-shift"] = "none"
    """Mirror half of the training images; also move them by up to an eighth. MedMNIST's protocol has none."""
    # -- evaluation
    seeds: int = 1
    """Runs with seeds --seed, --seed + 1, …; the summary gives their mean and 95 % confidence interval."""
    folds: int = 0
    """k: train k times, with each k-th part of train and val together as val; 0 keeps the set's own split."""
    eval_epochs: int = 1
    """Epochs between evaluations; a checkpoint follows each, and the best by validation AUC is tested."""
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
    """Folder with the set's npz file, or of pictures; with --run empty takes the run's."""
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
    data="breastmnist", optim="adamw", lr=1e-3, batch_size=128, epochs=100, schedule="steps", grad_clip=0.0, seeds=3,
)  # fmt: skip
PRESETS = {
    "default": TrainConfig(),
    "medmnist-v2": PROTOCOL,
    "medmnist-v2-galore": replace(PROTOCOL, optim="galore-adamw"),
    "path-224": TrainConfig(
        data="pathmnist", size=224, model="b", patch_size=16, rank=512, gap=50, scale=1.0, lr=5e-3,
        batch_size=128, epochs=1, schedule="constant", grad_clip=0.0,
    ),
    "melo": TrainConfig(
        data="breastmnist", image_size=224, model="b", patch_size=16, train="melo", optim="adamw", lora_rank=4,
        lora_alpha=4.0, lr=1e-3, batch_size=16, epochs=20, grad_clip=0.0,
    ),
}  # fmt: skip
