"""Parameter groups for a model: which weights GaLore projects."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from galore_vit.projection import layout_of, sides
from galore_vit.settings import GALORE_DEFAULTS

NUMBERED = re.compile(r"(^|\.)(encoder_layer_)?\d+\.")
"""Names inside numbered blocks: `blocks.3.`, and torchvision's `encoder_layer_3.`."""
HEAD = re.compile(r"^(module\.|model\.|_orig_mod\.)*(classifier|heads?)\.")
"""Names of a head, whose layers some models number: the last of them is the outputs'."""
FUSED_QKV = re.compile(r"(^|\.)(qkv|c_attn|in_proj|query_key_value|Wqkv)(_weight|\.weight)$")
"""Names of weights that hold q, k and v as three equal row blocks."""


def param_groups(
    model: nn.Module,
    rank: int,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    *,
    targets: str | None = None,
    conv: bool = False,
    split_qkv: bool = True,
    paper: bool = False,
) -> list[dict[str, Any]]:
    """Groups for a GaLore optimizer: plain parameters, projected ones, and those projected in parts.

    Projected are the trainable matrices of linear and attention modules and the stacks of experts inside numbered
    blocks (`blocks.3.attn.proj.weight`), which leaves out the head (of `classifier`, `head` or `heads` the last
    matrix), embeddings and everything one-dimensional.
    A three-dimensional weight that is no convolution's, such as LTE's factors A (H, r, n) and B (H, m, r) or
    a layer of experts (Mixtral's `gate_up_proj`), is a stack of matrices: each of them is projected apart.

    Args:
        model: its parameters that do not require a gradient are left out.
        rank: r.
        update_proj_gap: T, steps between two refreshes of a basis.
        scale: α.
        proj_type: `std`, `reverse_std`, `right`, `left` or `full`.
        targets: regular expression searched in the parameter's name, instead of the numbered blocks.
        conv: also project convolution weights, the patch embedding's among them, as out × (in · kernel).
        split_qkv: project q, k and v of a fused weight apart.
        paper: for an optimizer with `paper=True`, which takes a rank above every side too and rotates then.

    Raises:
        ValueError: where nothing would be projected.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, not {rank!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes the model, whose names it reads, not {type(model).__name__}")
    try:
        wanted = None if targets is None else re.compile(targets)
    except re.error as error:
        raise ValueError(f"targets is no regular expression: {targets!r} ({error})") from None
    plain: list[Tensor] = []
    parts: dict[int, list[Tensor]] = {1: []}  # by number of parts
    in_heads = [p for name, p, _ in _owned(model) if HEAD.match(name) and p.ndim >= 2]
    outputs = in_heads[-1] if in_heads else None
    for name, p, module in _owned(model):
        if not p.requires_grad:
            continue
        kernel = isinstance(module, nn.modules.conv._ConvNd) and p is module.weight
        if wanted is not None:
            chosen = p.ndim >= 2 and wanted.search(name) is not None
        elif kernel:
            chosen = conv
        else:
            holds_matrices = (
                is_linear(module) or isinstance(module, nn.modules.conv._ConvNd) or _are_experts(name, p, module)
            )
            in_block = NUMBERED.search(name) is not None and p is not outputs
            chosen = p.ndim >= 2 and holds_matrices and in_block
        if not chosen:
            plain.append(p)
            continue
        split = 1
        if p.ndim == 3 and not kernel:
            split = p.shape[0]
        elif split_qkv and isinstance(module, nn.Linear | nn.MultiheadAttention) and FUSED_QKV.search(name):
            split = 3 if p.shape[0] % 3 == 0 else 1
        parts.setdefault(split, []).append(p)
    keys = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    groups: list[dict[str, Any]] = [{"params": plain}]
    for split, params in parts.items():
        groups.append({"params": params, **keys, **({"split": split} if split > 1 else {})})
    _refuse_nothing(groups[1:], paper)
    return [g for g in groups if g["params"]]


def _owned(model: nn.Module) -> list[tuple[str, Tensor, nn.Module]]:
    """(name, parameter, module that holds it), each parameter once."""
    seen: set[Tensor] = set()
    found = []
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p not in seen:
                seen.add(p)
                found.append((f"{prefix}.{name}" if prefix else name, p, module))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix; GPT-2's Conv1D of transformers is a linear layer, transposed."""
    return isinstance(module, nn.Linear | nn.MultiheadAttention) or type(module).__name__ == "Conv1D"


def _are_experts(name: str, p: Tensor, module: nn.Module) -> bool:
    """A matrix each, in one parameter, as in transformers' mixtures; other parameters have three dimensions too."""
    speaks = f"{name} {type(module).__name__}".lower()
    return p.ndim == 3 and min(p.shape) > 1 and ("expert" in speaks or "moe" in speaks)


def _refuse_nothing(groups: list[dict[str, Any]], paper: bool) -> None:
    """Raises where not one weight would be projected: GaLore would then be plain Adam under another name."""
    weights = [(p, {**GALORE_DEFAULTS, **g, "paper": paper}) for g in groups for p in g["params"]]
    if not weights:
        raise ValueError(
            "GaLore finds no weight to project: no trainable matrix of a linear or attention layer but the head's lies "
            "in a numbered block of this model; name some by targets, or use a plain optimizer"
        )
    if all(layout_of(p.shape, g) is None for p, g in weights):
        largest = max(min(sides(p.shape, g["split"])[1:]) for p, g in weights)
        raise ValueError(
            f"GaLore would project nothing: rank {weights[0][1]['rank']} is not below the smaller side of "
            f"any targeted weight, {largest} at most; choose a rank below {largest}, or a plain optimizer"
        )
