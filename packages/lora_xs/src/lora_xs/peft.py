"""LoRA-XS as a method of PEFT: importing this module adds it to PEFT's registry.

    import lora_xs.peft                                                  # once, before PEFT meets the name LORA_XS
    model = peft.get_peft_model(base, lora_xs.peft.LoRAXSPeftConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained("adapter")                                     # R, and two numbers a module
    model = peft.PeftModel.from_pretrained(base, "adapter")              # the bases are made again from the weights

The equations are those of :mod:`lora_xs`. PEFT's enumeration of methods is closed, but the tables that it looks methods
up in are public and keyed by strings (tried with PEFT 0.21.2); nothing of PEFT is replaced.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter_checks import FOLLOWS_TOLERANCE, PROBE_TOLERANCE, probe
from .bases import Request, default_cache, make_bases
from .config import LoRAXSConfig
from .errors import LoRAXSError
from .kinds import CONV2D, EMBEDDING, dense, is_quantized, kind_of, matrix_of, refusal
from .layer import XSConv2d, XSEmbedding, XSLayer, XSMatrices, in_float32
from .svd import generator
from .targets import Target

PREFIX = "lora_xs_"
ONE_ADAPTER = (
    "LoRA-XS in PEFT has one adapter for a batch and no adapter_names: choose it by set_adapter, or adapt the model by "
    "lora_xs.inject, whose lora_xs.rows gives each row an adapter of its own"
)


class PeftType(enum.StrEnum):
    """What PEFT's enumeration of the same name would hold."""

    LORA_XS = "LORA_XS"


@dataclass
class LoRAXSPeftConfig(PeftConfig):
    """The configuration of LoRA-XS in PEFT, in the words of PEFT's `LoraConfig`."""

    r: int = 8
    """Rows and columns of R."""
    lora_alpha: float | None = None
    """α: the update is scaled by α/r. None means α = r."""
    target_modules: list[str] | str | None = None
    """As in `LoraConfig`: ends of names, a regular expression, or "all-linear"; None takes LoRA's for the model."""
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    """Probability of dropping an entry of A x."""
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: str = "svd"
    """"svd", or "random" (the paper's ablation)."""
    svd: str = "randomized"
    """"randomized", or "exact" (LAPACK's)."""
    r_std: float = 1e-5
    """Standard deviation of R at the start."""
    seed: int = 0
    """Of R and of random bases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PeftType.LORA_XS
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        self.at("")  # refuses what has no meaning
        if self.init == "gradient":
            raise LoRAXSError('init="gradient" needs losses, which PEFT does not pass on; use lora_xs.inject for it')

    def at(self, name: str) -> LoRAXSConfig:
        """The library's configuration of the module called `name`."""
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.lora_alpha)
        return LoRAXSConfig(
            rank,
            alpha,
            init=self.init,  # type: ignore[arg-type]
            svd=self.svd,  # type: ignore[arg-type]
            dropout=self.lora_dropout,
            r_std=self.r_std,
            seed=self.seed,
        )


class XSBuffers(BufferDict):
    """A tensor of each adapter, which `.to(bfloat16)` of the model does not round."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XSBuffers:
        super()._apply(in_float32(fn), recurse)
        return self


class XSBases(XSBuffers):
    """A or B of each adapter; a file holds them where they do not follow from the weights."""

    def __init__(self) -> None:
        super().__init__(persistent=False)
        self.stored: set[str] = set()

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=key in self.stored)

    def store(self, key: str, *, stored: bool = True) -> None:
        """Whether a file holds those of adapter `key`."""
        (self.stored.add if stored else self.stored.discard)(key)
        if key in self:
            self[key] = self[key]


class LoRAXSTunerLayer(nn.Module, BaseTunerLayer):
    """h = W x + (α/r)·B R A x around one module, with an R for each adapter."""

    adapter_layer_names = ("lora_xs_R",)
    other_param_names = ("lora_xs_probe", "r", "scaling")

    def __init__(self, base_layer: nn.Module, name: str, adapter_name: str, config: LoRAXSPeftConfig) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.name = name
        self.lora_xs_R = XSMatrices()  # adapter → (r×r)
        # Two numbers that betray other bases: saved beside R, compared when they are loaded.
        self.lora_xs_probe = XSBuffers(persistent=True)
        self.bases_A = XSBases()  # adapter → (r×in)
        self.bases_B = XSBases()  # adapter → (out×r)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.originals: list[nn.Parameter] = []
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        kind = kind_of(self.get_base_layer())
        assert kind is not None
        self.kind = kind
        self.maths = XSEmbedding if kind is EMBEDDING else XSConv2d if kind is CONV2D else XSLayer
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: LoRAXSPeftConfig) -> None:
        """Bases and R of a new adapter."""
        ours = config.at(self.name)
        base = self.get_base_layer()
        request = Request(Target(self.name, base, self.kind), ours.rank)
        ((A, B),) = make_bases([request], ours, default_cache(), None)
        for bases, made in ((self.bases_A, A), (self.bases_B, B)):
            bases.store(adapter_name, stored=False)
            bases[adapter_name] = made
        self.lora_xs_probe[adapter_name] = probe(A, B).to(A.device)
        draw = generator(ours.seed, "R", self.name)
        start = torch.randn(ours.rank, ours.rank, generator=draw, dtype=torch.float32) * ours.r_std
        dtype = torch.promote_types(A.dtype, torch.float32)
        self.lora_xs_R[adapter_name] = nn.Parameter(start.to(A.device, dtype))
        self.r[adapter_name] = ours.rank
        self.scaling[adapter_name] = ours.scale_of(self.name)
        self.dropout[adapter_name] = ours.dropout
        self.set_adapter(self.active_adapters)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """(α/r)·B R A in the layout of the weight, multiplied in float32 at least."""
        R = self.lora_xs_R[adapter_name].detach() * self.scaling[adapter_name]
        W = (self.bases_B[adapter_name].to(R.dtype) @ R) @ self.bases_A[adapter_name].to(R.dtype)
        return self.kind.from_matrix(W, self.get_base_layer().get_parameter("weight").shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W ← W + (α/r)·B R A, in a parameter of its own (one that is tied to W stays as it is): `unmerge` puts the old
        one back."""
        base = self.get_base_layer()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_xs_R:
                continue
            weight = base.get_parameter("weight")
            total = (dense(weight) + self.get_delta_weight(adapter)).to(weight.dtype)
            if safe_merge and not bool(torch.isfinite(total).all()):
                raise ValueError(f"merging {adapter!r} into {self.name} gives weights that are not finite")
            self.originals.append(weight)
            base.weight = nn.Parameter(total, requires_grad=False)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """The tensors from before `merge`."""
        if not self.merged:
            warnings.warn("no adapter is merged", UserWarning, stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.get_base_layer().weight = self.originals.pop()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + (α/r)·B R A x of the active adapters."""
        if kwargs.pop("adapter_names", None) is not None:
            raise LoRAXSError(ONE_ADAPTER)
        if self.disable_adapters and self.merged:
            self.unmerge()
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        base = self.get_base_layer()
        for adapter in self.active_adapters:
            if adapter not in self.lora_xs_R:
                continue
            bases: Any = SimpleNamespace(A=self.bases_A[adapter], B=self.bases_B[adapter], rank=self.r[adapter])
            z = self.maths.project(bases, base, x)
            z = F.dropout(z, self.dropout[adapter], self.training)
            u = self.maths.mix(bases, z, (self.lora_xs_R[adapter] * self.scaling[adapter]).to(z.dtype))
            out = self.maths.expand(bases, out, u)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRAXSTunerLayer:
        before = self.get_base_layer().get_parameter("weight").dtype
        super()._apply(fn, recurse)
        if self.get_base_layer().get_parameter("weight").dtype != before:  # whose own bases would be others
            for adapter in self.lora_xs_R:
                self.bases_A.store(adapter)
                self.bases_B.store(adapter)
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device alone: PEFT would round R to the type of the weight."""
        device = self.get_base_layer().get_parameter("weight").device if device is None else device
        for tensors in (self.lora_xs_R, self.lora_xs_probe, self.bases_A, self.bases_B):
            if adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name].data = tensors[adapter_name].data.to(device)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for adapter in self.lora_xs_probe:
            A, B = (state.get(f"{prefix}bases_{which}.{adapter}") for which in "AB")
            probed = state.get(f"{prefix}lora_xs_probe.{adapter}")
            if A is not None and B is not None:
                fit = self._take(adapter, A, B)
            else:
                fit = probed is None or self._fits(adapter, probed)
            if not fit:
                raise LoRAXSError(
                    f"the bases of {self.name} are not those that the adapter was trained on: load the base model that "
                    "it was trained on, in the same precision"
                )
        super()._load_from_state_dict(state, prefix, *args)

    def _fits(self, adapter: str, probed: Tensor) -> bool:
        """Whether a file's adapter was trained on the bases that were made here."""
        probed = probed.cpu()
        # Files from before 2026-12 hold a probe that was rounded where the model was cast.
        allowed = PROBE_TOLERANCE + probed.abs().float() * (torch.finfo(probed.dtype).eps / 2)
        return bool(((self.lora_xs_probe[adapter].cpu() - probed).abs() <= allowed).all())

    def _take(self, adapter: str, *stored: Tensor) -> bool:
        """Make room for the bases of a file, unless they are those of other weights than this module's."""
        W = matrix_of(self.get_base_layer().get_parameter("weight"), self.kind)
        ours = (self.bases_A[adapter], self.bases_B[adapter])
        if [x.shape for x in stored] != [x.shape for x in ours] or (_follow(W, *ours) and not _follow(W, *stored)):
            return False
        for bases, new in zip((self.bases_A, self.bases_B), stored, strict=True):
            bases.store(adapter)
            bases[adapter] = torch.empty_like(new, device=bases[adapter].device)
        return True

    def __repr__(self) -> str:
        return f"lora_xs.{super().__repr__()}"


def _follow(W: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether A = BᵀW, but for rounding: random bases do not."""
    A, B = A.to(W), B.to(W)
    return bool((B.mT @ W - A).norm() <= FOLLOWS_TOLERANCE * A.norm())


class LoRAXSModel(BaseTuner):
    """A model with LoRA-XS adapters, as `get_peft_model` makes it."""

    prefix = PREFIX
    tuner_layer_cls = LoRAXSTunerLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, LoRAXSTunerLayer):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        reason = refusal(base)
        if reason is None and is_quantized(base.get_parameter("weight")):
            reason = "has a quantised weight, whose bases would have to be stored; lora_xs.save_adapter stores them"
        if reason is not None:
            raise LoRAXSError(f"{current_key} {reason}; leave it out by exclude_modules or name other target_modules")
        layer = LoRAXSTunerLayer(target, current_key, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters it around each `forward` and `generate`, and drops `adapter_names` from what the model gets."""
        if kwargs.get("adapter_names") is not None:
            raise LoRAXSError(ONE_ADAPTER)
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> Any:
        """Expect bases where the file holds them."""
        end = ".bases_A"
        holding = {key.removesuffix(end).removeprefix("base_model.model.") for key in state_dict if key.endswith(end)}
        for name, layer in model.named_modules():
            if isinstance(layer, LoRAXSTunerLayer) and name.removeprefix("base_model.model.") in holding:
                layer.bases_A.store(adapter_name)
                layer.bases_B.store(adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def register() -> None:
    """Tell PEFT of LoRA-XS; again does nothing."""
    known: Any = PeftType.LORA_XS  # it equals, and is hashed as, the string in a file
    PEFT_TYPE_TO_CONFIG_MAPPING[known] = LoRAXSPeftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[known] = LoRAXSModel
    PEFT_TYPE_TO_PREFIX_MAPPING[known] = PREFIX


register()
