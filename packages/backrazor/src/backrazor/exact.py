"""What a Razor leaves to PyTorch by the user's wish: operations by their kind, modules by their name.

Module names are those of the outermost module that is called within the Razor, as ``named_modules`` gives them. Hooks
on module calls are registered only while a Razor with patterns is open.
"""

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

FAMILIES = {
    "attention": ("softmax", "matmul", "scaled_dot_product_attention"),
    "convolution": ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "norm": ("layer_norm", "rms_norm", "batch_norm", "group_norm"),
    "activation": ("gelu", "silu", "hardswish", "mish", "softplus", "sigmoid", "tanh"),
}
"""Words for several operations of the table; "depthwise" is a convolution with a group for each channel."""


class Exact:
    """Patterns of ``fnmatch``, each for operations of the table, for :data:`FAMILIES`, "depthwise", or module names."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._idle = set(self.patterns)
        self._root: nn.Module | None = None
        self._names: dict[int, str] = {}
        self._depth = 0
        self._within = 0
        """Modules that are running, and those among them that are exact."""
        self._hooks: list[Any] = []

    def open(self) -> None:
        if self.patterns:
            self._depth = self._within = 0
            self._hooks = [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]

    def close(self, finished: bool) -> None:
        """Forget the modules; say once which patterns met nothing in a pass that ``finished``."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._root, self._names = [], None, {}
        if finished and self._idle:
            idle, self._idle = sorted(self._idle), set()
            warnings.warn(
                f"exact={', '.join(idle)} matches no operation and no module of this forward pass", stacklevel=3
            )

    def holds(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of ``operation``, a name of the table, is left to PyTorch."""
        if not self.patterns:
            return False
        words = [operation, *(family for family, names in FAMILIES.items() if operation in names)]
        if operation in FAMILIES["convolution"] and _depthwise(operation, args, kwargs):
            words.append("depthwise")
        return self._matches(words) or self._within > 0

    def _matches(self, words: list[str]) -> bool:
        met = {p for p in self.patterns if any(fnmatchcase(word, p) for word in words)}
        self._idle -= met
        return bool(met)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._depth == 0 and module is not self._root:
            self._root, self._names = module, {id(m): name for name, m in module.named_modules()}
        self._depth += 1
        self._within += self._met(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        self._within -= self._met(module)

    def _met(self, module: nn.Module) -> bool:
        name = self._names.get(id(module), "")
        return bool(name) and self._matches([name])


def _depthwise(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    place = 7 if "transpose" in operation else 6
    groups = kwargs.get("groups", args[place] if len(args) > place else 1)
    x = kwargs.get("input", args[0] if args else None)
    return bool(groups > 1 and x is not None and x.dim() > 2 and groups == x.shape[1])
