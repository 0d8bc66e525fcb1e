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

from .adapter_checks import PROBE_TOLERANCE, probe
from .bases import Request, default_cache, make_bases
from .config import LoRAXSConfig
from .errors import LoRAXSError
from .kinds import CONV2D, EMBEDDING, dense, is_quantized, kind_of, refusal
from .layer import XSConv2d, XSEmbedding, XSLayer, XSMatrices
from .svd import generator
from .targets import Target

PREFIX = "lora_xs_"


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
        self.lora_xs_probe = BufferDict(persistent=True)
        self.bases_A = BufferDict(persistent=False)  # adapter → (r×in)
        self.bases_B = BufferDict(persistent=False)  # adapter → (out×r)
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
        self.bases_A[adapter_name], self.bases_B[adapter_name] = A, B
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
            raise ValueError("LoRA-XS in PEFT has one adapter for a batch; lora_xs.rows has one for each row")
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

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for adapter, own in self.lora_xs_probe.items():
            stored = state.get(f"{prefix}lora_xs_probe.{adapter}")
            if stored is not None and not bool(((own.cpu() - stored.cpu()).abs() <= PROBE_TOLERANCE).all()):
                raise LoRAXSError(
                    f"the bases of {self.name} are not those that the adapter was trained on: load the base model that "
                    "it was trained on, in the same precision"
                )
        super()._load_from_state_dict(state, prefix, *args)

    def __repr__(self) -> str:
        return f"lora_xs.{super().__repr__()}"


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


def register() -> None:
    """Tell PEFT of LoRA-XS; again does nothing."""
    known: Any = PeftType.LORA_XS  # it equals, and is hashed as, the string in a file
    PEFT_TYPE_TO_CONFIG_MAPPING[known] = LoRAXSPeftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[known] = LoRAXSModel
    PEFT_TYPE_TO_PREFIX_MAPPING[known] = PREFIX


register()
