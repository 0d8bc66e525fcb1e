"""What there is to adapt in a model, and what a configuration chooses of it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .config import USUAL_HEADS, LoRAXSConfig, in_layers, matches, matches_targets
from .errors import LoRAXSError
from .kinds import LINEAR, MATRIX, STACK, STACK_T, Kind, kind_of, refusal

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Parameters of nn.MultiheadAttention that are matrices."""


@dataclass(frozen=True)
class Target:
    """One weight that an adapter is for: a matrix, or a stack of them."""

    name: str
    """Of the module, or of the parameter where its module holds several."""
    module: nn.Module = field(repr=False)
    """That holds the weight."""
    kind: Kind = LINEAR
    parameter: str = "weight"
    reader: nn.Module | None = field(default=None, repr=False)
    """Whose forward reads the weight; None where `module` itself is called, and its answer can be added to."""

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter(self.parameter)


def parameters_to_adapt(model: nn.Module) -> dict[str, Target]:
    """The matrices and stacks that are parameters of modules with a forward of their own, and the output projections
    of nn.MultiheadAttention: by name, in the model's order."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            for parameter in PROJECTIONS:
                if module._parameters.get(parameter) is not None:
                    full = prefix + parameter
                    found[full] = Target(full, module, MATRIX, parameter, reader=module)
            if refusal(module.out_proj, called=False) is None:
                found[f"{prefix}out_proj"] = Target(f"{prefix}out_proj", module.out_proj, LINEAR, reader=module)
            continue
        for parameter, weight in module._parameters.items():
            if weight is not None and _is_stack(module, weight):
                kind = STACK_T if _is_transposed(module, parameter) else STACK
                found[prefix + parameter] = Target(prefix + parameter, module, kind, parameter, reader=module)
    return found


def _is_stack(module: nn.Module, weight: Tensor) -> bool:
    return (
        weight.ndim == 3
        and weight.dtype.is_floating_point
        and weight.shape[0] > 1
        and min(weight.shape[1:]) > 1
        and not isinstance(module, nn.modules.conv._ConvNd)
    )


def _is_transposed(module: nn.Module, parameter: str) -> bool:
    """Whether a stack is stored n×in×out. transformers' experts say so; Llama 4's show it by their shapes."""
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if up is None or down is None or parameter not in ("gate_up_proj", "down_proj"):
        return False
    return up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]


def looks_like_experts(target: Target) -> bool:
    """Whether a stack's name or its module's class speaks of experts: other parameters have three dimensions too."""
    names = f"{target.name} {type(target.module).__name__}".lower()
    return target.kind in (STACK, STACK_T) and ("expert" in names or "moe" in names)


def find_targets(model: nn.Module, config: LoRAXSConfig) -> dict[str, Target]:
    """What `config` adapts, by name, in the model's order; every name in the configuration must match something."""
    head_names = tuple(find_heads(model, config))

    def outside_head(name: str) -> bool:
        return bool(name) and not any(name == h or name.startswith(h + ".") for h in head_names)

    modules = {n: m for n, m in model.named_modules() if outside_head(n)}
    parameters = {n: t for n, t in parameters_to_adapt(model).items() if outside_head(n)}
    candidates = _in_order(model, {*modules, *parameters})
    if config.targets == "all-linear":
        find_output = getattr(model, "get_output_embeddings", None)
        output = find_output() if callable(find_output) else None
        found = [
            name
            for name in candidates
            if (_is_linear(modules[name], output) if name not in parameters else _is_linear_stack(parameters[name]))
        ]
        if not found:
            raise LoRAXSError('targets="all-linear" found no Linear or Conv1D module in this model')
    else:
        found = [name for name in candidates if matches_targets(name, config.targets)]
        wanted = (config.targets,) if isinstance(config.targets, str) else config.targets
        for target in wanted:
            rule: tuple[str, ...] | str = target if isinstance(config.targets, str) else (target,)
            if not any(matches_targets(name, rule) for name in candidates):
                raise LoRAXSError(f"target {target!r} matches no module; {_what_there_is(modules, parameters, target)}")
    for what, names in (
        ("exclude", config.exclude),
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
        ("through_weight", config.through_weight),
    ):
        for suffix in names:
            if not any(matches(name, (suffix,)) for name in found):
                raise LoRAXSError(f"{what} names {suffix!r}, which matches none of the targeted modules")
    found = [name for name in found if not matches(name, config.exclude)]
    if not found:
        raise LoRAXSError("exclude leaves no module to adapt")
    found = [name for name in found if in_layers(name, config)]
    if not found:
        raise LoRAXSError(f"layers_to_transform={list(config.layers_to_transform or ())} leaves no module to adapt")
    return resolve(model, found, config)


def resolve(model: nn.Module, names: Iterable[str], config: LoRAXSConfig) -> dict[str, Target]:
    """The targets called `names`; what cannot be adapted is refused by name."""
    modules, parameters = dict(model.named_modules()), parameters_to_adapt(model)
    found = {}
    for name in names:
        if name in parameters:
            found[name] = parameters[name]
            continue
        module = modules[name]
        through_weight = matches(name, config.through_weight)
        if reason := refusal(module, called=not through_weight):
            raise LoRAXSError(f"{name} {reason}. Leave it out by `exclude` or name other targets")
        kind = kind_of(module)
        assert kind is not None
        reader = modules[name.rpartition(".")[0]] if through_weight else None
        found[name] = Target(name, module, kind, reader=reader)
    if config.dropout and (through := [t.name for t in found.values() if t.reader is not None]):
        raise LoRAXSError(
            f"dropout acts on A x, and {through[0]} is adapted through its weight: use dropout=0 or exclude it"
        )
    return found


def _is_linear(module: nn.Module, output: object) -> bool:
    kind = kind_of(module)
    return (
        kind is not None
        and kind.name in ("Linear", "Conv1D")
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and module is not output
        and 0 not in getattr(module.weight, "shape", ())  # MobileBert's, where its embeddings are as wide as it is
    )


def _is_linear_stack(target: Target) -> bool:
    return target.kind not in (STACK, STACK_T) or looks_like_experts(target)


def _in_order(model: nn.Module, names: set[str]) -> list[str]:
    """`names` of modules and parameters in the model's order: a module, its parameters, its children."""

    def walk() -> Iterator[str]:
        for name, module in model.named_modules():
            yield name
            yield from (f"{name}.{parameter}" if name else parameter for parameter in module._parameters)

    return [name for name in dict.fromkeys(walk()) if name in names]


def find_heads(model: nn.Module, config: LoRAXSConfig) -> dict[str, nn.Module]:
    """The outermost modules that `head` names; of a container its parts with parameters, since it would call whatever
    is added to it."""
    suffixes = USUAL_HEADS if config.head is None else config.head
    named = dict(model.named_modules())
    # A usual head is a submodule of the model itself: a "score" deep inside an attention is none.
    found = [n for n in named if (n in suffixes if config.head is None else n and matches(n, suffixes))]
    for suffix in config.head or ():
        if not any(matches(name, (suffix,)) for name in found):
            raise LoRAXSError(f"head names {suffix!r}, which matches no module; {_what_there_is(named, {}, suffix)}")
    outermost = [n for n in found if not any(n.startswith(other + ".") for other in found)]
    if config.head is None:  # what is called so may have nothing to train
        outermost = [name for name in outermost if any(True for _ in named[name].parameters())]
    for name in outermost:
        if not any(True for _ in named[name].parameters()):
            raise LoRAXSError(f"the head {name} has no parameters to train; name another one in `head`")
    heads = dict(part for name in outermost for part in _parts(name, named[name]))
    _check_own(model, heads)
    return heads


def _check_own(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Refuse a head that holds a weight of the base: it would be trained there too, and the file would fit no base."""
    inside = {id(part) for module in found.values() for part in module.modules()}
    outside = {
        id(parameter): f"{name}.{key}"
        for name, module in model.named_modules()
        if id(module) not in inside
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    for key, module in found.items():
        for name, parameter in module.named_parameters():
            if id(parameter) in outside:
                raise LoRAXSError(
                    f"the head's {key}.{name} is also the model's {outside[id(parameter)]}, which would be trained "
                    "with it: untie them first, or leave it out of `head`"
                )


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        yield name, module
        return
    for key, child in module.named_children():
        if any(True for _ in child.parameters()):
            yield from _parts(f"{name}.{key}", child)


def _what_there_is(modules: dict[str, nn.Module], parameters: dict[str, Target], wanted: str) -> str:
    names = [n for n, m in modules.items() if n and refusal(m) is None]
    names += [n for n, t in parameters.items() if _is_linear_stack(t)]
    leaves = Counter(n.rsplit(".", 1)[-1] for n in names)
    listed = ", ".join(f"{leaf} ({count})" for leaf, count in sorted(leaves.items()))
    close = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], leaves, n=1)
    hint = f". Did you mean {close[0]!r}?" if close else ""
    return f"the modules that can be adapted are {listed or 'none'}{hint}"


def numberless(name: str) -> str:
    """A name with its numbers starred: the same module of other blocks has the same one."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)
