"""What a model's parts are called: its blocks, its task head, the matrices of attention and of the MLP."""

from collections.abc import Sequence

from memtrain_common.errors import UserError
from torch import nn

HEADS = ("classifier", "score", "head", "fc", "linear")
"""Task heads: transformers' classifiers; timm's; torchvision's ResNets; CIFAR's ResNet-20."""
ATTENTION = (
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query", "key", "value", "attention.output.dense",
    "attn.c_attn", "attn.c_proj", "attn.qkv", "attn.proj", "query_key_value", "attention.dense",
    *(f"{attention}.{x}" for attention in ("SelfAttention", "EncDecAttention") for x in "qkvo"),
)  # fmt: skip
MLP = (
    "fc1", "fc2", "intermediate.dense", "output.dense", "gate_proj", "up_proj", "down_proj", "mlp.c_fc", "mlp.c_proj",
    "dense_h_to_4h", "dense_4h_to_h", "wi", "wi_0", "wi_1", "wo",
)  # fmt: skip


def head_name(model: nn.Module) -> str | None:
    """The task head's name; None for a language model, whose output is tied to its embedding or is no task's."""
    return next((n for n in HEADS if isinstance(getattr(model, n, None), nn.Module)), None)


def heads_of(model: nn.Module, fresh: Sequence[str] = ()) -> tuple[str, ...]:
    """The task head and whatever else begins at random, each once: what is trained whole, whatever is trained else."""
    head = head_name(model)
    names = list(dict.fromkeys([*([head] if head else []), *fresh]))
    return tuple(n for n in names if not any(n.startswith(f"{other}.") for other in names))


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a name is one of the modules or lies in one."""
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def blocks(model: nn.Module, instead: str = "") -> dict[str, nn.Module]:
    """The repeated parts, by name: the outermost numbered modules with parameters ("vit.layers.0", "layer1.0").

    Args:
        instead: the end of the sentence: what they are for, and what a model without them can have.

    Raises:
        UserError: if there are none.
    """
    head = head_name(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2].isdigit()
        and not any(part.isdigit() for part in name.split(".")[:-1])
        and name.split(".")[0] != head
        and any(True for _ in module.parameters())
    }
    if not found:
        raise UserError(f"{type(model).__name__} has no numbered blocks{instead}")
    return found


def matrices(model: nn.Module, which: str, heads: Sequence[str] | None = None) -> list[str]:
    """Names of the layers that get adapters.

    Args:
        which: "attention", or "all": the MLP's and convolutions inside blocks too.
        heads: what is trained whole and gets none; the task head if None.

    Raises:
        UserError: if there are none.
    """
    heads = heads_of(model) if heads is None else heads
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if which == "all" else (nn.Linear,)
    layers = [
        (n, m)
        for n, m in model.named_modules()
        if (isinstance(m, kinds) or type(m).__name__ == "Conv1D") and not inside(n, heads)
    ]
    suffixes = ATTENTION if which == "attention" else (*ATTENTION, *MLP)
    chosen = [n for n, _ in layers if ends_in(n, suffixes)]
    if which == "all" and not chosen:  # a CNN: what lies in its blocks
        instead = " whose layers adapters could be on: choose train full, bitfit or head"
        of_blocks = tuple(f"{b}." for b in blocks(model, instead))
        chosen = [n for n, m in layers if n.startswith(of_blocks) and getattr(m, "groups", 1) == 1]
    if not chosen:
        there = ", ".join(sorted({n.rpartition(".")[2] for n, _ in layers})) or "none of this kind"
        raise UserError(f"{type(model).__name__} has no matrices of {which} to adapt; its layers are called {there}")
    return chosen


def ends_in(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a module's name is one of the suffixes or ends in "." and one."""
    return any(name == s or name.endswith("." + s) for s in suffixes)
