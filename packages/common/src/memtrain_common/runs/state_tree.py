"""Any training state as JSON plus named tensors, and back: what safetensors can hold, and nothing that is executed.

``encode`` turns nested dicts, lists, tuples, numbers, strings and tensors into a JSON-able tree in which a tensor is
``{"__tensor__": name}``. Tensors that are the same memory (a tied weight) are stored once under one name. A quantised
tensor of torchao is taken apart into its plain tensors, and only a class in ``PARTED`` is put together again.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Json = Any  # what json.dumps takes

# Tensor subclasses that are saved as their parts: class -> its module. The state of torchao's optimizers.
PARTED = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def encode(state: Any) -> tuple[Json, dict[str, Tensor]]:
    """-> (tree, tensors by name), on the CPU and contiguous. A collective call where tensors are sharded.

    Raises:
        TypeError: naming the path of a value that is none of the above.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}  # identity of a tensor's memory -> its name
    tree = _encode(state, "", tensors, names)
    return tree, tensors


def decode(tree: Json, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`encode`."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if isinstance(tree, dict):
        if "__tensor__" in tree:
            return tensors[tree["__tensor__"]]
        if "__tuple__" in tree:
            return tuple(decode(item, tensors) for item in tree["__tuple__"])
        if "__dict__" in tree:  # a dict whose keys are not strings: an optimizer's state is keyed by integers
            return {decode(k, tensors): decode(v, tensors) for k, v in tree["__dict__"]}
        if "__float__" in tree:
            return float(tree["__float__"])
        if "__parts__" in tree:
            return _join(tree, tensors)
        return {k: decode(v, tensors) for k, v in tree.items()}
    return tree


def _encode(value: Any, path: str, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> Json:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):  # JSON has no infinities and no NaN
        return value if value - value == 0 else {"__float__": repr(value)}
    if isinstance(value, Tensor):
        wrapped = is_traceable_wrapper_subclass(value)
        if type(value).__name__ in PARTED:
            return _part(value, path, tensors, names)
        if wrapped and not hasattr(value, "full_tensor"):  # a DTensor has it; a quantised tensor is not one tensor
            raise TypeError(f"a checkpoint cannot hold {path.lstrip('.')}, which is a {type(value).__name__}")
        alone = wrapped or value.numel() == 0
        identity = (path,) if alone else (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if identity not in names:
            names[identity] = path.lstrip(".")
            tensors[names[identity]] = _whole(value)
        return {"__tensor__": names[identity]}
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("__") for k in value):
            return {k: _encode(v, f"{path}.{k}", tensors, names) for k, v in value.items()}
        pairs = [
            [_encode(k, path, tensors, names), _encode(v, f"{path}.{k}", tensors, names)] for k, v in value.items()
        ]
        return {"__dict__": pairs}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}.{i}", tensors, names) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    raise TypeError(f"a checkpoint cannot hold {path.lstrip('.') or 'the state'}, which is a {type(value).__name__}")


def _part(value: Any, path: str, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> Json:
    """A quantised tensor as its parts and what else its class needs: flags, sizes and the dtype that it shows."""
    attributes, context = value.__tensor_flatten__()
    parts = {a: _encode(getattr(value, a), f"{path}.{a}", tensors, names) for a in attributes}
    plain = [{"__dtype__": str(c)} if isinstance(c, torch.dtype) else _encode(c, path, tensors, names) for c in context]
    return {"__parts__": parts, "class": type(value).__name__, "context": plain}


def _join(tree: Json, tensors: dict[str, Tensor]) -> Tensor:
    name = tree["class"]
    if name not in PARTED:
        raise ValueError(f"a checkpoint may hold {', '.join(PARTED)}, not {name}")
    cls = getattr(import_module(PARTED[name]), name)
    context = [
        _DTYPES[c["__dtype__"]] if isinstance(c, dict) and "__dtype__" in c else decode(c, tensors)
        for c in tree["context"]
    ]
    return cls.__tensor_unflatten__({a: decode(t, tensors) for a, t in tree["__parts__"].items()}, context)


def _whole(value: Tensor) -> Tensor:
    full = value.full_tensor() if hasattr(value, "full_tensor") else value  # a DTensor: gathered from all ranks
    return full.detach().to("cpu", copy=False).contiguous()


def shard_like(value: Any, like: Any) -> Any:
    """Give the tensors of ``value`` the sharding of those at the same place in ``like`` (FSDP2's DTensors)."""
    if isinstance(value, Tensor) and hasattr(like, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    if isinstance(value, dict) and isinstance(like, dict):
        return {k: shard_like(v, like.get(k)) for k, v in value.items()}
    return value


def same_shapes(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference in names or shapes between two flat state dicts, in words; None if there is none."""
    for name in now:
        if name not in saved:
            return f"it has no {name}"
        if isinstance(now[name], torch.Tensor) and saved[name].shape != now[name].shape:
            return f"its {name} is {tuple(saved[name].shape)}, not {tuple(now[name].shape)}"
    for name in saved:
        if name not in now:
            return f"it has {name}, which this model lacks"
    return None
