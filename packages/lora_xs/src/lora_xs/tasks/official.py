"""The official command lines of GLUE: main_glue.py, its variants, and the scripts around them. No torch here.

What such a line leaves open has the defaults that it has there: transformers', but for the learning rate of the head.
"""

from memtrain_common.commands.official import REPORT_TO, TRAINERS_UNUSED, Official, choice, only


def _scripts_model(said: dict[str, list[str]]) -> None:
    """The scripts' grids are of one model."""
    if "--grid" in said:
        said.setdefault("--model", ["roberta-large"])


GLUE = Official(
    switches={
        "fp16": ("--dtype", "float16"), "bf16": ("--dtype", "bfloat16"), "no_cuda": ("--device", "cpu"),
        "use_cpu": ("--device", "cpu"), "load_best_model_at_end": ("--select", "best"),
    },
    values={
        # scripts/run_glue.py, run_glue_pretrained.py, run_glue_no_svd.py: a grid over a task
        "target_task": lambda name: ("--task", name.lower(), "--grid"),
        "model_name_or_path": "--model", "task_name": lambda name: ("--task", name.lower()), "lora_rank": "--rank",
        "lora_alpha": "--alpha", "cls_learning_rate": "--head-learning-rate", "cls_lr": "--head-learning-rate",
        "mnli_model_path": "--from-adapter", "max_seq_length": "--max-length", "num_train_epochs": "--epochs",
        "per_device_train_batch_size": "--batch-size", "max_grad_norm": "--grad-clip", "output_dir": "--out",
        "max_steps": lambda n: () if n == "-1" else ("--max-iters", n), "logging_steps": "--log-interval",
        "eval_steps": "--eval-interval", "lr_scheduler_type": only("lr_scheduler_type", "linear"),
        "evaluation_strategy": choice("evaluation_strategy", {"epoch": ("--eval-interval", "0"), "steps": ()}),
        "report_to": REPORT_TO,
    },
    unused=TRAINERS_UNUSED | {"per_device_eval_batch_size", "pad_to_max_length"},
    presets={"mnli_model_path": "from-mnli"},
    finish=_scripts_model,
)  # fmt: skip
