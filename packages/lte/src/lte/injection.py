"""Give a model's linear layers their heads, decide what is trained, and get a plain model back."""

from torch import Tensor, nn

from .config import LTEConfig
from .layer import LTELinear


def inject(model: nn.Module, config: LTEConfig) -> nn.Module:
    """Replace the targeted linear layers by :class:`LTELinear`, in place, and freeze what is not to be trained.

    The model's function is unchanged, since every B begins at 0. A is drawn from torch's global generator.

    Returns:
        the same model.

    Raises:
        ValueError: if no layer matches, a layer shares its weight with another module, or heads are there already.
    """
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    if lte_layers(model):
        raise ValueError("the model has LTE heads already: inject them once, into a plain model")
    chosen = {
        name: linear
        for name, linear in linears.items()
        if (not config.targets or _matches(name, config.targets)) and not _matches(name, config.exclude)
    }
    if not chosen:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
        raise ValueError(f"no linear layer matches targets={config.targets}; the model's linear layers are: {there}")
    owners: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    for name, linear in chosen.items():
        if len(owners[linear.weight]) > 1:
            others = ", ".join(o for o in owners[linear.weight] if o != f"{name}.weight")
            raise ValueError(f"{name} shares its weight with {others} and cannot have heads: add it to exclude")
    for name, linear in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LTELinear(linear, config))
    _freeze(model, config)
    return model


def lte_layers(model: nn.Module) -> dict[str, LTELinear]:
    """The layers with heads, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LTELinear)}


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model that evaluation sees: the names from before :func:`inject`, deltas added.

    The model itself is left as it is. Shared parameters stay shared.
    """
    layers = lte_layers(model)
    own = {"lora_A", "lora_B", "merged_A", "merged_B"}
    plain = {}
    for name, value in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        if parent in layers and leaf in own:
            continue
        merged = parent in layers and leaf == "weight"
        plain[name] = layers[parent].effective_weight().detach() if merged else value
    return plain


def _freeze(model: nn.Module, config: LTEConfig) -> None:
    """Train the heads and what ``config.trainable`` lists; freeze everything else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, LTELinear) and name != "bias":
                train = name != "weight"  # lora_A and lora_B, never the master
            else:
                train = kind(module) in config.trainable
            if train:
                parameter.requires_grad_(True)


def kind(module: nn.Module) -> str:
    """Which word of ``LTEConfig.trainable`` a module's own parameters fall under."""
    if isinstance(module, LTELinear):
        return "biases"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embeddings"
    if "norm" in type(module).__name__.lower():  # LayerNorm, RMSNorm, BatchNorm2d, and transformers' own
        return "norms"
    return "skipped"


def _matches(name: str, suffixes: tuple[str, ...]) -> bool:
    return any(name == s or name.endswith("." + s) for s in suffixes)
