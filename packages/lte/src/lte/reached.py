"""Which heads the first backward pass reaches: those of a layer that is never called get no gradient."""

import warnings
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .injection import headed


class Reached:
    """Looks at the first backward pass of a model with heads.

    Some blocks read a linear layer's weight and never call the layer (timm's BEiT and EVA02 with qkv, Mamba with
    dt_proj): heads there would train nothing, in silence.

    Args:
        tell: given the sentence that names them; None warns.
    """

    def __init__(self, model: nn.Module, tell: Callable[[str], None] | None = None) -> None:
        self._tell, self._model, self._training = tell, model, False
        trained = {name: layer.lora_B for name, layer in headed(model).items() if layer.lora_B.requires_grad}
        own = {p for layer in headed(model).values() for p in layer.parameters()}
        rest = [p for p in model.parameters() if p.requires_grad and p not in own]
        self._missing, self._all, self._ran = set(trained), len(trained), False
        self._hooks = [lora_B.register_hook(partial(self._mark, name)) for name, lora_B in trained.items()]
        self._hooks += [p.register_hook(partial(self._mark, None)) for p in rest]

    def _mark(self, name: str | None, grad: Tensor) -> None:
        self._ran, self._training = True, self._model.training
        if name is not None:
            self._missing.discard(name)

    def say(self) -> None:
        """After a step: name, once, the layers whose heads got no gradient, and look no more."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if not self._ran or not self._missing:
            return
        if len(self._missing) == self._all and not self._training:
            sentence = (
                "the first backward pass reached no head: heads train in training mode alone, so call model.train() "
                "before it"
            )
        else:
            names = sorted(self._missing)
            more = f" and {len(names) - 4} more layers" if len(names) > 4 else ""
            sentence = (
                f"the first backward pass did not reach heads of {', '.join(names[:4])}{more}, which train nothing: "
                "the layer around reads their weight and never calls them, or the loss does not depend on them; add "
                "them to exclude"
            )
        if self._tell is not None:
            self._tell(sentence)
        else:
            warnings.warn(sentence, UserWarning, stacklevel=3)
