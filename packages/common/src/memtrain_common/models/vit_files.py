"""The files that a ViT's weights come in, read under transformers' names (:func:`memtrain_common.models.vit.load_vit`).

Google's (``ViT-S_16.npz``, Dosovitskiy et al., 2021, arXiv:2010.11929) keep kernels as (in, out), heads apart; timm's
keep q, k and v as one matrix; LoRA-ViT's ``base_vit`` starts from lukemelas/PyTorch-Pretrained-ViT's
(``B_16_imagenet1k.pth``).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.unpacking import NPZ_ERRORS, check_unpacked, npz_reason
from ..errors import UserError
from ..files import read_json
from .vit_model import NORM_EPS

BY_NAME = "timm:"
"""Before the name of a timm model."""


def norm_eps(path: Path) -> float:
    """ε of the layer norms: that of a folder's configuration, or the published models'.

    Raises:
        UserError: if the folder's model computes something else than this project's ViT.
    """
    if not path.is_dir():
        return NORM_EPS
    said = read_json(path / "config.json")
    if said.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has the activation {said['hidden_act']!r}, and this ViT computes 'gelu' alone")
    if not said.get("qkv_bias", True):
        raise UserError(f"{path} has no biases of q, k and v, which this ViT has")
    return float(said.get("layer_norm_eps", 1e-12))  # transformers' default


def read_vit(path: Path) -> tuple[dict[str, Tensor], int]:
    """Tensors under transformers' names, and the number of heads; 0 where the file does not tell."""
    if str(path).startswith(BY_NAME):
        return _from_timm(str(path).removeprefix(BY_NAME))
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _from_google(path)
    if path.suffix == ".safetensors" and path.is_file():
        return _by_names(read_safetensors(path))
    if path.suffix == ".pth" and path.is_file():
        return _by_names(read_state_dict(path))
    raise UserError(
        f"{path} holds no ViT: give a folder of transformers with config.json, Google's .npz, timm's .safetensors, "
        f"base_vit's .pth, or {BY_NAME}NAME"
    )


def _by_names(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    return base_vit_tensors(found) if "class_token" in found else timm_tensors(found)


def _from_folder(path: Path) -> tuple[dict[str, Tensor], int]:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json: a folder of transformers holds config.json and model.safetensors")
    try:
        settings = read_json(path / "config.json")
        kind, heads = settings.get("model_type"), int(settings.get("num_attention_heads", 0))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path / 'config.json'} is not a model's configuration ({error})") from None
    if kind != "vit":
        raise UserError(f"{path} holds a {kind!r} model, and a 'vit' is needed")
    if heads < 1:
        raise UserError(f"{path / 'config.json'} has no num_attention_heads: a ViT's configuration names it")
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= read_safetensors(file)
    if not tensors:
        raise UserError(f"{path} has no safetensors file: save the model with save_pretrained")
    return {_renamed(n): t for n, t in tensors.items() if ".pooler." not in n}, heads


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from ``.safetensors``, or from PyTorch's format, of which nothing but tensors is unpickled.

    A "state_dict" around them is opened, and the "module." of DataParallel is taken off their names.

    Raises:
        UserError: if it is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there: --weights needs a file of weights")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch, pickle and zipfile each fail by classes of their own, and advise to load it anyway
        raise UserError(f"{path} is damaged, or holds more than tensors, and is not read: save weights alone") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"{path} holds no state dict: weights are tensors by name")
    return {str(n).removeprefix("module."): t for n, t in found.items()}


# transformers before its version 5 -> since then; files of both are about
_OLD = (
    ("vit.encoder.layer.", "vit.layers."),
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def _renamed(name: str) -> str:
    if not name.startswith(("vit.", "classifier.")):
        name = f"vit.{name}"  # saved without a head
    for old, new in _OLD:
        name = name.replace(old, new)
    return name


def _from_google(path: Path) -> tuple[dict[str, Tensor], int]:
    import numpy as np

    try:
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except NPZ_ERRORS as error:
        raise UserError(f"{path} is damaged or no npz file of numbers: {npz_reason(error)}") from None
    return google_tensors(found)


def google_tensors(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Google's arrays under transformers' names; and the number of heads."""
    prefix = "Transformer/encoderblock_"
    blocks = sorted({int(n.removeprefix(prefix).split("/")[0]) for n in found if n.startswith(prefix)})
    out = {
        "vit.embeddings.cls_token": found["cls"],
        "vit.embeddings.position_embeddings": found["Transformer/posembed_input/pos_embedding"],
        "vit.embeddings.patch_embeddings.projection.weight": found["embedding/kernel"].permute(3, 2, 0, 1),  # HWIO
        "vit.embeddings.patch_embeddings.projection.bias": found["embedding/bias"],
        "vit.layernorm.weight": found["Transformer/encoder_norm/scale"],
        "vit.layernorm.bias": found["Transformer/encoder_norm/bias"],
    }
    heads = 0
    for i in blocks:
        old, new = f"{prefix}{i}", f"vit.layers.{i}"
        attention = f"{old}/MultiHeadDotProductAttention_1"
        for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            kernel = found[f"{attention}/{theirs}/kernel"]  # (d, heads, d/heads)
            heads = kernel.shape[1]
            out[f"{new}.attention.{ours}.weight"] = kernel.flatten(1).mT
            out[f"{new}.attention.{ours}.bias"] = found[f"{attention}/{theirs}/bias"].flatten()
        out[f"{new}.attention.o_proj.weight"] = found[f"{attention}/out/kernel"].flatten(0, 1).mT
        out[f"{new}.attention.o_proj.bias"] = found[f"{attention}/out/bias"]
        for j, name in ((0, "fc1"), (1, "fc2")):
            out[f"{new}.mlp.{name}.weight"] = found[f"{old}/MlpBlock_3/Dense_{j}/kernel"].mT
            out[f"{new}.mlp.{name}.bias"] = found[f"{old}/MlpBlock_3/Dense_{j}/bias"]
        for j, name in ((0, "layernorm_before"), (2, "layernorm_after")):
            out[f"{new}.{name}.weight"] = found[f"{old}/LayerNorm_{j}/scale"]
            out[f"{new}.{name}.bias"] = found[f"{old}/LayerNorm_{j}/bias"]
    if "head/kernel" in found:
        out |= {"classifier.weight": found["head/kernel"].mT, "classifier.bias": found["head/bias"]}
    return {name: tensor.contiguous() for name, tensor in out.items()}, heads


def _from_timm(name: str) -> tuple[dict[str, Tensor], int]:
    try:
        import timm
    except ImportError:
        raise UserError(
            f"{BY_NAME}{name} needs the package timm: pip install timm, or give the path of a file"
        ) from None
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # of many libraries: no such name, no such weights, no network
        raise UserError(f"timm gives no weights named {name}: {str(error).splitlines()[0]}") from None
    tensors, _ = timm_tensors(model.state_dict())
    return tensors, model.blocks[0].attn.num_heads


def timm_tensors(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """A timm ``vit_*_patch*`` model's tensors under transformers' names; and 0 heads, which it does not tell."""
    names = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}
    modules = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    out = {}
    for name, tensor in found.items():
        module, _, part = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.(.+)", module)
        if name in names:
            out[names[name]] = tensor
        elif module in modules:
            out[f"{modules[module]}.{part}"] = tensor
        elif block and block[2] == "attn.qkv":
            for ours, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                out[f"vit.layers.{block[1]}.attention.{ours}.{part}"] = piece.contiguous()
        elif block:
            out[f"vit.layers.{block[1]}.{inner.get(block[2], block[2])}.{part}"] = tensor
        else:
            out[name] = tensor
    return out, 0


def base_vit_tensors(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The tensors of LoRA-ViT's ``base_vit`` under transformers' names; and 0 heads, which they do not tell.

    ``pre_logits``, of the models with 21,843 classes, is left out, as ``base_vit`` itself leaves it out.
    """
    names = {
        "class_token": "vit.embeddings.cls_token",
        "positional_embedding.pos_embedding": "vit.embeddings.position_embeddings",
    }
    modules = {
        "patch_embedding": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "fc": "classifier",
    }
    inner = {
        "attn.proj_q": "attention.q_proj",
        "attn.proj_k": "attention.k_proj",
        "attn.proj_v": "attention.v_proj",
        "proj": "attention.o_proj",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "pwff.fc1": "mlp.fc1",
        "pwff.fc2": "mlp.fc2",
    }
    out = {}
    for name, tensor in found.items():
        module, _, part = name.rpartition(".")
        block = re.match(r"transformer\.blocks\.(\d+)\.(.+)", module)
        if name in names:
            out[names[name]] = tensor
        elif module in modules:
            out[f"{modules[module]}.{part}"] = tensor
        elif block:
            out[f"vit.layers.{block[1]}.{inner.get(block[2], block[2])}.{part}"] = tensor
        elif module != "pre_logits":
            out[name] = tensor
    return out, 0
