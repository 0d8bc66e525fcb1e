"""The adapter of one module: bases A and B, and one R for each adapter.

Attached to the module that it adapts, as its submodule `lora_xs` and as a forward hook. The module keeps
its class, its weight, its name in the state dict and its own forward (quantised ones included); the hook
adds the update:

    h = W x + (α/r)·B R A x        (arXiv 2405.17604, equation 1)

A and B are frozen, so the backward pass needs of this only z = A x, r numbers a row. LoRA trains A and must
keep x.

Where a weight is read by its parent's forward and its module never called (`XSWeight`), that forward finds
W + (α/r)·B R A in the weight's place while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LoRAXSConfig
from .errors import LoRAXSError
from .kinds import LINEAR, Kind

ATTRIBUTE = "lora_xs"
MOST_STATES = 16
"""Adapters in use, of so many different forward passes, that are remembered for those that checkpointing repeats."""


class XSMatrices(nn.ParameterDict):
    """R of each adapter by its name. `.to(bfloat16)` of the model leaves them in float32, where small steps count."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XSMatrices:
        return super()._apply(in_float32(fn), recurse)


def in_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves tensors as `fn` does, and makes none coarser than float32."""

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        lowered = torch.promote_types(moved.dtype, torch.float32) != moved.dtype
        # What became too coarse is taken from before, to where the rest went.
        return tensor.to(moved.device, torch.float32) if lowered else moved

    return keep


class XSLayer(nn.Module):
    """Bases and R of a Linear or Conv1D module; the other kinds override how A and B are applied."""

    # What follows is a layer's own from its first forward pass on; a model that was pickled whole by an earlier version
    # has none of it.
    trained_before: frozenset[str] = frozenset()
    """Names of what the model trained before it was adapted; of the model's first layer."""
    watched: frozenset[str] = frozenset()
    """Adapters whose first backward pass is looked at; of the model's first layer."""
    answered: Mapping[tuple[Any, ...], None] = MappingProxyType({})
    """The adapters in use in forward passes since the last one that was repeated."""
    repeated = True
    """Whether a forward pass was repeated since: ``answered`` then begins anew."""

    def __init__(
        self,
        name: str,
        A: Tensor,
        B: Tensor,
        config: LoRAXSConfig,
        *,
        regenerable: bool,
        kind: Kind = LINEAR,
        parameter: str = "weight",
    ) -> None:
        """
        Args:
            name: the adapted module's (or parameter's) name in its model.
            A: (r×in), or (n×r×in) of a stack
            B: (out×r), or (n×out×r) of a stack
            config: of the adapter that the bases were made for.
            regenerable: whether A and B follow from W and the configuration alone, so that files may omit them.
            kind: how the weight stores W.
            parameter: the weight's name in its module.
        """
        super().__init__()
        self.name = name
        self.kind = kind
        self.parameter = parameter
        self.called = False  # whether a forward pass has come here yet
        self.bases_config = config
        self.regenerable = regenerable and not config.train_bases
        # Parameters, not buffers: DDP would broadcast buffers in every step, and FSDP would not shard them.
        self.A = nn.Parameter(A, requires_grad=config.train_bases)
        self.B = nn.Parameter(B, requires_grad=config.train_bases)
        self.R = XSMatrices()  # adapter name → (r×r), or (n×r×r)
        self.configs: dict[str, LoRAXSConfig] = {}
        self.active: str | None = None
        self.rows: tuple[str | None, ...] | None = None
        self.merged: str | None = None
        self.original: list[nn.Parameter] = []  # the weight before merging; in a list, so that it is no parameter

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def r_shape(self) -> tuple[int, ...]:
        """(r, r), or (n, r, r) of a stack."""
        return (*self.A.shape[:-2], self.rank, self.rank)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XSLayer:
        before = self.A.dtype
        super()._apply(fn, recurse)
        self.original = [_moved(weight, fn) for weight in self.original]
        if self.A.dtype != before:  # the weights were rounded too: their own bases would be others
            self.regenerable = False
        return self

    def add(self, name: str, config: LoRAXSConfig, R: Tensor) -> None:
        """Store R (r×r) as adapter `name`. In float32 at least: steps of 1e-4 vanish in bf16."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        self.R[name] = nn.Parameter(R.to(device=self.A.device, dtype=dtype), requires_grad=False)
        self.configs[name] = config

    def activate(self, name: str | None) -> None:
        """Use adapter `name` (None: none), and train it alone."""
        self.active = name
        for key, R in self.R.items():
            R.requires_grad_(key == name)

    def delta(self, name: str) -> Tensor:
        """(α/r)·B R A (out×in, or n×out×in), multiplied in float32 at least."""
        R = self.R[name].detach()
        return (self.B.detach().to(R.dtype) @ (R * self.scale(name))) @ self.A.detach().to(R.dtype)

    def scale(self, name: str) -> float:
        """α/r of adapter `name`."""
        return self.configs[name].scale_of(self.name)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        """The forward hook: W x + b → W x + b + (α/r)·B R A x."""
        self.seen()
        if self.merged is not None or (self.active is None and self.rows is None):
            return None  # the output stays as it is
        x = args[0] if args else next(iter(kwargs.values()))
        z = self.project(module, x)
        z = F.dropout(z, self.dropout, self.training)
        if self.rows is None:
            assert self.active is not None
            u = self.mix(z, self.scaled(self.active).to(z.dtype))
        else:
            u = self.mix_rows(z, self.row_matrices(z))
        return self.expand(out, u)

    def seen(self) -> None:
        """Note a forward pass. One within a backward pass repeats it, by checkpointing, and must find what it found."""
        now = (self.merged, self.active, self.rows)
        self.called = self.called or now != (None, None, None)
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1 or not self.answered:
            states = {} if self.repeated else dict(self.answered)
            states[now] = None
            while len(states) > MOST_STATES:  # of a model that is only asked, with other rows each time
                del states[next(iter(states))]
            self.answered, self.repeated = states, False
            return
        self.repeated = True
        if now not in self.answered:
            raise LoRAXSError(
                f"{self.name} is checkpointed, and other adapters are in use in the backward pass than in the forward "
                "pass: run it before set_active, and inside of rows and disable"
            )

    @property
    def dropout(self) -> float:
        """Of the adapters in use, which must agree on it while they are trained."""
        used = {self.configs[name].dropout for name in self.rows or (self.active,) if name is not None}
        if self.training and len(used) > 1:
            raise LoRAXSError(f"the adapters of one batch have different dropouts: {sorted(used)}")
        return max(used, default=0.0)

    def scaled(self, name: str | None) -> Tensor:
        """(α/r)·R of an adapter; zeros for None."""
        if name is None:
            return torch.zeros(self.r_shape, device=self.A.device)
        return self.R[name] * self.scale(name)

    def row_matrices(self, z: Tensor) -> Tensor:
        """(α/r)·R of the adapter of each row of the batch: (rows×r×r)."""
        assert self.rows is not None
        if z.shape[0] != len(self.rows):
            raise LoRAXSError(f"{self.name} got {z.shape[0]} rows, but adapters were given for {len(self.rows)} rows")
        distinct = {name: self.scaled(name).to(z.dtype) for name in self.rows}
        return torch.stack([distinct[name] for name in self.rows])

    def project(self, module: nn.Module, x: Tensor) -> Tensor:
        """z = A x: (…×in) → (…×r)"""
        return F.linear(x, self.A.to(x.dtype))

    def mix(self, z: Tensor, R: Tensor) -> Tensor:
        """u = R z: (…×r) → (…×r)"""
        return F.linear(z, R)

    def mix_rows(self, z: Tensor, R: Tensor) -> Tensor:
        """u = R z with R (rows×r×r): (rows×…×r) → (rows×…×r)"""
        return torch.bmm(z.reshape(z.shape[0], -1, self.rank), R.mT).reshape(z.shape)

    def expand(self, out: Tensor, u: Tensor) -> Tensor:
        """out + B u: (…×out), (…×r) → (…×out)"""
        B = self.B.to(u.dtype)
        # An Embedding under autocast (float32 out, bf16 u), or the nested tensor that nn.TransformerEncoder makes of a
        # padded batch when it evaluates.
        if out.dtype != u.dtype or out.is_nested:
            return out + F.linear(u, B).to(out.dtype)
        # One pass over `out` in the product itself, instead of a product, a scaling and a sum.
        return torch.addmm(out.reshape(-1, out.shape[-1]), u.reshape(-1, self.rank), B.t()).view(out.shape)

    def extra_repr(self) -> str:
        return f"r={self.rank}, adapters={list(self.R)}, active={self.active!r}"


def _moved(weight: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """The weight that a merged one will give its place back to; the same object, which other modules may share."""
    with torch.no_grad():
        moved = fn(weight)
    if moved.is_meta != weight.is_meta:
        return nn.Parameter(moved, requires_grad=weight.requires_grad)
    weight.data = moved
    return weight


class XSEmbedding(XSLayer):
    """W (width×vocabulary) is the transposed weight, x a one-hot column: z = A x is a column of A."""

    def project(self, module: nn.Module, x: Tensor) -> Tensor:
        columns = self.A.index_select(1, x.flatten())  # r×tokens; A stays contiguous, as FSDP wants it
        return columns.t().reshape(*x.shape, self.rank)


class XSConv2d(XSLayer):
    """W (out×in·kh·kw) is the flattened weight: A is a convolution to r channels, R and B are 1×1
    convolutions."""

    def project(self, module: nn.Module, x: Tensor) -> Tensor:
        """(N×in×H×W) → (N×r×H'×W'), with the module's stride, padding and dilation."""
        assert isinstance(module, nn.Conv2d)
        kernel = self.A.to(x.dtype).view(self.rank, *module.weight.shape[1:])
        return module._conv_forward(x, kernel, None)

    def mix(self, z: Tensor, R: Tensor) -> Tensor:
        return F.conv2d(z, R[:, :, None, None])

    def mix_rows(self, z: Tensor, R: Tensor) -> Tensor:
        return torch.bmm(R, z.flatten(2)).view(z.shape)

    def expand(self, out: Tensor, u: Tensor) -> Tensor:
        return out + F.conv2d(u, self.B.to(u.dtype)[:, :, None, None]).to(out.dtype)


class XSWeight(XSLayer):
    """The adapter of a weight that a forward reads: two hooks on the reader put W + (α/r)·B R A in its place.

    The sum has the weight's type, as a merged weight would. It is a tensor of the weight's size, which lives until the
    backward pass has used it.
    """

    def attach(self, module: nn.Module, reader: nn.Module) -> None:
        """Hook `reader`, whose forward reads the weight of `module`."""
        self.holder = [module]  # in a list: it holds this adapter as a submodule, not the other way round
        reader.register_forward_pre_hook(self.enter)
        reader.register_forward_hook(self.leave, always_call=True)

    def enter(self, reader: nn.Module, args: tuple[Any, ...]) -> None:
        """The forward pre-hook. An attribute goes before a parameter of the same name; the parameter stays."""
        self.seen()
        if self.merged is not None or self.active is None:
            return
        (module,) = self.holder
        object.__setattr__(module, self.parameter, self.adapted(module.get_parameter(self.parameter)))

    def leave(self, reader: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """The forward hook, called after an exception too."""
        (module,) = self.holder
        if self.parameter in module.__dict__:
            object.__delattr__(module, self.parameter)

    def adapted(self, weight: Tensor) -> Tensor:
        """W + (α/r)·B R A in the weight's layout and type."""
        assert self.active is not None
        R = self.scaled(self.active)
        BR = (self.B.to(R.dtype) @ R).to(weight.dtype)  # out×r
        W, A = self.kind.to_matrix(weight), self.A.to(weight.dtype)
        total = torch.addmm(W, BR, A) if W.ndim == 2 else torch.baddbmm(W, BR, A)
        return self.kind.from_matrix(total, weight.shape)


class XSWeights(nn.ModuleDict):
    """The adapters of one module's weights, by the parameter's name."""


def layers_of(module: nn.Module) -> list[XSLayer]:
    """The module's adapters: one that adds to its answer, or one for each adapted weight."""
    found = module._modules.get(ATTRIBUTE)
    if isinstance(found, XSLayer):
        return [found]
    return [layer for layer in found.values() if isinstance(layer, XSLayer)] if isinstance(found, XSWeights) else []


def is_adapted(model: nn.Module) -> bool:
    """Whether any module has adapters."""
    return any(layers_of(module) for module in model.modules())


def layers(model: nn.Module) -> list[tuple[nn.Module, XSLayer]]:
    """Every adapter with the module that holds its weight, in the model's order."""
    pairs = [(module, layer) for module in model.modules() for layer in layers_of(module)]
    if not pairs:
        raise LoRAXSError("the model has no LoRA-XS adapters; call inject or load_adapter first")
    return pairs
