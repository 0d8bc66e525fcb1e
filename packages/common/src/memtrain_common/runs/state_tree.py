"""Any training state as JSON plus named tensors, and back: what safetensors can hold, and nothing that is executed.

``encode`` turns nested dicts, lists, tuples, numbers, strings and tensors into a JSON-able tree in which a tensor is
``{"__tensor__": name}``. Tensors that are the same memory (a tied weight) are stored once under one name; views that
overlap are stored each with its values. A quantised tensor of torchao is taken apart into its plain tensors, and only
a class in ``PARTED`` is put together again.
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
STORED = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64,
    torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64,
}  # fmt: skip
"""What safetensors writes and reads."""
PAIRED = {torch.complex128, torch.complex32}
"""What it does not, and what is stored as pairs of real numbers."""
_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def encode(state: Any) -> tuple[Json, dict[str, Tensor]]:
    """-> (tree, tensors by name), on the CPU and contiguous, no two in the same memory. A collective call where tensors
    are sharded.

    Raises:
        TypeError: naming the path of a value that is none of the above.
    """
    encoder = _Encoder(copying=True)
    return encoder.encode(state, ""), encoder.tensors


def check(state: Any) -> None:
    """Raise what :func:`encode` would raise, without gathering or copying anything: at the start of a run."""
    _Encoder(copying=False).encode(state, "")


def decode(tree: Json, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`encode`."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if isinstance(tree, dict):
        if "__tensor__" in tree:
            return tensors[tree["__tensor__"]]
        if "__complex__" in tree:
            return torch.view_as_complex(tensors[tree["__complex__"]])
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


class _Encoder:
    """One state on its way into a file."""

    def __init__(self, *, copying: bool) -> None:
        """``copying``: False looks at types only."""
        self.tensors: dict[str, Tensor] = {}
        self._copying = copying
        self._names: dict[tuple[Any, ...], str] = {}  # identity of a tensor's memory -> its name
        self._memory: set[int] = set()  # storages of what is in ``tensors``

    def encode(self, value: Any, path: str) -> Json:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):  # JSON has no infinities and no NaN
            return value if value - value == 0 else {"__float__": repr(value)}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, dict):
            if all(isinstance(k, str) and not k.startswith("__") for k in value):
                return {k: self.encode(v, f"{path}.{k}") for k, v in value.items()}
            return {"__dict__": [[self.encode(k, path), self.encode(v, f"{path}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            items = [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"__tuple__": items}
        raise TypeError(f"{_cannot(path)}, which is a {type(value).__name__}")

    def _tensor(self, value: Tensor, path: str) -> Json:
        wrapped = is_traceable_wrapper_subclass(value)
        if type(value).__name__ in PARTED:
            return self._part(value, path)
        if wrapped and not hasattr(value, "full_tensor"):  # a DTensor has it; a quantised tensor is not one tensor
            raise TypeError(f"{_cannot(path)}, which is a {type(value).__name__}")
        if value.layout != torch.strided or value.device.type == "meta":
            kind = "is on the device meta and has no values" if value.device.type == "meta" else f"is {value.layout}"
            raise TypeError(f"{_cannot(path)}, which {kind}: make it a plain dense tensor")
        if value.dtype not in STORED and value.dtype not in PAIRED:
            raise TypeError(f"{_cannot(path)}, which is of {value.dtype}: safetensors has no such numbers")
        tag = "__complex__" if value.dtype in PAIRED else "__tensor__"
        alone = wrapped or value.numel() == 0
        # a conjugate view has the memory, shape and strides of what it is a view of, and other values
        memory = () if alone else (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        identity = (path,) if alone else (*memory, value.is_conj(), value.is_neg())
        if identity not in self._names:
            self._names[identity] = path.lstrip(".")
            if self._copying:
                self.tensors[self._names[identity]] = self._whole(value)
        return {tag: self._names[identity]}

    def _part(self, value: Any, path: str) -> Json:
        """A quantised tensor as its parts and what else its class needs: flags, sizes and the dtype that it shows."""
        attributes, context = value.__tensor_flatten__()
        parts = {a: self.encode(getattr(value, a), f"{path}.{a}") for a in attributes}
        plain = [{"__dtype__": str(c)} if isinstance(c, torch.dtype) else self.encode(c, path) for c in context]
        return {"__parts__": parts, "class": type(value).__name__, "context": plain}

    def _whole(self, value: Tensor) -> Tensor:
        full = value.full_tensor() if hasattr(value, "full_tensor") else value  # a DTensor: gathered from all ranks
        # safetensors writes memory as it lies there, and a lazy conjugate or negative is only a flag on it
        plain = full.detach().resolve_conj().resolve_neg().to("cpu", copy=False).contiguous()
        if plain.dtype in PAIRED:
            plain = torch.view_as_real(plain)
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in self._memory:  # safetensors refuses views
            plain = plain.clone()
        self._memory.add(plain.untyped_storage().data_ptr())
        return plain


def _cannot(path: str) -> str:
    return f"a checkpoint cannot hold {path.lstrip('.') or 'the state'}"


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
