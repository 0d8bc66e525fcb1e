"""The moments of a training step at which memory may peak, each counted on fake tensors.

The three axes are nearly independent. Weights, gradients and saved activations depend on (train, save); the optimizer's
state and what its step takes besides on (train, optim). So a forward and backward pass for each of the first and an
optimizer step for each of the second tell every combination: see :func:`memtrain_apps.plan.forecast.compose_forecast`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from memtrain_common.errors import UserError
from memtrain_common.measuring.memory import SavedActivations, storages_of
from memtrain_common.measuring.prediction import LiveBytes, fake_step
from memtrain_common.training.task import Task
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter

from ..compose.axes import Axes, Optim
from ..compose.compose import compose, load_libraries
from ..compose.families import blocks
from ..compose.optimizers import build_optimizer
from .cuda_choices import CudaChoices
from .lines import Pass
from .shape_models import build_model, loss_of, make_batch, plain_task
from .step_bytes import HostMemory, StepBytes
from .uses import Cut, OptimizerUse, Step, StepUse, rows_of


def step_use_of(step: Step, axes: Axes, rows: int, shards: int = 1) -> StepUse:
    """Count the forward and backward pass of one micro-batch of ``rows``.

    Args:
        shards: processes that share each parameter; the pass itself is counted with whole ones.

    Raises:
        UserError: if the combination has no meaning for the model.
    """
    passes, cut = passes_of(step, axes, (rows,))
    return replace(passes[0].use, **(cut.shares(shards) if shards > 1 else {}))


def passes_of(step: Step, axes: Axes, rows: Sequence[int]) -> tuple[list[Pass], Cut]:
    """Count the passes of several micro-batches over one model, and how FSDP would cut it.

    Raises:
        UserError: if the combination has no meaning for the model.
    """
    load_libraries(axes.train, axes.optim)
    live = StepBytes()
    with faked(live, step.cuda):
        model, composed = composed_step(step, axes)
        live.count_gradients(model)
        return [_pass(live, step, axes, model, composed, n) for n in rows], _cut(model)


def _pass(live: StepBytes, step: Step, axes: Axes, model: nn.Module, composed: Task, rows: int) -> Pass:
    for parameter in model.parameters():
        parameter.grad = None
    host = HostMemory() if axes.save == "offload" else None
    live.accumulated = live.flops = 0
    live.restart()
    batch = make_batch(step, rows)
    recording = SavedActivations(model, by_layer=False)
    # the order of the loop: what is kept outermost, then the recording; autocast is in loss_of
    with host or composed.saving(), recording:
        value = loss_of(step, model, batch)
    activations = sum(recording.by_layer().values())
    del recording
    # by the engine itself: Tensor.backward would leave CudaChoices, and checkpoints run their forward pass again
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    del value
    parameters = list(model.parameters())
    use = StepUse(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        weights=_bytes(parameters),
        buffers=_bytes(model.buffers()),
        gradients=_bytes(p.grad for p in parameters),
        activations=activations,
        host=host.bytes if host else 0,
        peak=live.peak_bytes,
        beside=max(live.besides),
        left=live.bytes,
        flops=live.flops,
    )
    return Pass(use, live.rises, live.besides)


def optimizer_use_of(
    step: Step, axes: Axes, optims: Iterable[Optim], shards: int = 1
) -> dict[Optim, OptimizerUse | str]:
    """Count the steps of several optimizers over one model; instead of a count, the sentence that refuses it.

    Args:
        axes: its ``save`` and ``optim`` do not matter.
        shards: processes that share each parameter and its state; GaLore is counted whole, since its bases are.
    """
    found: dict[Optim, OptimizerUse | str] = {}
    for cut in (False, True):
        mine = [o for o in optims if cut == (shards > 1 and not o.startswith("galore"))]
        if not mine:
            continue
        for optim in mine:
            load_libraries(axes.train, optim)
        live = StepBytes()
        with faked(live):  # no pass is run, and only a pass differs on CUDA
            model, composed = composed_step(step, replace(axes, save="all", optim="sgd", merge_steps=1))
            merging = _growth(live, composed.after_step) if composed.after_step is not None else 0
            if cut:
                for p in model.parameters():
                    if p.dim():
                        p.data = p.data[: rows_of(p.shape[0], shards)].clone()
            for optim in mine:
                try:
                    found[optim] = _optimizer_use_of(
                        model, replace(axes, save="all", optim=optim), live, step.cuda, merging
                    )
                except UserError as error:
                    found[optim] = str(error)
                for p in model.parameters():
                    p.grad = None
    return found


def _optimizer_use_of(model: nn.Module, axes: Axes, live: StepBytes, cuda: bool, merging: int) -> OptimizerUse:
    """Two steps: the first makes the state, the second finds it there. GaLore makes all of its state before it updates
    any weight, and without numbers each step refreshes its bases, so that its first step holds what its second would.

    PyTorch's own on CUDA (``foreach``) and GaLore hold something of every parameter at once, PyTorch's own on the CPU
    something of a parameter while it steps the next one; torchao's 8-bit AdamW steps one parameter after another.
    """
    optimizer = build_optimizer(model, axes, lr=1e-3, head_lr=1e-3, weight_decay=0.0, say=lambda _: None)
    native = isinstance(optimizer, torch.optim.SGD | torch.optim.AdamW)
    if not native and not axes.optim.startswith("galore"):
        return _one_by_one(optimizer, live, merging)
    for group in optimizer.param_groups:
        if native and cuda:
            group["foreach"] = True
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    first = _growth(live, optimizer.step)
    state = sum(_bytes(tree_iter(optimizer.state[p])) for p in parameters)
    second = _growth(live, optimizer.step) if native else 0
    return OptimizerUse(state, max(0, first - state, second), merging)


_alone: dict[tuple[Any, ...], tuple[int, int, int]] = {}
"""A parameter that 8-bit AdamW steps by itself -> bytes of its state, growth in its first step and in its second."""


def _one_by_one(optimizer: torch.optim.Optimizer, live: StepBytes, merging: int) -> OptimizerUse:
    """Of an optimizer that is done with a parameter before it takes the next one: each stepped alone, those of one
    shape once. The first step of a parameter holds the state of those before it besides."""
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state, extra, uses = 0, 0, []
    for group in optimizer.param_groups:
        group["params"] = []
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        for parameter in parameters:
            key = (type(optimizer), len(groups), parameter.shape, parameter.dtype)  # each group has a tensor, its rate
            if key not in _alone:
                group["params"] = [parameter]
                parameter.grad = torch.empty_like(parameter)
                first = _growth(live, optimizer.step)
                made = _bytes(tree_iter(optimizer.state[parameter]))
                _alone[key] = made, first, _growth(live, optimizer.step)
                parameter.grad, group["params"] = None, []
                del optimizer.state[parameter]
            uses.append(_alone[key])
    whole = sum(made for made, _, _ in uses)
    for made, first, second in uses:
        extra = max(extra, state + first - whole, second)
        state += made
    return OptimizerUse(whole, extra, merging)


def _growth(live: StepBytes, call: Callable[[], Any]) -> int:
    """The most bytes that live during a call beside what lived before it."""
    live.restart()
    before = live.bytes
    call()
    return live.peak_bytes - before


@contextmanager
def faked(live: LiveBytes, cuda: bool = False) -> Iterator[None]:
    """Within, every new tensor is fake, and with ``cuda`` saves what it would there."""
    import transformers.utils.import_utils as utilities

    with ExitStack() as stack:
        stack.enter_context(fake_step(live))
        # Texts of different lengths need their mask: transformers must not leave it out as it does where nothing is
        # padded, which is what a fake mask would tell it.
        stack.enter_context(mock.patch.object(utilities, "is_fake_tensor", lambda x: isinstance(x, FakeTensor)))
        stack.enter_context(CudaChoices() if cuda else nullcontext())
        yield


def composed_step(step: Step, axes: Axes) -> tuple[nn.Module, Task]:
    """The model as it is trained. Offloading is put around the forward pass by the caller: the CPU refuses it."""
    on_device = replace(axes, save="all") if axes.save == "offload" else axes
    composed = compose(plain_task(step, build_model(step.shape, step.weights)), on_device, lr=1e-3, predicting=True)
    return composed.model, composed


def _cut(model: nn.Module) -> Cut:
    """What FSDP2 cuts, and what it gathers: a block at a time, and the rest from the first to the last."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    try:
        parts = [list(block.parameters()) for block in blocks(inner).values()]
    except UserError:
        return Cut((), 0, 0, 0, 0)
    inside = {p for part in parts for p in part}
    rest = [p for p in model.parameters() if p not in inside]
    counts: dict[tuple[int, int], list[int]] = {}
    for p in model.parameters():
        found = counts.setdefault((p.shape[0], p.nbytes // p.shape[0]) if p.dim() else (1, p.nbytes), [0, 0])
        found[0] += 1
        found[1] += p.grad is not None
    return Cut(
        rows=tuple((*key, n, trained) for key, (n, trained) in sorted(counts.items())),
        rest_weights=_bytes(rest),
        rest_gradients=_gradients(rest),
        block_weights=max(_bytes(part) for part in parts),
        block_gradients=max(_gradients(part) for part in parts),
    )


def _gradients(parameters: list[nn.Parameter]) -> int:
    """Bytes of their gradients themselves: FSDP copies them, where one of a batch of one row may be a view of more."""
    return sum(p.grad.nbytes for p in parameters if p.grad is not None)


def _bytes(values: Any) -> int:
    """Bytes of the unique storages behind whatever is a tensor."""
    found = {s._cdata: s.nbytes() for v in values if isinstance(v, Tensor) for s in storages_of(v)}
    return sum(found.values())
