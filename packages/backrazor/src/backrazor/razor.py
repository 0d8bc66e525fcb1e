"""The context manager: within it, calls that save activations are met and answered by operations that save less."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .errors import RazorError
from .exact import Exact
from .internals import (
    UNCOUNTED,
    is_of_checkpoint,
    is_wrapper,
    open_modes,
    saved_tensor_hook,
    unasking,
    within_compiled_call,
    within_trace,
    within_transform,
)
from .keeper import SETTINGS, Keeper
from .ops.logits import Logits, answer
from .table import mark_computed, names, rules

COMPLEX = frozenset({torch.complex32, torch.complex64, torch.complex128})
STRIDED = torch.strided
RUN_LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
P = ParamSpec("P")
T = TypeVar("T")


class Razor(Keeper, TorchFunctionMode):
    """``with Razor(keep=0.1): loss = model(x)``: an unmodified model saves a tenth of the bits of each activation.

    Or ``@Razor(keep=0.1)`` before a function that makes the forward pass, which is dense and exact. The backward pass
    may run inside the context or after it. Reusable: enter it for every micro-batch. A copy, or what is unpickled, is a
    new one of the same settings, not entered. :func:`.table.describe` lists what each operation keeps.

    Args:
        keep: fraction that is kept, in (0, 1]; 1 keeps all, and gives plain autograd's gradients but for rounding. In
            the mode "low-bit" of the 32 bits of an element (0.1 means some 3 bits, 2 are the least), in the other modes
            of the elements.
        mode: "low-bit"; "pruned", the largest elements of small groups; "paper", the official code's threshold a
            sample, float16 values, bitmask, activation functions' inputs dense in float16, a norm that shares nothing.
        attention: "pruned": as the mode keeps it; "exact" leaves softmax, products of activations and
            scaled_dot_product_attention to PyTorch.
        values: how kept values are written in the mode "pruned": "bf16", "fp32", "fp16" or "int8" (a scale for every
            128). The mode "paper" has float16, and float32 for norms and convolutions.
        derivative_bits: bits for the derivative of an activation function in the mode "pruned": 2, 3 or 4.
        recompute: outputs of linear layers that are made again in the backward pass and not stored, in the mode
            "low-bit": "attention", Q, K and V; "block", also the inputs of activation functions; None, nothing;
            "auto" is None, and "block" where ``keep`` is below 0.09.
        exact: patterns of what is left to PyTorch: names of operations in the table, "attention", "norm",
            "activation", "convolution", "depthwise", or of modules: ("depthwise", "*.stem").

    Raises:
        RazorError: a setting that is none of these.
    """

    def __init__(
        self,
        keep: float = 0.1,
        *,
        mode: str = "low-bit",
        attention: str = "pruned",
        values: str = "bf16",
        derivative_bits: int = 2,
        recompute: str | None = "auto",
        exact: Iterable[str] = (),
    ) -> None:
        super().__init__(keep, mode, attention, values, derivative_bits, recompute)
        if isinstance(exact, str):
            raise RazorError(f'exact={exact!r} is one word: give a tuple of patterns, as ("depthwise", "*.stem")')
        self.exact = Exact(exact)
        self._names: dict[Any, str] = {}
        self._rules: dict[Any, Callable[..., Any]] = {}
        self._outer_hook: Any = None

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A copy and what is unpickled are new Razors of these settings, not entered, with what a subclass added."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        known = vars(Razor())
        added = {name: value for name, value in vars(self).items() if name not in known}
        return {**settings, "exact": self.exact.patterns}, added

    def __setstate__(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        settings, added = state
        Razor.__init__(self, **settings)
        vars(self).update(added)

    def __enter__(self) -> "Razor":
        if any(isinstance(mode, Razor) for mode in open_modes()):
            raise RazorError("a Razor is open already: one setting holds for the whole forward pass")
        self._rules, self._names = _rules(), names()
        self._outer_hook = saved_tensor_hook()
        _refuse_compile(within_compiled_call())
        super().__enter__()
        self.exact.open()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.exact.close(finished=error[0] is None)
        self.forget()

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """As a decorator: the function runs within this Razor; called from within it, it just runs.

        Raises:
            RazorError: a class, a generator or a coroutine, whose body would run after the Razor is left.
        """
        if isinstance(function, type):
            raise RazorError(f"{function.__name__} is a class: decorate its forward")
        if any(is_one(function) for is_one in RUN_LATER):
            raise RazorError(
                f"{function.__name__} is a generator or a coroutine, which runs after the Razor is left: "
                "write `with razor:` inside it, around the forward pass"
            )

        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> T:
            if any(mode is self for mode in open_modes()):
                return function(*args, **kwargs)
            with self:
                return function(*args, **kwargs)

        return within

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            _refuse_compile(torch.compiler.is_compiling())
            if func in UNCOUNTED and Logits not in types:
                self.unshare(args[0])
            return func(*args, **kwargs)
        if Logits in types:
            return answer(func, args, kwargs, self.__torch_function__)
        rule = self._rules.get(func)
        if rule is Keeper.unshare:
            self.unshare(args[0])
            return func(*args, **kwargs)
        if rule is not None and not self._steps_aside((*args, *kwargs.values())):
            if self.exact.holds(self._names[func], args, kwargs):
                return func(*args, **kwargs)
            result = rule(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        copy = unasking(func)
        if copy is None:
            return mark_computed(func, func(*args, **kwargs), (*args, *kwargs.values()))
        super().__enter__()
        try:
            return copy(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _steps_aside(self, values: tuple[Any, ...]) -> bool:
        """Whether this call is not ours: in a checkpointed part, or of tensors that are no strided real numbers."""
        if within_transform():
            raise RazorError(
                "torch.func transforms (vmap, grad, jvp) cannot be used within a Razor: they need plain autograd"
            )
        if within_trace():
            raise RazorError(
                "torch.jit.trace and Razor do not go together: a trace would record the packing instead of the model; "
                "trace the model outside the Razor"
            )
        _refuse_compile(within_compiled_call())
        hook = saved_tensor_hook()
        if hook is not self._outer_hook and is_of_checkpoint(hook):
            return True  # torch.utils.checkpoint saves nothing here, and makes everything again exactly
        for v in values:
            if isinstance(v, Tensor) and (
                v.layout is not STRIDED  # sparse, jagged, of oneDNN: no memory to tell a tensor by
                or v.is_nested  # whose layout may be strided, without a shape
                or v.dtype in COMPLEX
                or is_wrapper(v)
            ):
                return True
        return False


@functools.cache
def _rules() -> dict[Any, Callable[..., Any]]:
    return {**rules(), **dict.fromkeys(UNCOUNTED, Keeper.unshare)}


def _refuse_compile(compiled: bool) -> None:
    if compiled:
        raise RazorError(
            "torch.compile and Razor do not go together: a compiled graph decides itself what it saves; "
            "call the model that is not compiled"
        )
