"""The vision transformer (Dosovitskiy et al., 2021, arXiv:2010.11929), in plain PyTorch.

Names of parameters, first random weights, outputs and what is saved for the backward pass are those of transformers'
``ViTForImageClassification``, to the bit (a test holds it), and folders of either are read by the other.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_STD = 0.02
NORM_EPS = 1e-6
"""The published models'; transformers' default is 1e-12."""


@dataclass(frozen=True)
class ViTConfig:
    """Sizes, by transformers' names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    """Pixels of the picture's side."""
    patch_size: int
    """Pixels of a patch's side."""
    num_labels: int
    num_channels: int = 3
    hidden_dropout_prob: float = 0.0
    """After the embeddings, attention's output and the MLP."""
    layer_norm_eps: float = NORM_EPS


class Patches(nn.Module):
    """(B, C, S, S) -> (B, n, d): a linear map of each patch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(pixels).flatten(2).transpose(1, 2)


class Embeddings(nn.Module):
    """A class token before the patches, and a learned position added to each: (B, C, S, S) -> (B, 1 + n, d)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        n = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.patch_embeddings = Patches(config)
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + n, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            height, width = pixels.shape[-2:]
            raise ValueError(f"the pictures have {height}×{width} pixels, and the model takes {self.image_size} a side")
        patches = self.patch_embeddings(pixels.to(self.patch_embeddings.projection.weight.dtype))
        token = self.cls_token.expand(len(patches), -1, -1)
        return self.dropout(torch.cat((token, patches), dim=1) + self.position_embeddings)


class Attention(nn.Module):
    """softmax(q kᵀ / √(d/heads)) v for each head: (B, n, d) -> (B, n, d)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.head_dim = d // config.num_attention_heads
        self.implementation: Literal["sdpa", "eager"] = "sdpa"
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.o_proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        scale = self.head_dim**-0.5
        if self.implementation == "eager":
            scores = torch.matmul(q, k.transpose(2, 3)) * scale  # (B, heads, n, n)
            mixed = torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.o_proj(mixed.transpose(1, 2).contiguous().reshape(x.shape))


class MLP(nn.Module):
    """W₂ gelu(W₁ x)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.attention(self.layernorm_before(x))) + x
        return self.dropout(self.mlp(self.layernorm_after(x))) + x


class Encoder(nn.Module):
    """The blocks between the embeddings and a last norm: (B, C, S, S) -> (B, 1 + n, d)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.apply(_initialize)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.layers:
            x = layer(x)
        return self.layernorm(x)


class Classified(NamedTuple):
    """What a classifier answers, as transformers' models do."""

    logits: Tensor
    """(B, classes)."""


class ViT(nn.Module):
    """A classifier by the class token: (B, C, S, S) -> (B, classes)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = Encoder(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier.apply(_initialize)

    def forward(self, pixel_values: Tensor) -> Classified:
        return Classified(self.classifier(self.vit(pixel_values)[:, 0, :]))

    def set_attn_implementation(self, implementation: Literal["sdpa", "eager"]) -> None:
        """Attention by PyTorch's kernel, or as products and a softmax."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.implementation = implementation

    def save_pretrained(self, path: Path | str) -> None:
        """A folder as transformers' ``from_pretrained`` and :func:`.vit.load_vit` read it."""
        from safetensors.torch import save_file

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: t.detach().contiguous() for n, t in self.state_dict().items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        sizes = asdict(self.config)
        labels = {str(i): f"LABEL_{i}" for i in range(sizes.pop("num_labels"))}
        settings = {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            "attention_probs_dropout_prob": 0.0,
            "hidden_act": "gelu",
            "id2label": labels,
            "label2id": {name: int(i) for i, name in labels.items()},
            "qkv_bias": True,
            **sizes,
        }
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    """Called on children first: each draws from torch's generator in transformers' order."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Embeddings):
        nn.init.trunc_normal_(module.position_embeddings, 0.0, INITIAL_STD)
        nn.init.trunc_normal_(module.cls_token, 0.0, INITIAL_STD)
