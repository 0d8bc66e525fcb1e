"""Adapters that a run's first step did not reach end the run: they would train nothing, in silence."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from memtrain_common.errors import UserError
from torch import nn


def refuse(sentence: str) -> None:
    """For libraries that give their own sentence.

    Raises:
        UserError: with it.
    """
    raise UserError(sentence)


def first_step_check(model: nn.Module, train: str) -> Callable[[], None] | None:
    """What to call after the first optimizer step: it looks which adapters were called; None where there are none.

    Some blocks read a layer's weight and never call the layer (timm's BEiT with qkv, Mamba with dt_proj). One that was
    called in another block counts as called: an expert to which no token was sent is not untrained for ever.
    """
    if train == "lora-xs":
        return partial(_check_lora_xs, model)
    if train not in ("lora", "melo"):
        return None
    missing = {name: module for name, module in model.named_modules() if re.search(r"\.lora_A\.[^.]+$", name)}
    called: set[str] = set()
    hooks = [m.register_forward_hook(partial(_mark, called, name)) for name, m in missing.items()]

    def check() -> None:
        for hook in hooks:
            hook.remove()
        kinds = {_kind(name) for name in called}
        names = [_layer(name) for name in missing if _kind(name) not in kinds]
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise UserError(
                f"train {train}: the first step did not call {', '.join(names[:4])}{more}, whose adapters would train "
                "nothing: the layers around only read their weights; choose train full, bitfit or head"
            )

    return check


@contextlib.contextmanager
def as_errors() -> Iterator[None]:
    """While a run is fitted: what the libraries would warn of is checked here, and ends it."""
    with warnings.catch_warnings():
        for beginning in ("the first step trained nothing at", "the first training pass did not call"):
            warnings.filterwarnings("ignore", message=beginning)
        yield


def _check_lora_xs(model: nn.Module) -> None:
    import lora_xs

    try:
        lora_xs.check_called(model)
    except lora_xs.LoRAXSError as error:
        raise UserError(f"train lora-xs: {error}") from None


def _mark(called: set[str], name: str, *_: Any) -> None:
    called.add(name)


def _kind(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)


def _layer(name: str) -> str:
    """PEFT's name of an adapter's part -> the layer's in the plain model."""
    return re.sub(r"\.lora_A\.[^.]+$", "", name).removeprefix("base_model.model.")
