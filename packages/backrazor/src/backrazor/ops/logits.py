"""Logits that are not computed until somebody looks at them: most often it is the loss, which needs no more than x.

A linear layer with many outputs gives a :class:`Logits`, a tensor that has a shape, a type and a place in the graph,
and no elements. Casts, slices, views and transpositions of rows give another one, over the same of x. If it goes into
``F.cross_entropy``, one operation (:mod:`.loss`) takes the place of both, and the logits never exist as a whole. Any
other use of it computes them, once, and goes on with the ordinary tensor: used both ways, both are right.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import RazorError
from ..function import Function
from ..internals import UNCOUNTED, before_checkpoints, is_of_checkpoint, saved_tensor_hook
from .loss import loss_of, product_type

LEAST_CLASSES = 8192
WIDER = 3
"""A layer is taken for a head where it has at least 8,192 outputs, and more than three times its inputs."""

_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cpu", "is_cuda", "is_meta",
    "is_mps", "is_mkldnn", "is_nested", "is_quantized", "is_sparse", "is_xla", "is_xpu", "itemsize", "nbytes",
    "output_nr",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "element_size", "get_device", "storage_offset", "__len__",
)  # fmt: skip
ASKED = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)),
        *(getattr(Tensor, name) for name in _METHODS),
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
    }
)
"""Questions that need no elements."""
OBSERVED = frozenset({Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_, *UNCOUNTED})
_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "mod")
)


@dataclass(frozen=True, eq=False)
class Layer:
    """The linear layer that a family of logits comes from."""

    weight: Tensor
    bias: Tensor | None
    product: torch.dtype
    """Of its output."""
    autocast: tuple[bool, torch.dtype]
    pruned: Callable[..., Tensor]
    """What computes its output within a Razor."""


class Logits(Tensor):
    """The output of a linear layer, not computed yet: (…, V), or (N, V, T) where ``moved``."""

    layer: Layer
    x: Tensor
    """(…, K), as if the layer had been given no other rows."""
    logits: torch.dtype
    moved: bool
    origin: "tuple[Logits, Any, Any, Any] | None"
    """What this one was derived from, and by which call."""
    derived: list[Any]
    versions: tuple[int, int]
    graph: Tensor | None
    graph_version: int
    elements: Tensor | None
    touched: bool
    checkpoint: Any
    """The hook of the checkpoint within which this one was made."""

    @staticmethod
    def of(x: Tensor, weight: Tensor, bias: Tensor | None, pruned: Callable[..., Tensor]) -> "Logits":
        """What ``F.linear(x, weight, bias)`` would give; ``pruned`` computes it within a Razor."""
        kind = x.device.type
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        product = product_type(x)
        return _made(x, Layer(weight, bias, product, autocast, pruned), product, False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return answer(func, args, kwargs or {}, None)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """For what reaches this tensor past Python, such as a compiled extension: the graph is this tensor's own."""
        with torch.no_grad():
            args, kwargs = tree_map_only(Logits, lambda t: t.dense(within=False), (args, kwargs or {}))
        return func(*args, **kwargs)

    def fresh(self) -> bool:
        """Whether nobody has changed or watched the elements, so that the loss may be computed from x."""
        return not self.touched and (self.graph is None or self.graph._version == self.graph_version)

    def unchanged(self) -> bool:
        """Whether x and W are what they were."""
        return (self.x._version, self.layer.weight._version) == self.versions

    def lasts(self) -> bool:
        """Whether each run of a checkpoint that is open gets this one: of what was made in another checkpoint around
        it, later runs get the elements."""
        hook = saved_tensor_hook() if self.checkpoint is not None else None
        return hook is self.checkpoint or not is_of_checkpoint(hook)

    def dense(self, *, within: bool) -> Tensor:
        """The elements, computed once.

        Args:
            within: an open Razor: x is pruned for dW, as of any linear layer.
        """
        if self.graph is not None:
            return self.graph
        if not torch.is_grad_enabled():
            if self.elements is None:
                self.elements = self._computed(False)
            return self.elements
        with before_checkpoints(self.checkpoint):  # each of whose runs finds the elements, and none makes them
            self.graph = self._computed(within)
        self.graph_version = self.graph._version
        return self.graph

    def _computed(self, within: bool) -> Tensor:
        if self.origin is not None:
            parent, func, args, kwargs = self.origin
            made: Tensor = func(parent.dense(within=within), *args, **kwargs)
            return made
        if not self.unchanged():
            raise RazorError(
                "the input or the weight of a large linear layer was changed in place before its output was used: "
                "change them after the loss, or use the output first"
            )
        enabled, dtype = self.layer.autocast
        with torch.autocast(self.x.device.type, dtype, enabled=enabled):
            call = self.layer.pruned if within else F.linear
            return call(self.x, self.layer.weight, self.layer.bias)

    def touch(self, *, within: bool) -> Tensor:
        """The elements, about to be changed or watched: all that was derived before is computed before."""
        family = self
        while family.origin is not None:
            family = family.origin[0]
        with torch.enable_grad():
            family._settle(within)
        assert self.graph is not None
        return self.graph

    def _settle(self, within: bool) -> None:
        self.dense(within=within)
        self.touched = True
        for reference in self.derived:
            child = reference()
            if child is not None:
                child._settle(within)


class _NotComputed(Function):
    """Logits as a node: what reaches them past Python finds its way back to x, W and b, exactly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, logits: torch.dtype, moved: bool) -> Tensor:
        ctx.moved, ctx.like = moved, (x.dtype, weight.dtype, bias.dtype if bias is not None else None)
        ctx.save_for_backward(x, weight)
        shape = (*x.shape[:-1], len(weight)) if not moved else (x.shape[0], len(weight), x.shape[1])
        empty: Tensor = torch.Tensor._make_wrapper_subclass(Logits, shape, dtype=logits, device=x.device)
        return empty

    @staticmethod
    def grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = (g.transpose(1, 2) if ctx.moved else g).reshape(-1, len(weight))
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = (g.to(weight.dtype) @ weight).view(x.shape) if needs_x else None
        dweight = g.T @ x.reshape(-1, x.shape[-1]).to(g.dtype) if needs_weight else None
        grads = (dx, dweight, g.sum(0) if needs_bias else None)
        return *(t.to(d) if t is not None else None for t, d in zip(grads, ctx.like, strict=True)), None, None


def _made(x: Tensor, layer: Layer, logits: torch.dtype, moved: bool, origin: Any = None) -> Logits:
    out: Logits = _NotComputed.apply(x, layer.weight, layer.bias, logits, moved)
    out.x, out.layer, out.logits, out.moved, out.origin = x, layer, logits, moved, origin
    out.versions = (x._version, layer.weight._version)
    hook = saved_tensor_hook()
    out.checkpoint = hook if is_of_checkpoint(hook) else None
    out.elements = out.graph = None
    out.graph_version, out.touched, out.derived = 0, False, []
    return out


def is_head(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer is so wide that its output is likely to be logits."""
    classes, width = weight.shape
    needed = x.requires_grad or weight.requires_grad
    return needed and classes >= LEAST_CLASSES and classes > WIDER * width and x.dim() >= 2


def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], again: Callable[..., Any] | None) -> Any:
    """A call with :class:`Logits` among its arguments.

    Args:
        again: a Razor's answer to the call once the elements are there; None outside of one.
    """
    if func in ASKED:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    first = args[0] if args else None
    if isinstance(first, Logits) and torch.is_grad_enabled() and first.fresh() and first.unchanged() and first.lasts():
        if func is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not NotImplemented:
                return loss
        elif func in ROWS:
            seen = ROWS[func](first, *args[1:], **kwargs)
            if seen is not None:
                seen.origin = (first, func, args[1:], kwargs)
                first.derived.append(weakref.ref(seen))
                return seen
    name = getattr(func, "__name__", "")
    changes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name in _IN_PLACE
    within = again is not None

    def dense(logits: Logits) -> Tensor:
        return logits.touch(within=within) if changes or func in OBSERVED else logits.dense(within=within)

    args, kwargs = tree_map_only(Logits, dense, (args, kwargs))
    return func(*args, **kwargs) if again is None else again(func, (), args, kwargs)


def _cross_entropy(
    input: Logits,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``F.cross_entropy`` of classes; with weights of classes or probabilities as targets the logits are computed."""
    settings: dict[str, Any] = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    plain = weight is None and size_average is None and reduce is None and not isinstance(target, Logits)
    if not plain or input.x.dim() != (3 if input.moved else 2):
        return NotImplemented
    layer = input.layer
    return loss_of(input.x, layer.weight, layer.bias, layer.product, input.logits, target, **settings)


def _seen(logits: Logits, x: Tensor, dtype: torch.dtype | None = None, *, moved: bool = False) -> Logits:
    return _made(x, logits.layer, dtype or logits.logits, moved)


def _as_type(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(logits: Logits, *args: Any, **kwargs: Any) -> Logits | None:
        wide = torch.promote_types(dtype, logits.logits) == dtype
        return None if args or kwargs or not wide else _seen(logits, logits.x, dtype, moved=logits.moved)

    return cast


def _to(logits: Logits, *args: Any, **kwargs: Any) -> Logits | None:
    if kwargs or len(args) != 1:
        return None
    (to,) = args
    if isinstance(to, torch.dtype):
        return _as_type(to)(logits)
    same = isinstance(to, str | torch.device) and torch.device(to) == logits.x.device
    return _seen(logits, logits.x, moved=logits.moved) if same else None


def _contiguous(logits: Logits, *args: Any, **kwargs: Any) -> Logits | None:
    return None if args or kwargs else _seen(logits, logits.x, moved=logits.moved)


def _view(logits: Logits, *shape: Any, **kwargs: Any) -> Logits | None:
    sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple) else list(shape)
    if kwargs or logits.moved or not sizes or not all(isinstance(s, int) for s in sizes):
        return None
    classes, width = logits.layer.weight.shape
    rest = 1
    for size in sizes[:-1]:
        rest *= size
    rows = logits.x.numel() // width
    if sizes[-1] != classes and not (sizes[-1] == -1 and rest == rows):
        return None
    if -1 not in sizes[:-1] and rest != rows:
        return None  # which PyTorch refuses in its own words
    return _seen(logits, logits.x.reshape(*sizes[:-1], width))


def _flatten(logits: Logits, start_dim: int = 0, end_dim: int = -1) -> Logits | None:
    last = logits.x.dim() - 1
    if logits.moved or not 0 <= start_dim <= end_dim < last:
        return None
    return _seen(logits, logits.x.flatten(start_dim, end_dim))


def _item(logits: Logits, index: Any) -> Logits | None:
    """Rows by slices, numbers, tensors of places or a mask; the classes stay whole."""
    parts = index if isinstance(index, tuple) else (index,)
    masks = [isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8) for p in parts]
    known = all(p is Ellipsis or (isinstance(p, slice | int | Tensor) and not isinstance(p, bool)) for p in parts)
    if logits.moved or not known or not parts or any(masks[1:]):
        return None
    cut = any(p is Ellipsis for p in parts)
    taken = sum(p.dim() if mask else p is not Ellipsis for p, mask in zip(parts, masks, strict=True))
    names_classes = parts[-1] is not Ellipsis if cut else taken == logits.x.dim()
    if names_classes and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        return None
    x = logits.x[index]
    return _seen(logits, x) if x.dim() >= 2 and x.numel() else None


def _transpose(logits: Logits, dim0: Any, dim1: Any) -> Logits | None:
    if logits.x.dim() != 3 or not isinstance(dim0, int) or not isinstance(dim1, int):
        return None
    return _seen(logits, logits.x, moved=not logits.moved) if {dim0 % 3, dim1 % 3} == {1, 2} else None


def _permute(logits: Logits, *dims: Any) -> Logits | None:
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    return _transpose(logits, 1, 2) if order in ((0, 2, 1), (0, -1, 1)) else None


ROWS: dict[Any, Callable[..., Logits | None]] = {
    Tensor.float: _as_type(torch.float32),
    Tensor.double: _as_type(torch.float64),
    Tensor.to: _to,
    Tensor.contiguous: _contiguous,
    Tensor.view: _view,
    Tensor.reshape: _view,
    torch.reshape: _view,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.__getitem__: _item,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.permute: _permute,
    torch.permute: _permute,
    Tensor.mT.__get__: lambda logits: _transpose(logits, 1, 2),  # type: ignore[attr-defined]
}
"""What changes the rows of logits as it changes the rows of x."""
