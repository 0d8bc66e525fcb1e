"""Bases from the gradient: the leading subspaces of dL/dW over a few batches (as LoRA-SB, arXiv 2411.19557, does).

    G = Σ dL/dW ≈ U_r S V_rᵀ,    B = U_r (out×r),   A = V_rᵀ (r×in)

R starts near zero, or with `first_step` = η where the update is a step down that gradient:

    (α/r)·B R A = −c·U_r S V_rᵀ,    c such that its root mean square over the out·in entries is η

A randomised range finder in two passes over the batches (Halko, Martinsson, Tropp 2011, algorithm 5.1): the first
gathers Y = G Ω, whose span Q (out×k, k = r + 10) holds almost all of G's; the second Z = QᵀG, whose singular vectors
are wanted. Each gradient is projected when the backward pass has made it, and dropped: one weight's is held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .bases import Request
from .config import LoRAXSConfig
from .errors import LoRAXSError
from .kinds import is_quantized
from .svd import full_precision, generator, with_canonical_signs

OVERSAMPLING = 10

Losses = Callable[[], Iterable[Tensor]]
"""Gives the scalar losses of the batches, one after another; called twice, with the same batches."""


@dataclass
class _Sketch:
    """Of one weight's G (out×in, or n×out×in): first Y = G Ω, then Z = QᵀG."""

    request: Request
    omega: Tensor
    """(in×k)"""
    Q: Tensor | None = None
    """(out×k) once the first pass is over."""
    total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Project a gradient that the backward pass has just made."""
        G = self.request.target.kind.to_matrix(gradient).float()
        part = G @ self.omega if self.Q is None else self.Q.mT @ G
        self.total = part if self.total is None else self.total.add_(part)

    def take(self) -> Tensor:
        """What was gathered over all processes, for the next pass to begin anew."""
        if self.total is None:
            raise LoRAXSError(
                f'init="gradient" got no gradient for {self.request.name}: the batches never reach it; exclude it, or '
                "give others"
            )
        gathered, self.total = self.total, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(gathered)
        return gathered


def gradient_bases(
    model: nn.Module, requests: list[Request], config: LoRAXSConfig, losses: Losses
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A (r×in) and B (out×r), both orthonormal, in the weight's type, and R (r×r) to start at, for each request.

    In a process group each process gives batches of its own, and all get the same bases.
    """
    quantized = [r.name for r in requests if is_quantized(r.weight)]
    if quantized:
        raise LoRAXSError(f'init="gradient" needs the gradient of {quantized[0]}, whose weight is quantised')
    sketches = []
    for request in requests:
        *_, out, width = request.shape
        if request.rank > min(out, width):
            raise LoRAXSError(f"rank {request.rank} is larger than {request.name}, a {out}×{width} matrix")
        k = min(request.rank + OVERSAMPLING, out, width)
        draw = torch.randn(width, k, generator=generator(config.seed, "gradient", request.name))
        sketches.append(_Sketch(request, draw.to(request.weight.device)))
    _pass(model, sketches, config, losses)
    for sketch in sketches:
        with full_precision(sketch.omega.device):
            sketch.Q = torch.linalg.qr(sketch.take()).Q
    _pass(model, sketches, config, losses)
    return [_bases(sketch, config) for sketch in sketches]


def _pass(model: nn.Module, sketches: list[_Sketch], config: LoRAXSConfig, losses: Losses) -> None:
    """One pass over the batches: each weight's gradient goes to its sketch."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    # Running statistics; whole numbers are a quantised weight's, or indices.
    buffers = [(b, b.clone()) for b in model.buffers() if b.is_floating_point() or b.dim() == 0]
    handles = []
    of_weight: dict[Tensor, list[_Sketch]] = {}  # several modules may share one
    for sketch in sketches:
        of_weight.setdefault(sketch.request.weight, []).append(sketch)

    def gather(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.detach(), None
        for sketch in of_weight[parameter]:
            sketch.add(gradient.to_dense() if gradient.is_sparse else gradient)

    try:
        model.requires_grad_(False)
        for parameter, _, _ in before:
            parameter.grad = None
        for weight in of_weight:
            handles.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(gather))
        # The same dropout in both passes, and the caller's random numbers as they were.
        devices = sorted({p.device.index or 0 for p, _, _ in before if p.device.type == "cuda"})
        with torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            for loss in losses():
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted, grad in before:
            parameter.requires_grad_(wanted)
            parameter.grad = grad
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)


def _bases(sketch: _Sketch, config: LoRAXSConfig) -> tuple[Tensor, Tensor, Tensor]:
    Z, rank, weight = sketch.take(), sketch.request.rank, sketch.request.weight
    assert sketch.Q is not None
    with full_precision(Z.device):
        U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
        A, B = Vh[..., :rank, :], sketch.Q @ U[..., :rank]
    R = first_step(S[..., :rank], (B.shape[-2], A.shape[-1]), config.first_step / config.scale_of(sketch.request.name))
    if A.ndim == 3:
        pairs = [with_canonical_signs(a, b) for a, b in zip(A, B, strict=True)]
        A, B = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    else:
        A, B = with_canonical_signs(A, B)
    A, B = A.to(weight.dtype).contiguous(), B.to(weight.dtype).contiguous()
    if dist.is_available() and dist.is_initialized():
        for part in (A, B, R):
            dist.broadcast(part, 0)
    return A, B, R


def first_step(S: Tensor, shape: tuple[int, int], eta: float) -> Tensor:
    """R (r×r, or n×r×r) for which B R A has the direction −U S Vᵀ and a root mean square of ``eta``.

    Args:
        S: singular values (r), or (n×r); all zero (an expert that no token was sent to) give no step.
        shape: (out, in) of the weight.
    """
    length = S.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
    return torch.diag_embed(S * (-eta * math.sqrt(shape[0] * shape[1]) / length))
