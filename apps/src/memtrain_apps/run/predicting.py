"""The memory of a run's step, predicted on fake tensors by the same composition that trains."""

from collections.abc import Callable
from dataclasses import replace

import torch
from memtrain_common.measuring.prediction import Prediction, fake_copy, fake_step, predict
from memtrain_common.training.fit_config import DTYPES
from memtrain_common.training.task import Task
from torch import nn
from torch.utils._pytree import tree_map

from ..compose.axes import Axes
from ..compose.compose import compose, load_libraries
from ..compose.families import blocks
from ..compose.partial import BlockCost, block_costs
from .config import RunConfig
from .workload import Workload


def predict_run(workload: Workload, config: RunConfig, axes: Axes, *, device: torch.device) -> Prediction:
    """The ledger of a step by ``axes`` on the workload, before anything is allocated for it.

    Args:
        axes: may differ from the run's own, for a comparison.
        device: where the workload's model is. Nothing is allocated there.
    """
    load_libraries(axes.train, axes.optim)
    made: list[Task] = []

    def build() -> nn.Module:
        made.append(_fake_task(workload, axes))
        return made[0].model

    return predict(
        build,
        _fake_loss(workload, config, device),
        lambda _: made[0].needed_optimizer(),
        saving=lambda: made[0].saving(),
        micro_batches=config.gradient_accumulation_steps,
    )


def predict_blocks(workload: Workload, config: RunConfig, axes: Axes, *, device: torch.device) -> list[BlockCost]:
    """What each block of the model saves and costs in a forward pass.

    Raises:
        UserError: if the model has no numbered blocks.
    """
    load_libraries(axes.train, axes.optim)
    with fake_step():
        plain = fake_copy(workload.task.model)
        found = list(blocks(plain).values())
        task = compose(replace(workload.task, model=plain), replace(axes, save="all"), lr=1e-3, predicting=True)
        loss = _fake_loss(workload, config, device)
        return block_costs(task.model, found, lambda: loss(task.model))


def _fake_task(workload: Workload, axes: Axes) -> Task:
    return compose(replace(workload.task, model=fake_copy(workload.task.model)), axes, lr=1e-3, predicting=True)


def _fake_loss(workload: Workload, config: RunConfig, device: torch.device) -> Callable[[nn.Module], torch.Tensor]:
    plain, enabled = workload.task, config.dtype != "float32"
    batch = plain.batches(0)

    def loss(model: nn.Module) -> torch.Tensor:
        fake = tree_map(lambda x: torch.empty_like(x, device=device) if isinstance(x, torch.Tensor) else x, batch)
        with torch.autocast(device.type, DTYPES[config.dtype], enabled=enabled):
            return plain.loss(model, fake)

    return loss
