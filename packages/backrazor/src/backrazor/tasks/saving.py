"""What the commands do with Back Razor: the context of a forward pass, what is trained, and the dense ledger beside."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from memtrain_common.commands.summary import ledger_table
from memtrain_common.measuring.memory import Ledger
from torch import nn

from ..razor import Razor

NAMES = {
    "full": "dense", "backrazor": "Back Razor", "bitfit": "bitfit", "head": "head", "lite-residual": "lite residual",
    "lite-residual+bias": "lite residual and biases",
}  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def saving_of(config: Any, exact: Sequence[str] = ()) -> Callable[[], AbstractContextManager[Any]]:
    """``saving`` for :func:`memtrain_common.training.loop.fit`: a Razor with the flags' settings, or nothing.

    Args:
        exact: modules that are left to PyTorch besides those of the flags.
    """
    if config.mode != "backrazor":
        return nullcontext
    razor = razor_of(config, exact)
    return lambda: razor


def first_and_last(model: nn.Module, head: str) -> tuple[str, ...]:
    """Names of a classifier's first convolution, its last layer norm where it has one, and its head."""
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    return (*convolutions[:1], *norms[-1:], head)


def razor_of(config: Any, exact: Sequence[str] = ()) -> Razor:
    """A Razor with the settings of :class:`~backrazor.tasks.razor_flags.RazorFlags`, and further exact modules."""
    return Razor(
        config.keep,
        mode=config.razor_mode,
        attention=config.attention,
        values=config.values,
        recompute=None if config.recompute == "none" else config.recompute,
        exact=(*config.exact, *exact),
    )


def train_only(model: nn.Module, head: tuple[str, ...], mode: str, *, freeze_bn: bool = False) -> nn.Module:
    """The model with ``requires_grad`` set on what the mode trains.

    Args:
        head: paths of the modules that are trained in every mode.
        mode: "full" and "backrazor" train all, "bitfit" biases and the head, "head" the head, "lite-residual" TinyTL's
            branches and the head, "lite-residual+bias" biases too, but those that end a branch.
        freeze_bn: not the weights and biases of batch norms.
    """
    for name, parameter in model.named_parameters():
        inside = name.startswith(tuple(f"{h}." for h in head))
        bias = mode in ("bitfit", "lite-residual+bias") and name.rpartition(".")[2] == "bias"
        lite = mode.startswith("lite-residual") and ".lite_residual." in name
        if mode == "lite-residual+bias" and name.endswith(".lite_residual.final_bn.bias"):
            lite = bias = False  # the bias at the end of the block that it is added to does the same
        parameter.requires_grad_(mode in ("full", "backrazor") or inside or bias or lite)
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.requires_grad_(False)
    return model


def fix_statistics(model: nn.Module) -> None:
    """Batch norms use their running statistics in training too; the loop leaves modules in eval mode as they are."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()


def side_by_side(config: Any, dense: dict[str, int], measured: Ledger) -> str:
    """The measured step as a table; of Back Razor, beside what dense training would have held.

    Args:
        config: with ``mode`` and ``keep``.
        dense: :func:`dense_activations`; weights, gradients and the optimizer's state are the same either way.
        measured: of the run.
    """
    if config.mode != "backrazor":
        return ledger_table({"measured": measured})
    without = Ledger({**measured.bytes_by_layer, "activations": dense})
    return ledger_table({"dense (predicted)": without, f"Back Razor, keep {config.keep:g}": measured})
