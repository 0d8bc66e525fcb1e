"""A run of nanoGPT's ``train.py`` gone on with: its weights, its AdamW's state and its iteration, from ``ckpt.pt``.

They become this run's first checkpoint, from which it begins as any resumed run does. What nanoGPT itself does not
keep begins anew: the order of the data, the random generators, float16's scale; and the best validation loss, since
the validation text is cut otherwise here.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memtrain_common.console import Console
from memtrain_common.errors import UserError
from memtrain_common.models.gpt_files import NanoGPTRun, read_nanogpt_run
from memtrain_common.runs.run_folder import RunFolder
from memtrain_common.training.distributed import gather_objects
from memtrain_common.training.keeping import Keeper
from memtrain_common.training.task import Task

from .train_config import TrainConfig


def _read(config: TrainConfig) -> NanoGPTRun:
    """Raises:
    UserError: if there is no optimizer in it, or not nanoGPT's.
    """
    run = read_nanogpt_run(Path(config.nanogpt_run))
    try:
        groups = run.optimizer["param_groups"]
        decays = sorted(float(group["weight_decay"]) for group in groups)
        if len(decays) == 2 and decays[0] == 0.0 and run.optimizer["state"] is not None:
            return run
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(
        f"{config.nanogpt_run} holds no AdamW as nanoGPT's train.py makes it, so that its run cannot go on: begin a "
        f"new run on its weights by --init-from {config.nanogpt_run}"
    )


def with_nanogpts_settings(config: TrainConfig) -> TrainConfig:
    """The configuration with what nanoGPT takes from the checkpoint it resumes: its block, betas and weight decay."""
    if not config.nanogpt_run or config.resume:
        return config
    run = _read(config)
    first = run.optimizer["param_groups"][0]
    beta1, beta2 = (float(beta) for beta in first["betas"])
    return replace(
        config,
        block_size=run.plain.config.block_size,
        weight_decay=float(first["weight_decay"]),
        beta1=beta1,
        beta2=beta2,
    )


def begin_at_nanogpts_step(
    config: TrainConfig, task: Task, run: RunFolder, key: Mapping[str, Any], console: Console
) -> None:
    """Write this run's first checkpoint: that of nanoGPT's last one. Every process calls it.

    Args:
        task: its model already has the weights.
        key: what a checkpoint must agree in.

    Raises:
        UserError: if the optimizer's state is of other parameters.
    """
    theirs, optimizer = _read(config), task.needed_optimizer()
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    try:
        optimizer.load_state_dict(theirs.adamw_state(optimizer))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the AdamW in {config.nanogpt_run} is of another model: {error}") from None
    device = next(task.model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    keeper = Keeper(task, scaler, run, console, resume_path=None, resume_key=key)
    keeper.progress.result.step = theirs.iter_num
    keeper.save()
    gather_objects(None)  # the first process has written it
    console.say(f"goes on with {config.nanogpt_run} after its {theirs.iter_num} iterations")
