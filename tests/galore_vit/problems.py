"""Small regression problems and a slow GaLore written from the paper's equations."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

KEYS = {"rank": 5, "update_proj_gap": 20, "scale": 0.25, "proj_type": "std"}


def weights(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    """Gradients of a noisy regression towards fixed targets: they depend on the weights and on the step."""
    draw = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        target = torch.full(p.shape, 0.1 * (i + 1), dtype=p.dtype)
        if p.ndim < 2:
            p.grad = (p - target).detach().clone()
            continue
        flat, goal = p.detach().flatten(1).double(), target.flatten(1).double()
        X = torch.randn(9, flat.shape[1], generator=draw).double()
        p.grad = ((flat - goal) @ X.T @ X / 9).view(p.shape).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], start: int, stop: int) -> None:
    for step in range(start, stop):
        set_grads(params, step)
        optimizer.step()


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 10))


def mlp_groups(model: nn.Module, **keys: object) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [{"params": [p for p in model.parameters() if p.ndim < 2]}, {"params": matrices, **KEYS, **keys}]


def mlp_batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(500 + step)
    x = torch.randn(size, 12, generator=draw)
    return x, x[:, :10].sin() + x[:, 2:].cos()


def backward(model: nn.Module, step: int, size: int = 16) -> Tensor:
    x, y = mlp_batch(step, size)
    dtype = next(model.parameters()).dtype
    loss = ((model(x.to(dtype)) - y.to(dtype)) ** 2).mean()
    loss.backward()
    return loss.detach()


def same(a: list[Tensor] | nn.Module, b: list[Tensor] | nn.Module, rtol: float = 0.0) -> bool:
    """Equal to the bit, or to a relative error of the whole tensor."""
    xs, ys = (list(m.parameters()) if isinstance(m, nn.Module) else m for m in (a, b))
    if rtol == 0.0:
        return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
    return all(((x - y).norm() <= rtol * y.norm()).item() for x, y in zip(xs, ys, strict=True))


def copied(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return copy.deepcopy(params)


class ReferenceGaLore:
    """Algorithm 2 of the paper for one m×n matrix in float64, plainly: exact SVD, Adam, project back.

    `sides` is one of 'left', 'right', 'full'. The moments are not rotated.
    """

    def __init__(self, W: Tensor, rank: int, gap: int, scale: float, sides: str, lr: float, weight_decay: float = 0.0):
        self.W, self.r, self.gap, self.scale, self.sides = W.clone().double(), rank, gap, scale, sides
        self.lr, self.weight_decay, self.t = lr, weight_decay, 0
        self.b1, self.b2, self.eps = 0.9, 0.999, 1e-8
        self.M = self.V = torch.zeros(())

    def step(self, G: Tensor) -> None:
        G = G.double()
        if self.t % self.gap == 0:
            U, _, Vh = torch.linalg.svd(G)
            self.P, self.Q = U[:, : self.r], Vh[: self.r].T  # (m, r), (n, r)
        R = G
        if self.sides in ("left", "full"):
            R = self.P.T @ R
        if self.sides in ("right", "full"):
            R = R @ self.Q
        self.t += 1
        self.M = self.b1 * self.M + (1 - self.b1) * R
        self.V = self.b2 * self.V + (1 - self.b2) * R**2
        N = self.M / (1 - self.b1**self.t) / ((self.V / (1 - self.b2**self.t)).sqrt() + self.eps)
        if self.sides in ("left", "full"):
            N = self.P @ N
        if self.sides in ("right", "full"):
            N = N @ self.Q.T
        self.W = self.W - self.lr * self.weight_decay * self.W - self.lr * self.scale * N
