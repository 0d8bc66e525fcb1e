"""Operations on fake tensors, remembered.

What an operation gives for fake tensors follows from the shapes, strides, types and devices that it gets. torch's own
cache of it takes most of a fake step's time. Here an operation of ATen that was seen once is told by a tuple, and its
outputs are made again as they were: new tensors, views of the first argument, or that argument itself.
Whatever is not one of these (an output that shares memory in a way that the operation's schema does not tell, a
subclass, a complex or sparse tensor, a tensor whose number is known) goes torch's way, always. Tried with torch 2.11 to
2.15; a test compares every output with torch's own.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_MOST = 50_000
"""Operations remembered; then all are forgotten."""
_RESIZING = frozenset({"set_", "resize_", "resize_as_", "set_data"})
_layout = Tensor.layout.__get__  # type: ignore[attr-defined]  # FakeTensor's own asks twice
_missing = object()

_known: dict[Any, Any] = {}
"""What an operation was asked -> None (torch finds it), or how its outputs are made."""


def run(mode: FakeTensorMode, func: Any, args: Any, kwargs: Any) -> Any:
    """The operation, by torch or by what is remembered of it."""
    if func.namespace != "aten":
        return func(*args, **kwargs)
    key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    try:
        plain = _describe(args, key) and (not kwargs or _describe(kwargs.items(), key))
        asked = tuple(key)
        made = _known.get(asked, _missing) if plain else None
    except TypeError:  # an argument that cannot be hashed
        plain, made = False, None
    if made is None:
        return func(*args, **kwargs)
    if made is not _missing:
        return _make(mode, made, args)
    first = args[0] if args else None
    before = _metadata(first) if type(first) is FakeTensor else None
    result = func(*args, **kwargs)
    if len(_known) >= _MOST:
        _known.clear()
    _known[asked] = _seen(func, args, kwargs, before, result)
    return result


def _describe(values: Any, key: list[Any]) -> bool:
    """Append what decides the outputs; -> False if a value is of a kind that torch must see."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if not _is_plain(value):
                return False
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif kind is list or kind is tuple:
            key.append(len(value))
            if not _describe(value, key):
                return False
        elif isinstance(value, Tensor):
            return False
        elif kind is torch.Generator:  # what it draws is no number of a fake tensor
            key.append(kind)
        else:
            key += (kind, value)
    return True


def _is_plain(value: FakeTensor) -> bool:
    return (
        value.constant is None
        and getattr(value, "dispatch_keys", None) is None  # torch 2.15: of a tensor in oneDNN's layout
        and not value.dtype.is_complex
        and _layout(value) is torch.strided
    )


def _metadata(value: FakeTensor) -> tuple[Any, ...]:
    storage = value.untyped_storage()
    return value.shape, value.stride(), value.storage_offset(), storage._cdata, storage.nbytes()


_SELF, _NEW, _VIEW, _NONE = range(4)


def _seen(func: Any, args: Any, kwargs: Any, before: Any, result: Any) -> Any:
    """How the outputs are made again; None if torch must."""
    schema = func._schema
    if func.overloadpacket.__name__ in _RESIZING:
        return None
    if result is None:  # what it changes keeps its shape: see _RESIZING
        return (_NONE,) if schema.is_mutable else None
    if args and result is args[0]:
        return (_SELF,) if schema.is_mutable and before == _metadata(result) else None
    given = {t.untyped_storage()._cdata for t in _fakes((*args, *kwargs.values()))}
    outputs = result if type(result) in (tuple, list) else (result,)
    if schema.is_mutable and any(r.alias_info is not None for r in schema.returns):
        return None
    infos: list[Any] = []
    own: set[int] = set()
    for i, output in enumerate(outputs):
        if output is None:
            infos.append(None)
            continue
        if type(output) is not FakeTensor or not _is_plain(output) or output.requires_grad:
            return None
        shape, stride, offset, storage, n_bytes = _metadata(output)
        alias = schema.returns[min(i, len(schema.returns) - 1)].alias_info
        if alias is None and func is not torch.ops.aten._unsafe_view.default:
            if storage in given or storage in own or offset or n_bytes != _bytes(shape, stride, output.dtype):
                return None
            own.add(storage)
            infos.append((_NEW, output.fake_device, _state(output), shape, stride, output.dtype))
        else:
            first = args[0]
            if (
                type(first) is not FakeTensor
                or first.untyped_storage()._cdata != storage
                or first.dtype != output.dtype
            ):
                return None
            infos.append((_VIEW, output.fake_device, _state(output), shape, stride, offset))
    return (type(result), infos) if outputs is result else infos[0]


def _fakes(values: Any) -> list[FakeTensor]:
    found = []
    for value in values:
        if type(value) is FakeTensor:
            found.append(value)
        elif type(value) in (list, tuple):
            found += _fakes(value)
    return found


def _bytes(shape: Any, stride: Any, dtype: torch.dtype) -> int:
    """Of the smallest storage."""
    if 0 in shape:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))) * dtype.itemsize


def _make(mode: FakeTensorMode, made: Any, args: Any) -> Any:
    what = made[0]
    if what is _SELF:
        return args[0]
    if what is _NONE:
        return None
    if what is _NEW or what is _VIEW:
        return _output(mode, made, args)
    return what(None if info is None else _output(mode, info, args) for info in made[1])


def _state(output: FakeTensor) -> dict[str, Any]:
    """What a fake tensor says of itself besides its mode: it holds no tensor, and is the same for all of its kind."""
    return {name: value for name, value in vars(output).items() if name != "fake_mode"}


def _output(mode: FakeTensorMode, info: Any, args: Any) -> FakeTensor:
    what, device, state, shape, stride, last = info
    with torch._C._DisableTorchDispatch():
        if what is _NEW:
            elem = torch.empty_strided(shape, stride, dtype=last, device="meta")
        else:
            elem = torch.empty_strided((), (), dtype=args[0].dtype, device="meta")
            elem.set_(args[0].untyped_storage(), last, shape, stride)
    made = Tensor._make_subclass(FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=device)
    if mode._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
    else:
        torch._C._set_throw_on_mutable_data_ptr(made)
    vars(made).update(state, fake_mode=mode)
    return made
