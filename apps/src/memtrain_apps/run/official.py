"""The command lines of two source projects as finetune's and pretrain's. No torch here.

``FORK``: ViT/train.py of Back Razor + LoRA. There adapters exist only where --new_backrazor is left out; here the two
go together. ``GALORE``: torchrun_main.py of GaLore, and of GaLore with Back Razor.
"""

from memtrain_common.commands.official import DATASET, MODEL_TYPE, Official, choice, kept
from memtrain_common.errors import UserError


def _warmup_as_ratio(said: dict[str, list[str]]) -> None:
    """Steps in which the learning rate rises are a part of all steps here."""
    if "--warmup-steps" not in said:
        return
    steps, warmup = said.get("--max-iters"), said.pop("--warmup-steps")
    try:
        said["--warmup-ratio"] = [f"{int(warmup[0]) / int(steps[0]):g}"] if steps else []
    except (ValueError, ZeroDivisionError):
        steps = None
    if not steps:
        raise UserError(
            f"--warmup_steps {warmup[0]} is a part of all steps here: give their number too, or --warmup-ratio"
        )


def _rank(value: str) -> tuple[str, ...]:
    return () if value == "0" else ("--train", "lora", "--rank", value)


FORK = Official(
    switches={
        "train_lora_only": ("--train", "lora"), "lora_mlp": ("--adapt", "all"), "bitfit": ("--train", "bitfit"),
        "fix_backbone": ("--train", "head"), "new_backrazor": ("--save", "backrazor"),
        "cotuning_trans": ("--augment", "cotuning"),
    },
    values={
        "lora_rank": _rank, "lora_alpha": "--alpha", "lora_dropout": "--dropout",
        "dataset": DATASET, "model_type": MODEL_TYPE,
        "pretrained_dir": "--weights", "img_size": "--image-size", "train_batch_size": "--batch-size",
        "num_workers": "--workers", "num_steps": "--max-iters", "max_grad_norm": "--grad-clip",
        "decay_type": choice("decay_type", {"cosine": ("--schedule", "cosine")}),
        "warmup_steps": "--warmup-steps", "back_prune_ratio": kept("back_prune_ratio"),
        "name": lambda name: ("--out", f"checkpoints/{name}"),
    },
    unused={
        "output_dir", "local_rank", "fp16", "fp16_opt_level", "loss_scale", "memory_cost_profile", "train_resize_first",
        "customSplit", "eval_batch_size", "eval_every",
    },
    refused={"quantize": "its kept values are bfloat16; backrazor-train takes --quantize"},
    presets={"model_type": "vit-s-ftfull"},
    finish=_warmup_as_ratio,
)  # fmt: skip


# GaLore's configs/llama_*.json: blocks, heads, width
_LLAMAS = {
    "60m": (8, 8, 512),
    "130m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "1b": (24, 32, 2048),
    "7b": (32, 32, 4096),
}
_OPTIMIZERS = {
    "adamw": "adamw", "adam": "adamw", "galore_adamw": "galore-adamw", "galore_adamw8bit": "galore-adamw8bit",
    "galore_adafactor": "galore-adafactor", "adam8bit": "adamw8bit", "sgd": "sgd",
}  # fmt: skip


def _model(value: str) -> tuple[str, ...]:
    name = value.rpartition("/")[2].removesuffix(".json").removeprefix("llama_")
    blocks, heads, width = _LLAMAS.get(name, (0, 0, 0))
    if not blocks:
        raise UserError(f"--model_config {value} is not known here: give --n-layer, --n-head and --n-embd")
    return ("--n-layer", str(blocks), "--n-head", str(heads), "--n-embd", str(width))


def _galores_rank(said: dict[str, list[str]]) -> None:
    """There --rank is GaLore's alone, and what is not asked for is plain."""
    _warmup_as_ratio(said)
    said.setdefault("--optim", ["adamw"])
    said.setdefault("--save", ["all"])
    if "--rank" in said and "--train" not in said:
        rank = said.pop("--rank")
        if said["--optim"][0].startswith("galore"):
            said["--galore-rank"] = rank


GALORE = Official(
    switches={"backrazor": ("--save", "backrazor")},
    values={
        "model_config": _model,
        "optimizer": choice("optimizer", {name: ("--optim", ours) for name, ours in _OPTIMIZERS.items()}),
        "update_proj_gap": "--gap", "prune_ratio": kept("prune_ratio"), "num_training_steps": "--max-iters",
        "max_length": "--block-size", "warmup_steps": "--warmup-steps", "eval_every": "--eval-interval",
        "gradient_accumulation": "--gradient-accumulation-steps",
    },
    unused={"save_every", "total_batch_size", "save_dir", "name", "proj_type", "single_gpu"},
    presets={"model_config": "llama-galore-backrazor"},
    finish=_galores_rank,
)  # fmt: skip
