"""The context manager: within it, calls that save activations are met and answered by operations that save less."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .errors import RazorError
from .groups import groups_for
from .linear import linear
from .saved import prune
from .store import Holder, Store
from .values import FORMATS

RULES: dict[Any, Callable[..., Any]] = {F.linear: linear}


class Razor(TorchFunctionMode):
    """``with Razor(keep=0.1): loss = model(x)``: an unmodified model saves the largest tenth of each activation.

    Reusable: enter it for every micro-batch. The backward pass may run inside or after it.

    Args:
        keep: fraction of each activation's elements that are kept, in (0, 1]; 1 is plain autograd.
        mode: "default", or "paper" for the official code's storage.
        attention: "pruned", or "exact" to leave attention to PyTorch.
        values: how kept values are written: "bf16", "fp32", "fp16" or "int8".
    """

    def __init__(
        self, keep: float = 0.1, *, mode: str = "default", attention: str = "pruned", values: str = "bf16"
    ) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise RazorError(f"keep={keep} is not in (0, 1]: it is the fraction of an activation that is kept")
        if values not in FORMATS:
            raise RazorError(f"values={values!r} is not one of {', '.join(FORMATS)}")
        self.keep, self.mode, self.attention, self.values = keep, mode, attention, values
        self._groups = groups_for(keep) if keep < 1 else None
        self._store = Store()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None and torch.is_grad_enabled():
            result = rule(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def hold(self, x: Tensor) -> Holder:
        """What stands for ``x``, pruned; stored once for all operations that save it."""
        return self._store.hold(x, "pruned", lambda: prune(x, self._groups, self.values))

    def __exit__(self, *error: Any) -> None:
        self._store.clear()
        super().__exit__(*error)
