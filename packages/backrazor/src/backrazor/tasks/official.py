"""The official command lines: ViT/train.py, CNN/tinytl_fgvc_train.py and the BERT fork's run_glue.py. No torch here.

What such a line leaves open has the defaults that it has there (the presets ``official-vit``, ``official-cnn`` and
``run-glue``). Pruned fractions become --keep; the mode stays low-bit, whose gradients are nearer to dense ones at the
same bytes: add --razor-mode paper for the official arithmetic.
"""

from collections.abc import Callable

from memtrain_common.commands.official import (
    DATASET,
    MODEL_TYPE,
    REPORT_TO,
    TRAINERS_UNUSED,
    Official,
    Words,
    choice,
    kept,
    only,
)
from memtrain_common.errors import UserError

_INT8 = ("--razor-mode", "pruned", "--values", "int8")


def _lora(value: str) -> tuple[str, ...]:
    if value in ("0", "0.0", "1", "1.0"):  # the fork's defaults: no adapter
        return ()
    raise UserError("LoRA is not in this command: finetune takes the same flags (finetune --train_lora_only …)")


VIT_SWITCHES = {
    "HeadLr10times": ("--head-lr-factor", "10"), "cotuning_trans": ("--augment", "cotuning"),
    "color_distort": ("--color-jitter", "torch"), "customSplit": ("--validate", "auto"),
}  # fmt: skip
VIT_VALUES: dict[str, str | Callable[[str], Words]] = {
    "dataset": DATASET, "model_type": MODEL_TYPE,
    "pretrained_dir": "--weights", "img_size": "--image-size", "train_batch_size": "--batch-size",
    "num_workers": "--workers", "eval_every": "--eval-interval",
    "num_steps": "--max-iters", "decay_type": "--schedule", "warmup_steps": "--warmup-iters",
    "max_grad_norm": "--grad-clip", "back_prune_ratio": kept("back_prune_ratio"),
    "name": lambda name: ("--out", f"checkpoints/{name}"),
}  # fmt: skip
VIT_UNUSED = {
    "output_dir", "local_rank", "fp16", "fp16_opt_level", "loss_scale", "memory_cost_profile", "train_resize_first",
}  # fmt: skip
_METHODS = {
    "full": ("--mode", "full"), "full_noBN": ("--mode", "full", "--freeze-bn"), "last": ("--mode", "head"),
    "tinytl-bias": ("--mode", "bitfit"), "tinytl-lite_residual": ("--mode", "lite-residual"),
    "tinytl-lite_residual+bias": ("--mode", "lite-residual+bias"),
}  # fmt: skip
TRAIN = Official(
    switches={
        **VIT_SWITCHES, "bitfit": ("--mode", "bitfit"), "fix_backbone": ("--mode", "head"),
        "new_backrazor": ("--mode", "backrazor"), "backRazor": ("--mode", "backrazor"), "quantize": _INT8,
    },
    values={
        **VIT_VALUES, "lora_rank": _lora, "lora_alpha": _lora, "lora_dropout": _lora,
        # CNN/tinytl_fgvc_train.py
        "path": "--out", "manual_seed": "--seed", "test_batch_size": "--eval-batch-size", "n_worker": "--workers",
        "distort_color": choice("distort_color", {n: ("--color-jitter", n.lower()) for n in ("None", "torch", "tf")}),
        "n_epochs": "--epochs", "init_lr": "--learning-rate", "lr_schedule_type": "--schedule", "opt_type": "--optim",
        "net": choice("net", {n: ("--model", n) for n in ("proxyless_mobile", "resnet18")}), "net_path": "--weights",
        "transfer_learning_method": choice("transfer_learning_method", _METHODS),
        "backRazor_pruneRatio": kept("backRazor_pruneRatio"),
        "dropout": only("dropout", "0.2"), "lite_residual_downsample": only("lite_residual_downsample", "2"),
        "lite_residual_expand": only("lite_residual_expand", "1"),
        "lite_residual_groups": only("lite_residual_groups", "2"), "lite_residual_ks": only("lite_residual_ks", "5"),
    },
    unused=VIT_UNUSED | {
        "gpu", "valid_size", "resize_scale", "no_nesterov", "no_decay_keys", "ws_eps", "origin_network",
        "random_init_lite_residual", "frozen_param_bits", "backRazor_pruneRatio_head",
    },
    presets={"model_type": "official-vit", "transfer_learning_method": "official-cnn", "net": "official-cnn"},
    late={"bitfit", "fix_backbone", "new_backrazor", "backRazor"},
)  # fmt: skip


def _evaluations(value: str) -> tuple[str, ...]:
    return {"epoch": ("--eval-interval", "0"), "no": ("--eval-interval", "1000000000")}.get(value, ())


def _evaluated_as_logged(said: dict[str, list[str]]) -> None:
    """Trainer evaluates where it logs, unless it is told how often."""
    if "--log-interval" in said:
        said.setdefault("--eval-interval", said["--log-interval"])


GLUE = Official(
    switches={
        "backRazor": ("--mode", "backrazor"), "load_best_model_at_end": ("--select", "best"),
        "fp16": ("--dtype", "float16"), "bf16": ("--dtype", "bfloat16"), "no_cuda": ("--device", "cpu"),
        "use_cpu": ("--device", "cpu"),
    },
    values={
        "model_name_or_path": "--model", "task_name": lambda name: ("--task", name.lower()), "output_dir": "--out",
        "max_steps": lambda n: () if n == "-1" else ("--max-iters", n), "warmup_steps": "--warmup-iters",
        "logging_steps": "--log-interval", "eval_steps": "--eval-interval",
        "evaluation_strategy": _evaluations, "eval_strategy": _evaluations,
        "pad_to_max_length": choice("pad_to_max_length", {
            "True": ("--pad-to-max-length",), "False": ("--no-pad-to-max-length",)}),
        "lr_scheduler_type": only("lr_scheduler_type", "linear"), "resume_from_checkpoint": "--resume",
        "report_to": REPORT_TO,
    },
    unused=TRAINERS_UNUSED | {
        "logging_first_step", "ddp_find_unused_parameters", "max_predict_samples", "fp16_opt_level",
    },
    presets={"model_name_or_path": "run-glue"},
    shared={"eval_steps"},
    finish=_evaluated_as_logged,
)  # fmt: skip
