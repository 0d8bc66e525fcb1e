"""The published package's GaLoreAdamW, for comparison, with a state that a checkpoint can hold.

It keeps a Python object for each weight's basis, which is no tensor; here the object's parts are saved, and the
object is made anew when they are loaded. The arithmetic is untouched.
"""

import warnings
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries that it loads
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

PARTS = ("rank", "verbose", "update_proj_gap", "scale", "proj_type", "ortho_matrix")


class PublishedGaLore(GaLoreAdamW):
    """galore-torch's GaLoreAdamW."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, no_deprecation_warning=True)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        plain = {i: {k: _parts(v) for k, v in entries.items()} for i, entries in state["state"].items()}
        return {**state, "state": plain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        projectors = {i: e["projector"] for i, e in state_dict["state"].items() if "projector" in e}
        rest = {i: {k: v for k, v in e.items() if k != "projector"} for i, e in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": rest})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, parts in projectors.items():
            projector = GaLoreProjector(*(parts[name] for name in PARTS[:5]))
            projector.ortho_matrix = _moved(parts["ortho_matrix"], parameters[i].device)
            self.state[parameters[i]]["projector"] = projector


def _parts(value: Any) -> Any:
    return {name: getattr(value, name) for name in PARTS} if isinstance(value, GaLoreProjector) else value


def _moved(basis: Any, device: torch.device) -> Any:
    """A basis, or the list of two that projection "full" keeps, on a device; never the caller's own tensor."""
    if isinstance(basis, list):
        return [_moved(part, device) for part in basis]
    return basis.to(device, copy=True)
