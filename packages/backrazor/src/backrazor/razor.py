"""The context manager: within it, calls that save activations are met and answered by operations that save less."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .coded import Levels, code, rounding
from .errors import RazorError
from .groups import groups_for
from .ops.chains import Chains
from .reentry import unasking
from .saved import Dense, Geometry, Saved, eight_bit, prune, prune_as_paper
from .store import Held, Holder, Store
from .values import FORMATS

MODES = ("default", "paper")
ATTENTION = ("pruned", "exact")


class Razor(TorchFunctionMode):
    """``with Razor(keep=0.1): loss = model(x)``: an unmodified model saves the largest tenth of each activation.

    The forward pass is dense and exact. The backward pass may run inside the context or after it. Reusable: enter it
    for every micro-batch. :func:`.table.describe` lists what each operation keeps.

    Args:
        keep: fraction of each activation's elements that are kept, in (0, 1]; 1 keeps all, and is plain autograd.
        mode: "default", or "paper": the official code's threshold a sample, float16 values, bitmask, activation
            functions' inputs dense in float16, and a norm shares nothing with the next layer.
        attention: "pruned" as in the paper, or "exact" to leave softmax, products of activations and
            scaled_dot_product_attention to PyTorch.
        values: how kept values are written: "bf16", "fp32", "fp16" or "int8" (a scale for every 128). The mode
        "paper" has
            float16, and float32 for norms and convolutions.
        derivative_bits: bits for the derivative of an activation function: 2, 3 or 4.

    Raises:
        RazorError: a setting that is none of these.
    """

    def __init__(
        self,
        keep: float = 0.1,
        *,
        mode: str = "default",
        attention: str = "pruned",
        values: str = "bf16",
        derivative_bits: int = 2,
    ) -> None:
        super().__init__()
        if not isinstance(keep, int | float) or not 0 < keep <= 1:
            raise RazorError(f"keep={keep!r} is not in (0, 1]: it is the fraction of each activation that is kept")
        for name, value, known in (
            ("mode", mode, MODES),
            ("attention", attention, ATTENTION),
            ("values", values, FORMATS),
        ):
            if value not in known:
                raise RazorError(f"{name}={value!r} is not one of {', '.join(known)}")
        if derivative_bits not in (2, 3, 4):
            raise RazorError(f"derivative_bits={derivative_bits!r} is not 2, 3 or 4")
        self.keep, self.mode, self.attention, self.values = float(keep), mode, attention, values
        self.derivative_bits = derivative_bits
        self.chains = Chains()
        self._groups = groups_for(self.keep) if keep < 1 else None
        self._store = Store()
        self._rules: dict[Any, Callable[..., Any]] = {}
        self._outer_hook: Any = None

    def __enter__(self) -> "Razor":
        if any(isinstance(mode, Razor) for mode in torch.overrides._get_current_function_mode_stack()):
            raise RazorError("a Razor is open already: one setting holds for the whole forward pass")
        from .table import rules

        self._rules = rules()
        self._outer_hook = _saved_tensor_hook()
        _refuse_compile(_within_compiled_call())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._store.clear()
        self.chains.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            _refuse_compile(torch.compiler.is_compiling())
            return func(*args, **kwargs)
        rule = self._rules.get(func)
        if rule is not None:
            if not self._steps_aside(args):
                result = rule(self, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*args, **kwargs)
        copy = unasking(func)
        if copy is None:
            return func(*args, **kwargs)
        super().__enter__()
        try:
            return copy(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _steps_aside(self, args: tuple[Any, ...]) -> bool:
        """Whether this call is not ours: in a checkpointed part, or on tensors that are more than their elements."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RazorError(
                "torch.func transforms (vmap, grad, jvp) cannot be used within a Razor: they need plain autograd"
            )
        _refuse_compile(_within_compiled_call())
        hook = _saved_tensor_hook()
        if hook is not self._outer_hook and "checkpoint" in getattr(hook, "__module__", ""):
            return True  # torch.utils.checkpoint saves nothing here, and makes everything again exactly
        return any(isinstance(arg, Tensor) and is_traceable_wrapper_subclass(arg) for arg in args)

    # What the operations ask for.

    def hold(self, x: Tensor, *, values: str | None = None, probabilities: bool = False, own: bool = False) -> Held:
        """What stands for ``x``, pruned; stored once for all operations that save it.

        Args:
            values: the mode "paper"'s format for this operation; float16 if not given.
            probabilities: of a softmax: kept in 8 bits where values are in 16.
            own: not shared.
        """
        if self.mode == "paper" and not probabilities:
            found = self._store.find(x, "pruned") if not own and x.is_contiguous() else None
            return found if found is not None else Held(Holder(self.prune(x, values=values)), None)
        return self._store.hold(x, "pruned", lambda: self.prune(x, values=values, probabilities=probabilities))

    def prune(self, x: Tensor, *, values: str | None = None, probabilities: bool = False) -> Saved:
        """``x``, pruned and not remembered."""
        if self.mode == "paper":
            return prune_as_paper(x, self.keep, values or "fp16")
        short = probabilities and self.values in ("bf16", "fp16")
        return prune(x, self._groups, "int8" if short else self.values)

    def hold_eight_bit(self, x: Tensor) -> Held:
        """What stands for ``x``, every element in 8.125 bits; ``x`` itself at keep = 1."""
        if self.keep == 1:
            return Held(Holder(Saved((x,), Dense(Geometry.of(x)))), None)
        return self._store.hold(x, "8 bits", lambda: eight_bit(x))

    def hold_coded(self, x: Tensor, levels: Levels) -> Held:
        """``x``, every element rounded to one of a few levels; ``x`` itself at keep = 1. Not remembered."""
        saved = Saved((x,), Dense(Geometry.of(x))) if self.keep == 1 else code(x, rounding(levels), levels)
        return Held(Holder(saved), None)

    def find(self, x: Tensor) -> Held | None:
        """What stands for ``x``, pruned, if it is stored."""
        return self._store.find(x, "pruned")

    def share(self, y: Tensor, saved: Saved, base: Held) -> None:
        """Let the next operation that saves ``y`` make it from ``saved``, which uses the tensors of ``base``."""
        base.holder.shared.append(self._store.put(y, "pruned", saved, base.holder.rebuilt).holder)

    def same_geometry(self, held: Held, *tensors: Tensor) -> bool:
        """Whether what is kept is rebuilt with the shape and strides that all these tensors have."""
        geometry = held.saved.recipe.geometry
        return all(tuple(t.shape) == geometry.shape and tuple(t.stride()) == geometry.stride for t in tensors)

    def samples_at_once(self, batch: int, sample_size: int, limit: int) -> int:
        """Samples whose probabilities together are no larger than ``limit`` elements; at least one."""
        return max(1, min(batch, limit // max(sample_size, 1)))


def _saved_tensor_hook() -> Any:
    """The innermost hook on what autograd saves."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None else None


def _within_compiled_call() -> bool:
    """Whether a function made by ``torch.compile`` is running, compiled or fallen back to Python."""
    from torch._C._dynamo import eval_frame

    return callable(eval_frame.get_eval_frame_callback())


def _refuse_compile(compiled: bool) -> None:
    if compiled:
        raise RazorError(
            "torch.compile and Razor do not go together: a compiled graph decides itself what it saves; "
            "call the model that is not compiled"
        )
