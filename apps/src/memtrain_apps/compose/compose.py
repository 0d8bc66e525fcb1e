"""The composition, in plain sight: inject what is trained, make what is kept, build the optimizer."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from memtrain_common.errors import UserError
from memtrain_common.training.task import Task
from torch import Tensor, nn

from .axes import Axes, check
from .checkpointing import CheckpointBlocks
from .families import blocks, head_name, heads_of, inside, matrices
from .first_step import first_step_check, refuse
from .optimizers import build_optimizer
from .partial import numbers_of


def load_libraries(train: str, optim: str) -> None:
    """Import what :func:`compose` will: imported on fake tensors, a library's own tables of levels would stay fake."""
    if train in ("lora", "melo"):
        import peft  # noqa: F401
    if optim == "adamw8bit":
        from . import adamw8bit  # noqa: F401


def compose(
    task: Task,
    axes: Axes,
    *,
    lr: float,
    head_lr: float = 0.0,
    weight_decay: float = 0.0,
    predicting: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    say: Callable[[str], None] = lambda _: None,
) -> Task:
    """The task trained by ``axes``: its plain model is changed in place, and what belongs to the choices is added.

    Args:
        lr: of what is trained.
        head_lr: of the task head; 0 takes ``lr``.
        weight_decay: of matrices.
        predicting: the model's tensors are fake, so that nothing may look at their numbers.
        wrap: makes the model one of several processes'.
        say: told what a method leaves out.

    Raises:
        UserError: if the combination has no meaning, or none for this model.
    """
    check(axes)
    keeps = saving(task.model, axes)  # before adapters: a block is found by the plain model's names
    model = inject(task.model, axes, predicting=predicting, losses=task.losses, fresh=task.fresh)
    wrapped = wrap(model)
    optimizer = build_optimizer(
        model, axes, lr=lr, head_lr=head_lr or lr, weight_decay=weight_decay, say=say, fresh=task.fresh
    )
    task = replace(task, model=wrapped, optimizer=optimizer, saving=keeps)
    if axes.train != "lte":
        return replace(task, after_first_step=first_step_check(model, axes.train))
    import lte

    merger = lte.Merger(model, axes.merge_steps, unreached=refuse)
    clip = partial(lte.clip_grad_norm_per_head, model)
    return replace(task, after_step=merger.step, clip=clip, stateful={"merger": merger})


# -- train ---------------------------------------------------------------------------------------------------------


def inject(
    model: nn.Module,
    axes: Axes,
    *,
    losses: Callable[[int], Iterable[Tensor]],
    predicting: bool = False,
    fresh: Sequence[str] = (),
) -> nn.Module:
    """The model with adapters where ``axes.train`` has some, and ``requires_grad`` set on what is trained.

    Args:
        losses: n -> the losses of the first n micro-batches, for bases from the gradient.
        fresh: modules besides the task head that begin at random, and are trained whole as it is.
    """
    head, heads = head_name(model), heads_of(model, fresh)
    alpha = axes.alpha or float(axes.rank)
    if axes.train == "full":
        return model.requires_grad_(True)
    if axes.train in ("head", "bitfit"):
        if axes.train == "head" and not heads:
            raise UserError(f"train head needs a task head, and {type(model).__name__} has none: choose another train")
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            bias = axes.train == "bitfit" and name.endswith("bias")
            parameter.requires_grad_(bias or inside(name, heads))
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(f"train bitfit finds no bias in {type(model).__name__}: build it with biases")
        return model
    if axes.train == "lora":
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=axes.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it as a float
            lora_dropout=axes.dropout,
            target_modules=matrices(model, axes.adapt, heads),
            modules_to_save=list(heads) or None,
        )
        return get_peft_model(model, settings)
    if axes.train == "melo":
        from galore_vit.melo import MeLo, add_melo

        if head != "classifier":
            raise UserError(
                f"train melo is LoRA on q and v of a classifier, which {type(model).__name__} is not: choose train lora"
            )
        try:
            adapted = add_melo(model, MeLo(axes.rank, alpha))
            for name in heads[1:]:
                adapted.get_base_model().get_submodule(name).requires_grad_(True)
            return adapted
        except ValueError as error:
            raise UserError(f"train melo: {error}; or choose train lora") from None
    if axes.train == "lora-xs":
        import lora_xs

        init = "random" if predicting else axes.init  # a fake weight has no decomposition; the bytes are the same
        config = lora_xs.LoRAXSConfig(
            axes.rank,
            alpha,
            tuple(matrices(model, axes.adapt, heads)),
            init=init,
            first_step=axes.first_step if init == "gradient" else 0.0,
            head=heads,
        )
        first = partial(losses, axes.init_batches) if init == "gradient" else None
        try:
            return lora_xs.inject(model, config, losses=first, cache=not predicting)
        except lora_xs.LoRAXSError as error:
            raise UserError(f"train lora-xs: {error}") from None
    import lte
    from lte.config import REST

    rest = axes.lte_rest == "trained" or (axes.lte_rest == "auto" and not heads)
    try:
        lte.inject(
            model,
            lte.LTEConfig(
                heads=axes.heads,
                rank=axes.rank,
                alpha=alpha,
                targets=tuple(matrices(model, axes.adapt, heads)),
                exclude=heads or ("lm_head",),
                # a pretrained model's norms and positions do not bear the heads' rate
                trainable=tuple(w for w in REST if w != "embeddings" or not heads) if rest else (),
            ),
        )
    except ValueError as error:
        raise UserError(f"train lte: {error}") from None
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    return model


def merged(model: nn.Module, axes: Axes) -> nn.Module:
    """The plain model with what was trained merged into its weights; the given one is used up."""
    if axes.train in ("lora", "melo"):
        return model.merge_and_unload()  # type: ignore[operator]
    if axes.train == "lora-xs":
        import lora_xs

        return lora_xs.merge(model, keep=False)
    if axes.train == "lte":
        import lte

        return lte.unload(model)
    return model


# -- save ----------------------------------------------------------------------------------------------------------


def saving(model: nn.Module, axes: Axes) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of each forward pass."""
    device = next(model.parameters()).device
    if axes.save == "backrazor":
        import backrazor

        recompute = None if axes.recompute == "none" else axes.recompute
        razor = partial(backrazor.Razor, axes.keep, mode=axes.razor_mode, recompute=recompute)
        if not axes.razor_blocks:
            return razor
        found = list(blocks(model, " that Back Razor could leave out: choose --save backrazor without them").values())
        chosen = numbers_of(axes.razor_blocks, len(found), "backrazor")
        others = CheckpointBlocks(block for i, block in enumerate(found) if i not in chosen)
        return partial(_both, others, razor)
    if axes.save == "checkpoint":
        found = list(blocks(model, " to checkpoint: choose save all or backrazor").values())
        return partial(CheckpointBlocks, [found[i] for i in numbers_of(axes.checkpoint_blocks, len(found))])
    if axes.save == "offload":
        if device.type == "cpu":
            raise UserError(
                "save offload would do nothing on the CPU: what is saved lies in host memory already; choose save all, "
                "checkpoint or backrazor, or a GPU by --device cuda"
            )
        return partial(torch.autograd.graph.save_on_cpu, pin_memory=True)
    return nullcontext


@contextmanager
def _both(checkpointed: CheckpointBlocks, razor: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A Razor steps aside where a block is checkpointed."""
    with checkpointed, razor():
        yield


def plain_name(name: str) -> str:
    """A module's or parameter's name without what PEFT puts before it and between its parts."""
    return re.sub(r"^base_model\.model\.|\.base_layer|\.modules_to_save\.default|\.default(?=\.|$)", "", name)
