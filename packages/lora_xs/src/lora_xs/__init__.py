"""LoRA-XS: r×r adapters between frozen SVD bases (arXiv 2405.17604).

    h = W x + (α/r)·B R A x,    B = U_r,  A = S_r V_rᵀ  of  W = U S Vᵀ;  only R (r×r) is trained.

Importing this package loads nothing heavy: names are looked up where they are defined when they are first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_file import describe_adapter as describe_adapter
    from .adapter_file import load_adapter as load_adapter
    from .adapter_file import save_adapter as save_adapter
    from .adapter_header import AdapterInfo as AdapterInfo
    from .adapters import add as add
    from .adapters import disable as disable
    from .adapters import param_groups as param_groups
    from .adapters import rows as rows
    from .adapters import set_active as set_active
    from .adapters import trained as trained
    from .config import CAUSAL_LM_TARGETS as CAUSAL_LM_TARGETS
    from .config import ROBERTA_TARGETS as ROBERTA_TARGETS
    from .config import LoRAXSConfig as LoRAXSConfig
    from .errors import LoRAXSError as LoRAXSError
    from .injection import inject as inject
    from .injection import remove as remove
    from .merging import merge as merge
    from .merging import unmerge as unmerge
    from .narrowing import narrow as narrow
    from .peft_export import export_peft as export_peft
    from .peft_import import import_peft as import_peft
    from .untrained import Coverage as Coverage
    from .untrained import check_called as check_called
    from .untrained import coverage as coverage
    from .untrained import uncalled as uncalled

_HOME = {
    "AdapterInfo": "adapter_header",
    "CAUSAL_LM_TARGETS": "config",
    "Coverage": "untrained",
    "LoRAXSConfig": "config",
    "LoRAXSError": "errors",
    "ROBERTA_TARGETS": "config",
    "add": "adapters",
    "check_called": "untrained",
    "coverage": "untrained",
    "describe_adapter": "adapter_file",
    "disable": "adapters",
    "export_peft": "peft_export",
    "import_peft": "peft_import",
    "inject": "injection",
    "load_adapter": "adapter_file",
    "merge": "merging",
    "narrow": "narrowing",
    "param_groups": "adapters",
    "remove": "injection",
    "rows": "adapters",
    "save_adapter": "adapter_file",
    "set_active": "adapters",
    "trained": "adapters",
    "uncalled": "untrained",
    "unmerge": "merging",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
