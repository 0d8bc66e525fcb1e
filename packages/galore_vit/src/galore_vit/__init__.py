"""GaLore optimizers (low-rank gradient projection) and MeLo-style adapters for vision transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galore_vit.adafactor import GaLoreAdafactor as GaLoreAdafactor
    from galore_vit.adamw import GaLoreAdamW as GaLoreAdamW
    from galore_vit.adamw8bit import GaLoreAdamW8bit as GaLoreAdamW8bit
    from galore_vit.data_parallel import projected_all_reduce as projected_all_reduce
    from galore_vit.groups import param_groups as param_groups
    from galore_vit.in_backward import InBackward as InBackward
    from galore_vit.scaled import GaLoreScaled as GaLoreScaled
    from galore_vit.settings import Refresh as Refresh
    from galore_vit.state_size import state_bytes as state_bytes

_HOME = {
    "GaLoreAdafactor": "adafactor",
    "GaLoreAdamW": "adamw",
    "GaLoreAdamW8bit": "adamw8bit",
    "GaLoreScaled": "scaled",
    "InBackward": "in_backward",
    "Refresh": "settings",
    "param_groups": "groups",
    "projected_all_reduce": "data_parallel",
    "state_bytes": "state_size",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Importing the package must not import torch: `--help` of a command begins with this file.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"galore_vit.{_HOME[name]}"), name)
