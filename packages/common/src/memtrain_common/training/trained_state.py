"""Checkpoints of what is trained: a frozen base of gigabytes has no place in each of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .distributed import unwrap
from .task import Task


@contextmanager
def trained_state(model: nn.Module, also: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within this context ``model.state_dict()`` holds the trained parameters and all buffers, and loading such a
    state is complete. The base weights come from where they came from; a run's identity has their SHA-256.

    Args:
        also: frozen parameters to keep in the state, because they do not follow from the base weights.
    """
    kept = {id(p) for p in also}
    parameters = list(model.named_parameters(remove_duplicate=False))
    left_out = {name for name, p in parameters if not p.requires_grad and id(p) not in kept}
    frozen = {name for name, p in parameters if not p.requires_grad}

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in left_out:
            state.pop(prefix + name, None)

    def complete(module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in frozen]

    handles = [model.register_state_dict_post_hook(drop), model.register_load_state_dict_post_hook(complete)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copies(task: Task) -> dict[str, Any]:
    """Copies of what training may change, since step 0 has no checkpoint: frozen weights change where steps merge."""
    model = unwrap(task.model)
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if task.after_step is not None:
        frozen = set()
    state = model.state_dict().items()
    return {n: v.detach().clone() for n, v in state if n not in frozen and isinstance(v, Tensor)}
