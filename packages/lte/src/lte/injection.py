"""Give a model's layers their heads, decide what is trained, and get a plain model back."""

import copy
from collections import OrderedDict
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .chunks import BatchSize
from .config import LTEConfig
from .conv import LTEConv2d
from .copying import copies
from .headed import OWN_TENSORS, Headed
from .hooks import give_back_attributes, hand_over, lend_attributes, without_numbers
from .layer import LTELinear
from .masters import can_be_trained
from .ranks import Ranks
from .replicas import Replicas
from .survey import all_names, kind, layer_for, matches, say_what_has_no_heads, take_slow_paths, targets
from .vectors import LTENorm, LTEVector, has_vectors


def inject(model: nn.Module, config: LTEConfig, ranks: Ranks | None = None) -> nn.Module:
    """Give the targeted linear and convolution layers heads, in place, and freeze what is not to be trained.

    The model's function is unchanged, since every B begins at 0 (but for the rounding of a 4-bit base). A is drawn
    from torch's global generator.

    Args:
        ranks: the processes that hold the heads; every one must call this with the same generator state. None: all
            heads are here.

    Returns:
        the same model.

    Warns:
        UserWarning: names weights of the blocks whose kind has no heads (3-D experts, ``nn.MultiheadAttention``'s
            projections), with their share.

    Raises:
        ValueError: if no layer matches, or only the task's head; a layer shares its weight with another module, or
            has none of its own (weight_norm); its input is sequence-first; heads are there already, the heads cannot
            be shared equally, or a layer cannot have what the configuration gives it. The model is then as it was.
        TypeError: if it is no model, or no configuration.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, LTEConfig):
        given = f"{type(model).__name__} and {type(config).__name__}"
        raise TypeError(f"inject takes a torch.nn.Module and an LTEConfig, got {given}")
    if headed(model) or any(isinstance(m, Replicas) for m in model.modules()):
        raise ValueError("the model has LTE heads already: inject them once, into a plain model")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no size yet: run one batch through the model first")
    share = None
    if ranks is not None and ranks.size > 1:
        share = ranks.share(config.heads)
        if config.mode == "sequential":
            raise ValueError("sequential heads see the whole batch and cannot be spread over processes: use parallel")
    chosen = targets(model, config)
    owners = _owners(model)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    if len(frozen) == len(list(model.parameters())):
        frozen = set()  # all of it: what is trained is for the configuration to say
    for name, layer in chosen.items():
        _refuse_shared(owners, name, layer, "weight", "add it to exclude")
        if "biases" in config.vectors and getattr(layer, "bias", None) not in frozen:
            _refuse_shared(owners, name, layer, "bias", "add it to exclude")
    norms = _norms(model, config, frozen) if "norms" in config.vectors else {}
    for name, norm in norms.items():
        for leaf in ("weight", "bias"):
            if getattr(norm, leaf, None) not in frozen:
                _refuse_shared(owners, name, norm, leaf, "add it to exclude, or leave norms out of vectors")
    if "" in chosen:
        raise ValueError(
            f"the model is one {type(model).__name__}, and has no layer whose place another could take: put it into "
            "nn.Sequential(…)"
        )
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    places = _places(model)
    exchanged: list[tuple[nn.Module, nn.Module]] = []
    try:
        for name, layer in chosen.items():
            try:
                kind_with_heads = layer_for(layer)
                assert kind_with_heads is not None
                exchanged.append(_exchange(places, layer, kind_with_heads(layer, config, share, frozen)))  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for name, norm in norms.items():
            if not has_vectors(norm):
                raise ValueError(f"{name} ({type(norm).__name__}) cannot have heads as vectors: use replicas")
            exchanged.append(_exchange(places, norm, LTENorm(norm, config, share, frozen)))  # type: ignore[arg-type]
        for layer, copied in copies(model, config, share, frozen):
            exchanged.append(_exchange(places, layer, copied))
        _freeze(model, config, frozen)
        _watch(model, trained)
        take_slow_paths(model)
        say_what_has_no_heads(model, config)  # which may be raised, where warnings are errors
    except BaseException:
        for plain, with_heads in exchanged:
            _replace(places, with_heads, plain)
        _forget_batch(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        take_slow_paths(model)
        raise
    return model


def headed(model: nn.Module) -> dict[str, Headed]:
    """Everything with heads (layers, and vectors of norms and biases), by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Headed)}


def lte_layers(model: nn.Module) -> dict[str, LTELinear | LTEConv2d]:
    """The layers with heads, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LTELinear | LTEConv2d)}


def replicas(model: nn.Module) -> dict[str, Replicas]:
    """The layers of which every head has a copy, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Replicas)}


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model that evaluation sees: the names from before :func:`inject`, deltas added.

    The model itself is left as it is. Shared parameters stay shared. Where several processes hold the heads, call it
    within :func:`lte.averaged`.
    """
    everywhere = dict(model.named_modules(remove_duplicate=False))  # a layer that has two names answers to both
    layers = {name: m for name, m in everywhere.items() if isinstance(m, Headed)}
    copied = {name: m for name, m in everywhere.items() if isinstance(m, Replicas)}
    effective: dict[Headed, Tensor] = {}
    means: dict[tuple[int, ...], Tensor] = {}  # of the copies that tied layers share
    state = model.state_dict(keep_vars=True)
    plain: dict[str, Tensor] = OrderedDict()
    plain._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]  # versions, which some modules ask for
    for name, layer in layers.items():
        if hasattr(layer, "plain_layer") and name in plain._metadata:  # type: ignore[attr-defined]
            (kept,) = cast(tuple[nn.Module], layer.plain_layer)
            plain._metadata[name] = {"version": kept._version}  # type: ignore[attr-defined]
    for name, value in state.items():
        parent, _, leaf = name.rpartition(".")
        if parent in layers and (leaf in OWN_TENSORS or leaf == "weight"):
            if leaf == "lora_A":  # once a layer
                layer = layers[parent]
                if layer not in effective:
                    effective[layer] = layer.effective_weight().detach()
                plain[parent if isinstance(layer, LTEVector) else f"{parent}.weight"] = effective[layer]
        elif parent in copied and leaf not in copied[parent].fixed:
            if leaf in copied[parent].names():
                key = (id(value),)
                if key not in means:
                    means[key] = copied[parent].means()[leaf].detach()
                plain[name] = means[key]
        else:
            plain[name] = value.detach() if isinstance(value, Tensor) else value  # get_extra_state may be anything
    return plain


def _norms(model: nn.Module, config: LTEConfig, frozen: set[nn.Parameter]) -> dict[str, nn.Module]:
    """The norm layers that get heads, by name: those whose numbers the model trains."""
    found = {name: m for name, m in model.named_modules() if kind(m) == "norms"}
    names = all_names(model)
    return {
        name: m
        for name, m in found.items()
        if any(p not in frozen for p in m.parameters(recurse=False)) and not matches(names[m], config.exclude)
    }


def _refuse_shared(owners: dict[Tensor, list[str]], name: str, layer: nn.Module, leaf: str, instead: str) -> None:
    """Refuse a parameter that another module has too: with heads, each would learn a tensor of its own."""
    owned = owners.get(getattr(layer, leaf, None), [])  # type: ignore[arg-type]
    if len(owned) > 1:
        others = ", ".join(o for o in owned if o != f"{name}.{leaf}")
        raise ValueError(f"{name} shares its {leaf} with {others} and cannot have heads: {instead}")


def unload(model: nn.Module) -> nn.Module:
    """Put the plain layers back, in place, with the weights that evaluation sees. Their dtypes are those from before,
    and what was trained before :func:`inject` is trained again.

    Where several processes hold the heads, call it within :func:`lte.averaged`.
    """
    state, places = merged_state_dict(model), _places(model)
    tied: dict[nn.Parameter, nn.Parameter] = {}
    trained: dict[str, bool] = {}
    for name, injected in model.named_modules():  # the model itself, or a part of it
        trained |= {f"{name}.{n}" if name else n: value for n, value in _forget_batch(injected).items()}
    for module in list(model.modules()):
        if not hasattr(module, "plain_layer"):
            continue
        (kept,) = cast(tuple[nn.Module], module.plain_layer)
        device = next(module.parameters()).device
        plain = copy.deepcopy(kept).to_empty(device=device).train(module.training)
        for leaf in module.names() if isinstance(module, Replicas) else ():
            setattr(plain, leaf, tied.setdefault(module.get_parameter(leaf), plain.get_parameter(leaf)))
        for leaf, own in _taken_over(module).items():  # it may be another layer's, too
            fresh = plain.get_parameter(leaf)
            setattr(plain, leaf, own if own.dtype == fresh.dtype else tied.setdefault(own, fresh))
        give_back_attributes(module, plain, getattr(module, "lent", ()))  # an earlier version's pickle has none
        _replace(places, module, plain)
    take_slow_paths(model)
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(trained[name])
    return model


def _taken_over(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that what has a plain layer's place took over from it as they were, by name."""
    changed: tuple[str, ...] = ()
    if isinstance(module, Headed):
        changed = (*OWN_TENSORS, "weight")
    elif isinstance(module, Replicas):
        changed = (*module.names(),)
    return {leaf: p for leaf, p in module.named_parameters(recurse=False) if leaf not in changed}


def _forget_batch(model: nn.Module) -> dict[str, bool]:
    """Remove what :func:`_watch` has registered; -> which parameters were trained before, by name."""
    trained: dict[str, bool] = {}
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, BatchSize):
            trained = getattr(hook, "trained", {})  # models pickled by earlier versions do not know
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, after in list(model._forward_hooks.items()):
        if isinstance(getattr(after, "__self__", None), BatchSize):
            del model._forward_hooks[key]
    return trained


Places = dict[nn.Module, list[tuple[nn.Module, str]]]
"""A module -> the modules that have it, each with its name there."""


def _places(model: nn.Module) -> Places:
    found: Places = {}
    for parent in model.modules():
        for name, module in parent._modules.items():
            if module is not None:
                found.setdefault(module, []).append((parent, name))
    return found


def _replace(places: Places, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever the model has ``old``, which may have several names; others' hooks on it go along."""
    places[new] = places.pop(old)
    for parent, name in places[new]:
        setattr(parent, name, new)
    hand_over(old, new)


def _exchange(places: Places, plain: nn.Module, module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Put ``module`` in the place of a plain layer, which it remembers without its numbers, for :func:`unload`.

    Returns:
        the layer, and what has its place.
    """
    module.lent = lend_attributes(plain, module)  # type: ignore[assignment]
    module.plain_layer = (without_numbers(plain),)  # type: ignore[assignment]
    _replace(places, plain, module)
    return plain, module


def _owners(model: nn.Module) -> dict[Tensor, list[str]]:
    """A parameter -> where modules have it, by each module's first name: a layer with two names is one owner."""
    owners: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append(f"{name}.{leaf}" if name else leaf)
    return owners


def _freeze(model: nn.Module, config: LTEConfig, frozen: set[nn.Parameter]) -> None:
    """Train the heads and what ``config.trainable`` lists; freeze everything else.

    Args:
        frozen: what the model does not train by itself, as a router's correction bias; it stays so.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Headed) and name != "bias":
                train = name != "weight"  # lora_A and lora_B, never the master
            elif isinstance(module, Replicas):
                train = name in module.names()
            else:
                train = kind(module) in config.trainable and parameter not in frozen and can_be_trained(parameter)
            if train:
                parameter.requires_grad_(True)


def _watch(model: nn.Module, trained: dict[str, bool]) -> None:
    """Let each layer know its name and the size of the batch, to refuse an input that has another dim 0."""
    batch = BatchSize(trained)
    model.register_forward_pre_hook(batch, with_kwargs=True)
    model.register_forward_hook(batch.forget)
    for name, layer in (headed(model) | replicas(model)).items():
        layer.path, layer.batch = name, batch
