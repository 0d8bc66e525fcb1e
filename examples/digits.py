"""What the examples share: scikit-learn's digits as tensors, and a small network. Each shows its own training loop."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels (1400, 64) and labels, test pixels (397, 64) and labels."""
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 8 - 1, torch.tensor(found.target)
    return x[:1400], y[:1400], x[1400:], y[1400:]


def network() -> nn.Module:
    """64 pixels to 10 classes, four wide layers between."""
    torch.manual_seed(0)
    wide = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.GELU(), nn.LayerNorm(256))]
    return nn.Sequential(nn.Linear(64, 256), nn.Sequential(*wide), nn.Linear(256, 10))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())
