"""What of a model can have heads: which layers are asked for, which cannot be cut by batch, what is left out."""

import math
import re
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .config import LTEConfig
from .conv import LTEConv2d
from .headed import Headed
from .layer import LTELinear
from .masters import can_be_summed_in
from .replicas import Replicas
from .transposed import LTEConv1D, is_conv1d
from .vectors import LTENorm

Target = type[LTELinear] | type[LTEConv1D] | type[LTEConv2d]
WORTH_A_LINE = 0.01
"""Of the blocks' weights: a smaller share without heads is not told."""


def layer_for(module: nn.Module) -> Target | None:
    """The layer with heads that can take this module's place."""
    if _is_unfit(module):
        return None
    if is_conv1d(module):
        return LTEConv1D
    for plain, target in ((nn.Linear, LTELinear), (nn.Conv2d, LTEConv2d)):
        # a parametrized layer is of a class of its own; it is found here, and refused by name
        if type(module) is plain or (isinstance(module, plain) and parametrize.is_parametrized(module, "weight")):
            return target
    return LTELinear if answers_linearly(module) else None


def _is_dense(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution by its kind, whatever its weight is made of."""
    return isinstance(module, nn.Linear | nn.Conv2d) or is_conv1d(module)


def _is_unfit(module: nn.Module) -> bool:
    """Whether a layer's weight is nothing that deltas can be added to: codes of a quantized one, complex numbers."""
    if not _is_dense(module) or isinstance(module, Headed) or parametrize.is_parametrized(module, "weight"):
        return False
    return not can_be_summed_in(getattr(module, "weight", None))


@torch.no_grad()
def answers_linearly(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear with a forward of its own (Falcon's, timm's) answers x Wᵀ + b all the same.

    Its forward is tried on two rows, where it has nothing but a weight and a bias.
    """
    extras = set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention's, which reads its weight and never calls it
    if not isinstance(module, nn.Linear) or extras or "weight" not in module._parameters or module.weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    x = x.view(2, module.in_features)
    try:
        answer = type(module).forward(module, x)
        expected = nn.functional.linear(x, module.weight, module.bias)
    except Exception:  # another signature, a type that has no such product: not a linear layer to us
        return False
    tolerance = 16 * torch.finfo(x.dtype).eps * module.in_features**0.5
    return (
        isinstance(answer, Tensor)
        and answer.shape == expected.shape
        and bool(((answer - expected).abs() <= tolerance * (1 + expected.abs())).all())
    )


def targets(model: nn.Module, config: LTEConfig) -> dict[str, nn.Module]:
    """The layers that the configuration asks for, by name.

    Raises:
        ValueError: if there are none, one cannot have heads, or they are the task's head alone.
    """
    candidates = {name: m for name, m in model.named_modules() if layer_for(m) is not None and not _is_empty(m)}
    names = all_names(model)
    chosen = {
        name: layer
        for name, layer in candidates.items()
        if (not config.targets or matches(names[layer], config.targets)) and not matches(names[layer], config.exclude)
    }
    _refuse_unfit_weights(names, config, chosen)
    if not chosen:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in candidates})) or "none"
        raise ValueError(
            f"no linear layer or convolution matches targets={config.targets}; the model's layers are: {there}"
        )
    for name, layer in chosen.items():
        _refuse_made_weights(name, layer)
    _say_what_is_not_there(model, config, [n for m in candidates.values() for n in names[m]])
    if config.mode == "parallel":
        _refuse_sequence_first(model, chosen)
    if not config.targets:
        _refuse_task_head_alone(model, chosen)
    return chosen


def kind(module: nn.Module) -> str:
    """Which word of ``LTEConfig.trainable`` a module's own parameters fall under."""
    if isinstance(module, Headed):
        return "biases"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embeddings"
    if "norm" in type(module).__name__.lower():  # LayerNorm, RMSNorm, BatchNorm2d, and transformers' own
        return "norms"
    return "skipped"


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """A module -> its names, of which it may have several."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def matches(names: Iterable[str], suffixes: Iterable[str]) -> bool:
    """Whether one of the names ends, at a dot, with one of the suffixes."""
    return any(name == s or name.endswith("." + s) for name in names for s in suffixes)


def without_heads(model: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[float, list[str]]:
    """What of the blocks' weights has no heads and no copies because its kind cannot have any: such as 3-D weights of
    experts, ``nn.MultiheadAttention``'s projections, subclasses of linear layers, quantized weights.

    Args:
        exclude: name suffixes of what is not counted.

    Returns:
        (their share of all weights in numbered blocks, or in the whole model where none are numbered, their names with
        "*" for a number).
    """
    total, left = _left_out(model, exclude)
    return (sum(p.numel() for ps in left.values() for p in ps) / total if total else 0.0), list(left)


def _left_out(model: nn.Module, exclude: tuple[str, ...]) -> tuple[int, dict[str, list[Tensor]]]:
    """(numbers in all weights that are counted, those without heads by their name with "*" for a number)."""
    left: dict[str, list[Tensor]] = {}
    total = 0
    has_blocks, names = any(_in_a_block(name) for name, _ in model.named_parameters()), all_names(model)
    for name, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}"
            if has_blocks and not _in_a_block(full):
                continue
            if isinstance(module, LTELinear | LTEConv2d) and leaf == "lora_A":
                total += math.prod(module.matrix_shape)
            elif _is_matrix(module, p):
                total += p.numel()
                if layer_for(module) is None and not matches([*names[module], full], exclude):
                    left.setdefault(re.sub(r"(?<![^.])\d+(?=\.)", "*", full), []).append(p)
    return total, left


def say_what_has_no_heads(model: nn.Module, config: LTEConfig) -> None:
    """A warning that names the weights of the blocks whose kind has no heads, with their share."""
    total, left = _left_out(model, config.exclude)
    weights = [p for ps in left.values() for p in ps]
    share = sum(p.numel() for p in weights) / total if total else 0.0
    if share >= WORTH_A_LINE:
        trained = {p.requires_grad for p in weights}
        how = "trained whole, one for all heads" if True in trained else "frozen"
        how += " (but for those that the model does not train)" if len(trained) > 1 else ""
        text = f"{share:.0%} of the weights of the blocks have no heads: {_some(list(left))}; they are {how}"
        warnings.warn(text, UserWarning, stacklevel=3)


def take_slow_paths(model: nn.Module) -> None:
    """Let ``nn.TransformerEncoderLayer`` call its linear layers in evaluation too, where they have heads.

    Its fast path reads their frozen weights instead, and every head would be ignored. Where the heads are gone, the
    fast path comes back.
    """
    switches = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for module in model.modules():
        inside = any(isinstance(m, Headed | LTENorm | Replicas) for m in module.modules())
        for kind, switch in switches.items():  # 0: "an activation that the fast path does not know"
            if isinstance(module, kind) and hasattr(module, switch):
                before = module.__dict__.setdefault("fast_path_without_heads", getattr(module, switch))
                setattr(module, switch, 0 if inside else before)


def _refuse_unfit_weights(names: dict[nn.Module, list[str]], config: LTEConfig, chosen: Iterable[str]) -> None:
    """Layers that are asked for by name, or are all that there is, and whose weight no delta can be added to."""
    for module, called in names.items():
        asked = (matches(called, config.targets) or not chosen) and not matches(called, config.exclude)
        if asked and _is_unfit(module):
            weight = getattr(module, "weight", None)
            how = f"{weight.dtype}, {type(weight).__name__}" if isinstance(weight, Tensor) else "none"
            raise ValueError(
                f"{called[0]} has a weight that deltas cannot be added to ({how}) and cannot have heads, which need a "
                "plain tensor of float16, bfloat16, float32 or float64: load it unquantized, or add it to exclude"
            )


def _say_what_is_not_there(model: nn.Module, config: LTEConfig, candidates: list[str]) -> None:
    """A warning that names words of targets and exclude that nothing is called by: they may be misspelled."""
    there = [n for n, _ in model.named_modules(remove_duplicate=False)]
    there += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    usual = LTEConfig().exclude  # which many models have not
    lost = {
        "targets names {}, but no layer that can have heads": [
            t for t in config.targets if not matches(candidates, [t])
        ],
        "exclude names {}, but nothing": [e for e in config.exclude if e not in usual and not matches(there, [e])],
    }
    for what, words in lost.items():
        if words:
            text = f"{what.format(_some(words))} is called so in this {type(model).__name__}"
            warnings.warn(text, UserWarning, stacklevel=4)


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _refuse_made_weights(name: str, layer: nn.Module) -> None:
    """Weights that are computed at each forward pass (weight_norm, spectral_norm) cannot be frozen and merged into."""
    if parametrize.is_parametrized(layer, "weight"):
        kinds = {type(p).__name__.strip("_") for p in layer.parametrizations["weight"]}  # type: ignore[index]
        how = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    elif "weight" not in dict(layer.named_parameters(recurse=False)):
        kinds = {type(hook).__name__ for hook in layer._forward_pre_hooks.values()} or {"a hook"}
        how = "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"
    else:
        return
    raise ValueError(
        f"{name} has no weight of its own, {' and '.join(sorted(kinds))} computes it, and it cannot have heads: make "
        f"it a plain layer first by {how}, or add it to exclude"
    )


def _refuse_sequence_first(model: nn.Module, chosen: Iterable[str]) -> None:
    """Heads cut dim 0 of a layer's input, which must be the batch and not the sequence."""
    unsure: list[str] = []
    for parent, module in model.named_modules():
        attention = [m for m in module.children() if isinstance(m, nn.MultiheadAttention) and not m.batch_first]
        inside = [name for name in chosen if name.startswith(f"{parent}." if parent else "")]
        if not attention or not inside:
            continue
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            raise ValueError(
                f"{inside[0]} is in a {type(module).__name__} with batch_first=False: its dim 0 is the sequence, and "
                "heads would cut that; build the model with batch_first=True, or use mode='sequential'"
            )
        unsure.append(parent or "the model")
    if unsure:
        warnings.warn(
            f"{unsure[0]} has a MultiheadAttention with batch_first=False: if its linear layers get "
            "(sequence, batch, …) too, heads would cut the sequence; use mode='sequential' then",
            UserWarning,
            stacklevel=4,
        )


def _refuse_task_head_alone(model: nn.Module, chosen: Iterable[str]) -> None:
    matrices = {
        f"{name}.{leaf}": type(module).__name__
        for name, module in model.named_modules()
        for leaf, p in module.named_parameters(recurse=False)
        if _is_matrix(module, p) and _in_a_block(f"{name}.{leaf}")
    }
    if matrices and not any(_in_a_block(f"{name}.weight") for name in chosen):
        kinds = ", ".join(sorted(set(matrices.values())))
        raise ValueError(
            f"only {', '.join(chosen)} would get heads, outside the blocks, whose weights are in layers that cannot "
            f"have any ({kinds}): LTE has nothing to do on {type(model).__name__}"
        )


def _is_empty(module: nn.Module) -> bool:
    """Whether a layer has no numbers, as MobileBERT's where its embeddings are as wide as the model."""
    return any(p.numel() == 0 for p in module.parameters(recurse=False))


def _in_a_block(name: str) -> bool:
    """Whether a parameter lies in a numbered block (``layers.3.…``)."""
    return re.search(r"(^|\.)\d+\.", name) is not None


def _is_matrix(module: nn.Module, p: Tensor) -> bool:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | Replicas | Headed):
        return False
    numbers = torch.is_floating_point(p) or _is_dense(module)  # or the codes of a quantized layer
    return p.dim() >= 2 and numbers and "norm" not in type(module).__name__.lower()
