"""The memory ledger before there is any memory: a training step on fake tensors.

A fake tensor (``torch._subclasses.FakeTensorMode``) has a shape, a dtype, a device and a storage with a size, and no
numbers. A step on fake tensors runs the same Python and the same autograd as a real one, so what an operation saves,
what a method packs and what an optimizer keeps are counted by the very code that measures a real step; nothing is
allocated, and a model of 7 billion weights takes seconds on a laptop.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, any_torch_dispatch_mode_on_stack
from torch.utils._pytree import tree_iter

from ..errors import UserError
from . import fake_dispatch
from .fake_numbers import REFUSED, Numbers, refusal, refuse_lazy, warn_of_sparse
from .internals import as_if_real, one_fake_mode, swap_fakes
from .memory import Ledger, SavedActivations, measure, storages_of
from .rnn_workspace import with_workspace


@dataclass(frozen=True)
class Prediction:
    """What a training step will hold."""

    ledger: Ledger
    """As :func:`memtrain_common.measuring.memory.measure` would have measured it."""
    peak_bytes: int
    """The most that live tensors hold at any moment of a step whose optimizer has its state already. Workspace inside
    an operation, the CUDA context and the allocator's fragmentation come on top."""


def predict(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module], Tensor],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    *,
    saving: Callable[[], AbstractContextManager[Any]] = nullcontext,
    micro_batches: int = 1,
    by_layer: bool = True,
) -> Prediction:
    """The ledger and the peak of a training step, without allocating it.

    Everything is made inside: ``build``, ``loss`` and ``optimizer`` are called while every new tensor is fake, so a
    configuration suffices (``AutoModel.from_config``), and no file of weights is read. For a model that exists,
    ``build`` may return it or a part of it: real weights are taken over as fake ones, the model itself is not touched.

    Args:
        build: makes the model, wrapped and with its gradients switched as it will be trained.
        loss: (model) -> the loss of one micro-batch, a scalar; it makes the batch too.
        optimizer: (model) -> the optimizer. None predicts a backward pass and no state.
        saving: makes the context of each forward pass, as ``fit`` takes it.
        micro_batches: forward and backward passes an optimizer step; their gradients add up.
        by_layer: as :class:`~memtrain_common.measuring.memory.SavedActivations` has it.

    A number that a program reads out of a tensor (``.item()``, ``if mask.all():``) does not exist here. It reads 1;
    a condition reads True, but False where it is an ``any``: most ask whether something is wrong; and what is read out
    of a ``linspace`` is what it would be, since models make the rates of their blocks by it. A program that goes
    another way on the real numbers is predicted wrongly.

    Raises:
        UserError: naming the operation, where a size follows from numbers (``logits[mask]``); or for a lazy module.
    """
    with fake_step() as live, ExitStack() as stack:
        model = _as_fake(_built(build))
        stack.enter_context(as_if_real())  # again: ``build`` may have imported what must be told
        made = optimizer(model) if optimizer is not None else None

        def run_passes() -> dict[str, int]:
            """-> bytes by layer that the first micro-batch saves."""
            saved: dict[str, int] = {}
            for micro in range(micro_batches):
                recording = SavedActivations(model, by_layer=by_layer) if micro == 0 else None
                with saving(), recording or nullcontext():
                    value = loss(model)
                if recording is not None:
                    saved = recording.by_layer()
                    del recording
                value.backward()
                del value
            return saved

        live.restart()
        activations = run_passes()
        peak, before = live.peak_bytes, live.bytes
        if made is not None:
            made.step()
        ledger = measure(model, made, activations)
        warn_of_sparse(model)
        if made is not None:
            live.restart()
            peak += live.bytes - before  # the state that the first step made lies beside every pass from now on
            if all(p.grad is None for p in model.parameters()):  # it stepped while gradients came
                run_passes()
            made.step()
        return Prediction(ledger, max(peak, live.peak_bytes))


@contextmanager
def fake_step(live: "LiveBytes | None" = None) -> "Iterator[LiveBytes]":
    """Inside, every new tensor is fake, and what lives is added up; for steps that :func:`predict` does not fit.

    Args:
        live: what adds up, where it is to count more than bytes; None makes one.
    """
    with ExitStack() as stack:
        random = torch.get_rng_state()  # fake operations may draw from the real generator
        stack.callback(torch.set_rng_state, random)
        live = live or LiveBytes()
        watched = any_torch_dispatch_mode_on_stack()
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(swap_fakes())
        stack.enter_context(one_fake_mode())
        stack.enter_context(as_if_real())
        live.mode = None if watched else mode
        yield stack.enter_context(live)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that live, real or fake, and answers for the numbers that fake tensors do not have."""

    _entered = 0

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, int] = {}  # a storage's key -> its bytes
        self._numbers = Numbers()
        self.mode: FakeTensorMode | None = None
        """The fake mode below, where operations may be remembered: no other mode is to see them."""
        self._froze = False

    def __enter__(self) -> Self:
        # `restart` then looks for garbage among what is made inside, not among libraries. To ask whether something is
        # frozen takes as long as there is much of it, so only the outermost one asks.
        if not LiveBytes._entered and not gc.get_freeze_count():
            gc.freeze()
            self._froze = True
        LiveBytes._entered += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        LiveBytes._entered -= 1
        if self._froze:
            gc.unfreeze()
            self._froze = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; to say so anew at every operation takes longer than to count it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.prim.device.default:  # half of all calls
                return args[0].fake_device
            if func is torch.ops.aten._local_scalar_dense.default:
                return self._numbers.read(args[0])
        kwargs = kwargs or {}
        try:
            result = func(*args, **kwargs) if self.mode is None else fake_dispatch.run(self.mode, func, args, kwargs)
        except REFUSED as error:
            raise refusal(error) from None
        result = with_workspace(func, args, result)
        self._numbers.note(func, args, result)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                for storage in storages_of(value):
                    self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._live or not n_bytes:
            return
        if storage.device.type == "cuda":
            n_bytes = -(-n_bytes // 512) * 512  # the caching allocator's smallest unit
        self._live[key] = n_bytes
        self.bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._live.pop(key)
        self._numbers.forget(key)

    def restart(self) -> None:
        """Forget the peak so far. What was built and dropped in cycles would live until Python's collector comes by, at
        a moment that differs from run to run: it goes now."""
        gc.collect()
        self.peak_bytes = self.bytes


def dense_activations(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, dtype: torch.dtype = torch.float32
) -> dict[str, int]:
    """Bytes by layer that a plain step saves, predicted, so that no memory and no state is touched.

    Args:
        model: as it is trained, not wrapped.
        loss: as ``fit`` takes it.
        batch: a micro-batch of this process; its shapes count.
        dtype: autocast's.

    Raises:
        UserError: if the model saves nothing.
    """
    device = next(model.parameters()).device
    with fake_step():
        fake = fake_copy(model)
        recording = SavedActivations(fake)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), recording:
            value = loss(fake, _like(batch, device))
        found = recording.by_layer()
        del value
    if not found:
        raise UserError(
            f"{type(model).__name__} has nothing to save: no operation of it keeps an activation for the backward "
            "pass, so there is nothing that could be made smaller"
        )
    return found


def _like(batch: Any, device: torch.device) -> Any:
    """The batch with new tensors of the same shapes; nested as ``data.batches.to_device`` takes it."""
    if isinstance(batch, Tensor):
        return torch.zeros(batch.shape, dtype=batch.dtype, device=device)
    if isinstance(batch, Mapping):
        return {k: _like(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(_like(v, device) for v in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_like(v, device) for v in batch)
    return batch


def fake_copy(model: nn.Module) -> nn.Module:
    """Within :func:`fake_step`: a copy of the model with fake tensors instead of its real ones; ties stay."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, Tensor) and is_lazy(tensor):
                raise refuse_lazy(type(module).__name__)
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor), tensor.requires_grad)
            elif isinstance(tensor, Tensor):
                memo[id(tensor)] = torch.empty_like(tensor)
    return copy.deepcopy(model, memo)


def _as_fake(model: nn.Module) -> nn.Module:
    tensors = (*model.parameters(), *model.buffers())
    return model if all(isinstance(t, FakeTensor) for t in tensors) else fake_copy(model)


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except RuntimeError as error:
        if "Uninitialized" in str(error):  # a lazy parameter cannot be fake, and torch says so in its own words
            raise refuse_lazy() from None
        raise
