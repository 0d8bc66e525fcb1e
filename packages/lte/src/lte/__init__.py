"""LoRA-the-Explorer: pre-training with many LoRA heads in parallel (Huh et al., 2024, arXiv:2402.16828)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LTEConfig as LTEConfig
    from .conv import LTEConv2d as LTEConv2d
    from .injection import inject as inject
    from .injection import merged_state_dict as merged_state_dict
    from .injection import unload as unload
    from .layer import LTELinear as LTELinear
    from .merging import Merger as Merger
    from .merging import averaged as averaged
    from .merging import merge as merge
    from .parameters import clip_grad_norm_per_head as clip_grad_norm_per_head
    from .parameters import param_groups as param_groups
    from .parameters import shared_parameters as shared_parameters
    from .ranks import Ranks as Ranks
    from .replicas import Replicas as Replicas
    from .shards import HeadShards as HeadShards
    from .survey import without_heads as without_heads
    from .transposed import LTEConv1D as LTEConv1D
    from .vectors import LTENorm as LTENorm
    from .vectors import LTEVector as LTEVector

_HOMES = {
    "HeadShards": "shards",
    "LTEConfig": "config",
    "LTEConv1D": "transposed",
    "LTEConv2d": "conv",
    "LTELinear": "layer",
    "LTENorm": "vectors",
    "LTEVector": "vectors",
    "Merger": "merging",
    "Ranks": "ranks",
    "Replicas": "replicas",
    "averaged": "merging",
    "clip_grad_norm_per_head": "parameters",
    "inject": "injection",
    "merge": "merging",
    "merged_state_dict": "injection",
    "param_groups": "parameters",
    "shared_parameters": "parameters",
    "unload": "injection",
    "without_heads": "survey",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``lte-train --help`` must not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lte' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"lte.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
