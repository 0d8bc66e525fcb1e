"""Vision transformers: :mod:`.vit_model` by size, or with the weights of a file that :mod:`.vit_files` reads. Position
embeddings of another image size are resized by bicubic interpolation.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from .vit_files import norm_eps, read_vit
from .vit_model import NORM_EPS, ViT, ViTConfig

# width, blocks, heads: Touvron et al. (2021, arXiv:2012.12877) for Ti and S; Dosovitskiy et al. for B, L and H
SIZES = {
    "mini": (96, 4, 4),
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}


def patch_for(image_size: int) -> int:
    """A patch's side where none is given: the largest divisor of the image's side up to a quarter of it, and to 16."""
    return max(d for d in range(1, 17) if image_size % d == 0 and (d <= image_size // 4 or d == 1))


def build_vit(size: str, *, image_size: int, patch_size: int, classes: int, dropout: float = 0.0) -> ViT:
    """A ViT classifier with random weights.

    Args:
        size: a key of ``SIZES``.
        image_size: pixels of the input's side.
        patch_size: pixels of a patch's side, a divisor of it.
        classes: outputs.
        dropout: after the embeddings, attention's output and the MLP.
    """
    width, blocks, heads = SIZES[size]
    if image_size % patch_size:
        raise UserError(f"patches of {patch_size} pixels do not fill images of {image_size}: choose a divisor")
    return _vit(width, blocks, heads, 4 * width, image_size, patch_size, classes, dropout)


def _vit(
    width: int, blocks: int, heads: int, mlp: int, image: int, patch: int, classes: int, dropout: float = 0.0,
    eps: float = NORM_EPS,
) -> ViT:  # fmt: skip
    config = ViTConfig(
        width, blocks, heads, mlp, image, patch, classes, hidden_dropout_prob=dropout, layer_norm_eps=eps
    )
    return ViT(config)


def load_vit(path: Path, *, image_size: int, classes: int) -> tuple[ViT, bool]:
    """A pretrained ViT, and whether its head fits ``classes`` and was kept; a head that does not is fresh.

    Args:
        image_size: pixels of the input's side; 0 takes the file's own.
        path: a folder of transformers (``config.json``, ``model.safetensors``), Google's ``.npz``, timm's
            ``.safetensors``, ``base_vit``'s ``.pth`` or its ``.safetensors``, or ``timm:NAME`` for the weights that an
            installed timm has or fetches by that name.

    Raises:
        UserError: if it is none of them.
    """
    try:
        tensors, heads = read_vit(path)
        width, _, patch, _ = tensors["vit.embeddings.patch_embeddings.projection.weight"].shape
        mlp = tensors["vit.layers.0.mlp.fc1.weight"].shape[0]
        blocks = 1 + max(int(m[1]) for m in (re.match(r"vit\.layers\.(\d+)\.", n) for n in tensors) if m)
        positions = "vit.embeddings.position_embeddings"
        image_size = image_size or patch * round((tensors[positions].shape[1] - 1) ** 0.5)
        if image_size % patch:
            raise UserError(f"{path} has patches of {patch} pixels, which do not fill images of {image_size}")
        heads = heads or max(1, width // 64)
        model = _vit(width, blocks, heads, mlp, image_size, patch, classes, eps=norm_eps(path))
        tensors[positions] = resize_positions(tensors[positions], image_size // patch)
    except KeyError as error:
        raise UserError(f"{path} is not a ViT: it has no {error.args[0]}") from None
    own = model.state_dict()
    names = ("classifier.weight", "classifier.bias")
    head: dict[str, Tensor] = {n: tensors.pop(n) for n in names if n in tensors}
    kept = bool(head) and all(head[n].shape == own[n].shape for n in head)
    tensors.update(head if kept else {n: own[n] for n in names})
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        what = f"it has no {missing[0]}" if missing else f"it has {unknown[0]}, which a ViT lacks"
        raise UserError(f"{path} is not a ViT: {what}")
    wrong = [n for n in own if tensors[n].shape != own[n].shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path} is not a ViT: its {name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        )
    model.load_state_dict(tensors)
    return model, kept


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + n², d) position embeddings, the class token's first, to (1, 1 + side², d)."""
    token, grid = positions[:, :1], positions[:, 1:]
    n = round(grid.shape[1] ** 0.5)
    if n == side:
        return positions
    square = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)  # (1, d, n, n)
    resized = nn.functional.interpolate(square.float(), (side, side), mode="bicubic", antialias=side < n)
    return torch.cat([token, resized.flatten(2).mT.to(token.dtype)], dim=1)
