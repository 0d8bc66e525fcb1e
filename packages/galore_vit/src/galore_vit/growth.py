"""Fira's limit on how fast a weight's update may grow (arXiv:2410.01623, Section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_vit import sharding


def limited_growth(norm: Tensor, last: Tensor, moved: Tensor, limit: float) -> Tensor:
    """What an update is multiplied by, so that its norm is at most `limit` times that of the step before, `last`.

    Norms are taken as if all channels had moved, u = ‖U‖ √(channels / channels that moved): the rows of an embedding
    that a batch lacks do not move, and the norm alone would follow the number of its tokens. The published code
    compares the norms themselves, which is the same where every channel moves.

    Args:
        norm: ‖U‖ (), on every process.
        last: u of the step before, limited, or 0 before the first; u of this one is written there.
        moved: a number a channel, above 0 where it moves; may be sharded.
    """
    share = sharding.gathered((moved > 0).sum(dtype=norm.dtype)) / moved.numel()  # numel is that of all shards
    u = norm * share.clamp_min(1 / max(moved.numel(), 1)).rsqrt()
    limited = torch.where(last > 0, torch.minimum(u, limit * last), u)
    last.copy_(torch.where(u > 0, limited, last))
    return torch.where(u > 0, limited / u.clamp_min(torch.finfo(u.dtype).tiny), 0.0)
