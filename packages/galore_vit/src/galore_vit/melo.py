"""MeLo: LoRA on the query and value projections of every block of a ViT, through PEFT.

Zhu et al., "MeLo: Low-rank Adaptation is Better than Finetuning for Medical Image Diagnosis" (2023,
arXiv:2311.08236): W_q x + (α/r) B_q A_q x, and likewise v; A by Kaiming's rule with a = √5, B zero, no bias,
no dropout; the backbone is frozen, the head is trained whole.

Deviations: the scale α/r is a float (the published code divides integers, so that α = 4, r = 8 multiplies
the adapter by zero), and the head's bias is saved with its weight.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from galore_vit.settings import is_number

QUERY_VALUE = ("q_proj", "v_proj"), ("query", "value")
"""What transformers calls the two projections: from version 5 on, and before."""
HEAD = "classifier"


@dataclass(frozen=True)
class MeLo:
    """The adapter's settings, MeLo's where not given."""

    rank: int = 4
    """r, at least 1."""
    alpha: float = 4.0
    """α; the adapter is multiplied by α / r, which must not be 0."""
    layers: tuple[int, ...] | None = None
    """Blocks that get an adapter; None: every one."""

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, not {self.rank!r}")
        if not (is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha != 0.0):
            raise ValueError(
                f"alpha must be a finite number, not {self.alpha!r}, and not 0: at scale 0 the adapter would never act"
            )

    @property
    def scale(self) -> float:
        """α / r."""
        return self.alpha / self.rank


def add_melo(model: nn.Module, config: MeLo, task: str = "default") -> Any:
    """The ViT classifier of transformers inside a PeftModel whose adapter and head alone are trained.

    Merge with PEFT's `merge_and_unload()`; further tasks with `add_task`, switched by `set_adapter(task)`. The first
    training pass names, in a warning, projections that it did not call, whose adapters then train nothing.

    Raises:
        ValueError: if the model has no separate query and value projections, one of them is no plain linear layer, or
            there is no linear head named `classifier`.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError("the model has adapters already: give it a further task by add_task")
    _check_task(task)
    _refuse_what_has_no_adapter(model)
    adapted_model = get_peft_model(model, _lora_config(model, config), adapter_name=task)
    FirstPass(adapted_model, task)
    return adapted_model


def add_task(model: Any, config: MeLo, task: str, classes: int) -> None:
    """Adds an adapter and a fresh head of `classes` outputs for another task over the same backbone.

    `config.num_labels`, by which a model of transformers computes the loss of `labels=`, stays as it was: with another
    number of classes set it when you switch, or compute the loss from the logits.

    Raises:
        ValueError: if the model has no MeLo yet, or the task's name or number of classes cannot be.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError("the model has no MeLo yet: give it the first task by add_melo")
    _check_task(task)
    if type(classes) is not int or classes < 1:
        raise ValueError(f"classes must be a whole number of at least 1, not {classes!r}")
    model.add_adapter(task, _lora_config(model.get_base_model(), config))
    heads = head_wrapper(model).modules_to_save
    old = heads[task]
    fresh = nn.Linear(old.in_features, classes, device=old.weight.device, dtype=old.weight.dtype)
    heads[task] = fresh.requires_grad_(old.weight.requires_grad)


def _check_task(task: str) -> None:
    if not task or "." in task:
        raise ValueError(f"a task's name must be a word without dots, not {task!r}")


def projections(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the query and value projections, block by block, query first."""
    for names in QUERY_VALUE:
        found = [(n, m) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in names]
        if found:
            return sorted(found, key=lambda item: (block_of(item[0]), item[0].rsplit(".", 1)[-1] == names[1]))
    raise ValueError("this model has no separate query and value projections: MeLo needs a ViT of transformers")


def adapted(model: Any, task: str) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of a task's adapters in MeLo's order: block by block, query before value; A (r, d), B (d, r)."""
    layers: list[Any] = [m for _, m in projections(model)]
    pairs = [(m.lora_A[task].weight, m.lora_B[task].weight) for m in layers if task in getattr(m, "lora_A", {})]
    if not pairs:
        raise ValueError(f"the model has no adapter for task {task!r}")
    return pairs


def head_wrapper(model: Any) -> Any:
    """PEFT's wrapper that holds every task's head."""
    return getattr(model.get_base_model(), HEAD)


class FirstPass:
    """A forward hook that names, after the first training pass and once, adapters that it did not call."""

    def __init__(self, model: nn.Module, task: str) -> None:
        layers: dict[str, Any] = {n: m for n, m in projections(model) if task in getattr(m, "lora_A", {})}
        self.missing = set(layers)
        self.handles = [m.lora_A[task].register_forward_hook(partial(self.mark, n)) for n, m in layers.items()]
        self.handles.append(model.register_forward_hook(self.say))

    def mark(self, name: str, *_: Any) -> None:
        self.missing.discard(name)

    def say(self, model: nn.Module, *_: Any) -> None:
        if not model.training or not self.handles:
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.missing:
            names = sorted(self.missing, key=lambda name: (block_of(name), name))
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            warnings.warn(
                f"the first training pass did not call {', '.join(names[:4])}{more}: the layer around reads their "
                "weight, and their adapters train nothing; this model is not for MeLo",
                UserWarning,
                stacklevel=2,
            )


def _refuse_what_has_no_adapter(model: nn.Module) -> None:
    for name, module in projections(model):
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"{name} has an adapter already, though the model is no PeftModel: take the model that get_peft_model "
                "gave, or merge or unload its adapters first"
            )
        computed = parametrize.is_parametrized(module, "weight") or "weight" not in module._parameters
        if type(module) is not nn.Linear and not computed:
            raise ValueError(f"{name} is a {type(module).__name__}, and MeLo adapts plain linear layers")
        if computed:
            raise ValueError(
                f"{name} has no weight of its own (weight_norm or spectral_norm computes it): make it a plain layer "
                "before adding MeLo"
            )
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise ValueError(f"MeLo trains a linear head named {HEAD}, which {type(model).__name__} has not")


def block_of(name: str) -> int:
    """The number of the block that a projection lies in: the first number in its name."""
    number = next((part for part in name.split(".") if part.isdigit()), None)
    if number is None:
        raise ValueError(f"{name} lies in no numbered block: MeLo needs a ViT of transformers")
    return int(number)


def _lora_config(model: nn.Module, config: MeLo) -> Any:
    from peft import LoraConfig

    names = [name.removesuffix(".base_layer") for name, _ in projections(model)]
    blocks = sorted({block_of(name) for name in names})
    wanted = blocks if config.layers is None else list(config.layers)
    if missing := sorted(set(wanted) - set(blocks)):
        raise ValueError(f"the model has blocks {blocks[0]}..{blocks[-1]}, and no block {missing[0]}")
    if not wanted:
        raise ValueError("layers is empty: name at least one block, or leave it out for all")
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides it as a float
        target_modules=[name for name in names if block_of(name) in wanted],
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=True,  # A by Kaiming's rule with a = √5, B zero
        modules_to_save=[HEAD],
    )
