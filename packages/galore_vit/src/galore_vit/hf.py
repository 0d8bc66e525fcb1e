"""GaLore in transformers' Trainer, and in a loop of one's own with accelerate.

    Trainer(model, args, optimizers=(galore_optimizer(model, args, rank=64), None), …)
    Trainer(model, args, optimizer_cls_and_kwargs=galore_cls_and_kwargs(model, args, rank=64), …)

Both read lr, weight decay and Adam's numbers from the TrainingArguments, and Trainer's own words for GaLore where
they are set: ``optim="galore_adamw"``, ``optim_args="rank=64, update_proj_gap=100"``, ``optim_target_modules``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from galore_vit.adafactor import GaLoreAdafactor
from galore_vit.adamw import GaLoreAdamW
from galore_vit.adamw8bit import GaLoreAdamW8bit
from galore_vit.groups import is_linear, param_groups
from galore_vit.scaled import GaLoreScaled

KINDS: dict[str, type[GaLoreAdamW] | type[GaLoreAdafactor]] = {
    "galore_adamw": GaLoreAdamW,
    "galore_adamw_8bit": GaLoreAdamW8bit,
    "galore_adafactor": GaLoreAdafactor,
    "galore_scaled": GaLoreScaled,
}
"""Trainer's names for the first three, and one for GaLoreScaled, which Trainer has no word for."""
GROUP_KEYS: dict[str, Any] = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
"""What ``optim_args`` may hold, with Trainer's defaults."""
NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names of parameters that Trainer does not decay, in small letters."""


def galore_optimizer(model: nn.Module, args: Any = None, **settings: Any) -> Optimizer:
    """A GaLore optimizer over a model's trainable parameters, for Trainer's ``optimizers=`` or a loop of one's own.

    The blocks' matrices are projected (:func:`galore_vit.param_groups`). Weight decay is of everything that Trainer
    decays: all parameters but those of ``nn.LayerNorm`` and those whose names speak of a bias or a norm.

    Args:
        model: as the loop trains it.
        args: transformers' TrainingArguments, or None. From it come lr, weight decay, betas and ε, and the words
            ``optim``, ``optim_args`` and ``optim_target_modules`` where ``optim`` is one of GaLore's.
        settings: what is given here counts before ``args``: ``optim`` (one of ``KINDS``), ``rank``,
            ``update_proj_gap``, ``scale``, ``proj_type``, ``targets`` (module names as in ``optim_target_modules``: a
            list of parts of names or of regular expressions for their beginnings, or one for whole names; of the
            modules that these name, linear layers alone are projected, as by Trainer, and GPT-2's Conv1D is one here),
            ``lr``, ``weight_decay``, and any option of the optimizer (``refresh``, ``residual``, ``paper``, …).

    Raises:
        ValueError: where a word is unknown, or nothing would be projected.
    """
    kind, options = galore_cls_and_kwargs(model, args, **settings)
    return kind(options.pop("params"), **options)


def galore_cls_and_kwargs(
    model: nn.Module, args: Any = None, **settings: Any
) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class and its arguments, parameter groups included, for Trainer's ``optimizer_cls_and_kwargs=``.

    The arguments are those of :func:`galore_optimizer`. Trainer takes the groups out when it makes the optimizer, so
    the pair serves one Trainer.
    """
    words = _words_of(args)
    optim = settings.get("optim", words.get("optim", "galore_adamw"))
    if optim == "galore_adafactor":  # which has neither β nor this ε
        words = {key: value for key, value in words.items() if key not in ("betas", "eps")}
        words |= {"scale_parameter": False, "relative_step": False}
    words = {**words, **settings}
    words.pop("optim", None)
    if optim not in KINDS:
        instead = "" if not str(optim).endswith("_layerwise") else "; layer by layer is galore_vit.InBackward"
        raise ValueError(f"optim must be one of {', '.join(KINDS)}, not {optim!r}{instead}")
    targets, decay = words.pop("targets", None), words.pop("weight_decay", 0.0)
    defaults = {**GROUP_KEYS, "scale": 1.0} if optim == "galore_scaled" else GROUP_KEYS
    keys = {key: words.pop(key, default) for key, default in defaults.items()}
    paper = bool(words.get("paper"))
    groups = param_groups(model, **keys, targets=None if targets is None else _pattern(model, targets), paper=paper)
    return KINDS[optim], {"params": _decayed_apart(model, groups, decay), **words}


def _words_of(args: Any) -> dict[str, Any]:
    """What TrainingArguments say, in this module's words."""
    if args is None:
        return {}
    words: dict[str, Any] = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    optim = str(getattr(args.optim, "value", args.optim))
    if not optim.startswith("galore_"):
        return words
    words["optim"] = optim
    if args.optim_target_modules is not None:
        words["targets"] = args.optim_target_modules
    for part in (args.optim_args or "").replace(" ", "").split(","):
        key, _, value = part.partition("=")
        if key in GROUP_KEYS:
            kind = type(GROUP_KEYS[key])
            try:
                words[key] = kind(value)
            except ValueError as error:
                raise ValueError(f"optim_args has {part}, whose value must be {NUMBERS[kind]}") from error
        elif part:
            raise ValueError(f"optim_args takes {', '.join(GROUP_KEYS)} for GaLore, not {part!r}")
    return words


def _pattern(model: nn.Module, targets: str | Sequence[str]) -> str | None:
    """Trainer's target modules as a regular expression for parameters' names; None for "all-linear"."""
    linear = {name: is_linear(module) for name, module in model.named_modules() if name}
    chosen: dict[str, None] = {}
    if isinstance(targets, str):
        if targets.replace("_", "-") == "all-linear":
            return None
        try:
            chosen = {name: None for name in linear if linear[name] and re.fullmatch(targets, name)}
        except re.error as error:
            raise ValueError(f"targets is no regular expression: {targets!r} ({error})") from None
        targets = ()
    for target in targets:
        found = [name for name in linear if target in name or _begins_with(target, name)]
        if not found:
            raise ValueError(f"optim_target_modules has {target!r}, which is in no module's name and matches none")
        if not any(linear[name] for name in found):
            said = f"optim_target_modules has {target!r}, which names no linear layer: it is left out, as by Trainer"
            warnings.warn(said, UserWarning, stacklevel=4)
        chosen.update({name: None for name in found if linear[name]})
    return rf"^(?:{'|'.join(map(re.escape, chosen))})\.weight$"


def _begins_with(expression: str, name: str) -> bool:
    """Whether a regular expression matches the beginning of a name, as Trainer asks of a list's words."""
    try:
        return re.match(expression, name) is not None
    except re.error:
        return False


def _decayed_apart(model: nn.Module, groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """Each group in two, those with weight decay and those without, by Trainer's ``get_decay_parameter_names``."""
    undecayed = {p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    undecayed |= {p for name, p in model.named_parameters() if UNDECAYED.search(name.lower())}
    out = []
    for group in groups:
        for wanted, value in ((True, decay), (False, 0.0)):
            params = [p for p in group["params"] if (p not in undecayed) == wanted]
            if params:
                out.append({**group, "params": params, "weight_decay": value})
    return out
