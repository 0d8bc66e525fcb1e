"""The memory of a run's step, predicted on fake tensors by the same composition that trains."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from memtrain_common.measuring.fake_numbers import NotPredictedError
from memtrain_common.measuring.flops import Flops
from memtrain_common.measuring.prediction import LiveBytes, Prediction, fake_copy, fake_step, predict
from memtrain_common.training.fit_config import DTYPES
from memtrain_common.training.task import Task
from torch import nn
from torch.utils._pytree import tree_iter, tree_map

from ..compose.axes import Axes
from ..compose.compose import compose, load_libraries
from ..compose.families import blocks
from ..compose.partial import BlockMoments, StepMoments
from .config import RunConfig
from .workload import Workload


def predict_run(workload: Workload, config: RunConfig, axes: Axes, *, device: torch.device) -> Prediction:
    """The ledger of a step by ``axes`` on the workload, before anything is allocated for it.

    Args:
        axes: may differ from the run's own, for a comparison.
        device: where the workload's model is. Nothing is allocated there.

    Raises:
        NotPredictedError: if the model's step depends on numbers, which fake tensors do not have.
    """
    load_libraries(axes.train, axes.optim)
    made: list[Task] = []

    def build() -> nn.Module:
        made.append(_composed(workload, fake_copy(workload.task.model), axes))
        return made[0].model

    try:
        return predict(
            build,
            _fake_loss(workload, config, device),
            lambda _: made[0].needed_optimizer(),
            saving=lambda: made[0].saving(),
            micro_batches=config.gradient_accumulation_steps,
        )
    except NotPredictedError as error:
        name, why = type(workload.task.model).__name__, str(error).removeprefix("this step cannot be predicted: ")
        raise NotPredictedError(f"the memory of {name} cannot be predicted: {why}") from None


def predict_moments(workload: Workload, config: RunConfig, axes: Axes, *, device: torch.device) -> StepMoments:
    """What lives in each block of the model during a step, with everything kept and with every block checkpointed.

    Raises:
        UserError: if the model has no numbered blocks.
    """
    kept, again = (
        _moments(workload, config, replace(axes, save=save, checkpoint_blocks=""), device)
        for save in ("all", "checkpoint")
    )
    return StepMoments(
        tuple(
            BlockMoments((a.grows, b.grows), (a.most, b.most), a.flops)
            for a, b in zip(kept.blocks, again.blocks, strict=True)
        ),
        max(kept.loss, again.loss),
    )


@dataclass
class _Block:
    grows: int = 0
    most: int = 0
    flops: int = 0


class _Periods:
    """Which block runs, from one hook to the next, and the most bytes that live meanwhile."""

    def __init__(self, live: LiveBytes, found: list[nn.Module], counter: Flops) -> None:
        self.blocks, self.loss = [_Block() for _ in found], 0
        self._live, self._counter, self._at, self._forward = live, counter, -1, True
        self._levels = [0] * (len(found) + 1)
        for i, block in enumerate(found):
            block.register_forward_pre_hook(lambda *_, i=i: self._begin(i))
            block.register_forward_hook(lambda _, args, out, i=i: self._end(i, out))

    def _begin(self, i: int) -> None:
        if i == 0:  # of this pass
            self._forward = True
        if self._forward:
            self._enter(i)
            self._levels[i] = self._live.bytes
            self.blocks[i].flops = -self._counter.total

    def _end(self, i: int, out: Any) -> None:
        if not self._forward:
            return
        self.blocks[i].flops += self._counter.total
        self._enter(i + 1)
        self._levels[i + 1] = self._live.bytes
        self.blocks[i].grows = max(self.blocks[i].grows, self._levels[i + 1] - self._levels[i])
        tensor = next((t for t in tree_iter(out) if isinstance(t, torch.Tensor) and t.requires_grad), None)
        if tensor is not None:
            tensor.register_hook(lambda _, i=i: self._back(i))

    def _back(self, i: int) -> None:
        self._forward = False
        self._enter(i)

    def _enter(self, i: int) -> None:
        """Block ``i`` runs from now on, or, behind the last one, the loss."""
        self.close()
        self._at = i

    def close(self) -> None:
        """What ran until now has had its most."""
        most, i = self._live.peak_bytes, self._at
        self._live.peak_bytes = self._live.bytes
        if i == len(self.blocks):
            self.loss = max(self.loss, most - self._levels[i] + self._levels[0])
        elif i >= 0:
            self.blocks[i].most = max(self.blocks[i].most, most - self._levels[i] + self._levels[0])


def _moments(workload: Workload, config: RunConfig, axes: Axes, device: torch.device) -> _Periods:
    """Of the second optimizer step, which finds the optimizer's state there."""
    load_libraries(axes.train, axes.optim)
    with fake_step() as live:
        plain = fake_copy(workload.task.model)
        found = list(blocks(plain).values())
        task = _composed(workload, plain, axes)
        optimizer, loss, counter = task.needed_optimizer(), _fake_loss(workload, config, device), Flops()

        def run_passes() -> None:
            for _ in range(min(2, config.gradient_accumulation_steps)):
                with task.saving(), counter:
                    value = loss(task.model)
                value.backward()
                del value

        run_passes()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        live.restart()
        periods = _Periods(live, found, counter)
        run_passes()
        periods.close()
        return periods


def _composed(workload: Workload, plain: nn.Module, axes: Axes) -> Task:
    return compose(replace(workload.task, model=plain), axes, lr=1e-3, predicting=True)


def _fake_loss(workload: Workload, config: RunConfig, device: torch.device) -> Callable[[nn.Module], torch.Tensor]:
    plain, enabled = workload.task, config.dtype != "float32"
    batch = plain.batches(0)

    def loss(model: nn.Module) -> torch.Tensor:
        fake = tree_map(lambda x: torch.empty_like(x, device=device) if isinstance(x, torch.Tensor) else x, batch)
        with torch.autocast(device.type, DTYPES[config.dtype], enabled=enabled):
            return plain.loss(model, fake)

    return loss
