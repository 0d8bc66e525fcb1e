"""The memory of a run's step, predicted on fake tensors by the same composition that trains."""

from dataclasses import replace

import torch
from memtrain_common.measuring.prediction import Prediction, fake_copy, predict
from memtrain_common.training.fit_config import DTYPES
from memtrain_common.training.task import Task
from torch import nn
from torch.utils._pytree import tree_map

from ..compose.axes import Axes
from ..compose.compose import compose, load_libraries
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
    enabled = config.dtype != "float32"
    plain = workload.task
    batch = plain.batches(0)

    def build() -> nn.Module:
        made.append(compose(replace(plain, model=fake_copy(plain.model)), axes, lr=1e-3, predicting=True))
        return made[0].model

    def loss(model: nn.Module) -> torch.Tensor:
        fake = tree_map(lambda x: torch.empty_like(x, device=device) if isinstance(x, torch.Tensor) else x, batch)
        with torch.autocast(device.type, DTYPES[config.dtype], enabled=enabled):
            return plain.loss(model, fake)

    return predict(
        build,
        loss,
        lambda _: made[0].needed_optimizer(),
        saving=lambda: made[0].saving(),
        micro_batches=config.gradient_accumulation_steps,
    )
