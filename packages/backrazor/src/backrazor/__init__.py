"""Back Razor: saved activations, sparsified (Jiang et al., NeurIPS 2022)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import RazorError as RazorError
    from .razor import Razor as Razor
    from .table import DENSE as DENSE
    from .table import OPERATIONS as OPERATIONS
    from .table import describe as describe

_HOMES = {
    "DENSE": "table",
    "OPERATIONS": "table",
    "Razor": "razor",
    "RazorError": "errors",
    "describe": "table",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``backrazor-train --help`` must not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'backrazor' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"backrazor.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
