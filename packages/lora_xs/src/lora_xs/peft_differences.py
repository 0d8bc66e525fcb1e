"""Where PEFT's LoRA over a module, or its copy of a task head, is another function than the adapter here."""

from __future__ import annotations

from collections import defaultdict

from torch import nn


class Differences:
    """Of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parents: dict[int, list[int]] = defaultdict(list)
        """id of a module → ids of those that hold it, one for each place."""
        for parent in model.modules():
            for child in parent._modules.values():
                self._parents[id(child)].append(id(parent))

    def of(self, name: str, module: nn.Module) -> str | None:
        """Why PEFT gives another model, as a sentence that lacks its end; None where it gives the same.

        PEFT's lora_A is a convolution with the module's kernel size, stride and padding, and nothing else of it; and
        what PEFT wraps it puts in the place of the module's first name. A block that stands at two places is one
        parent, in which PEFT replaces what it holds for both.
        """
        own = {id(part) for part in module.modules()}
        if sum(parent not in own for part in own for parent in self._parents[part]) > 1:
            names = [n for n, m in self.model.named_modules(remove_duplicate=False) if m is module]
            where = f" ({', '.join(names)})" if len(names) > 1 else ", in part or whole"
            return f"{name} stands at several places of the model{where}, and PEFT adapts the first of them alone"
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" and any(module._reversed_padding_repeated_twice):
                return f"{name} is a Conv2d with padding_mode={module.padding_mode!r}, and PEFT's LoRA pads with zeros"
            if any(d != 1 and k != 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)):
                return f"{name} is a Conv2d with dilation={module.dilation}, and PEFT's LoRA convolves without it"
        return None
