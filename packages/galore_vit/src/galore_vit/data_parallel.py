"""DistributedDataParallel that sends projected gradients: R (m×r) instead of G (m×n)."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from galore_vit.galore import GaLore
from galore_vit.projection import project, project_back


def projected_all_reduce(
    optimizer: GaLore, process_group: dist.ProcessGroup | None = None
) -> Callable[[object, dist.GradBucket], Future[Tensor]]:
    """A communication hook: `ddp.register_comm_hook(None, projected_all_reduce(optimizer))`.

    The mean of the projected gradients is the projected mean, and a gradient put back together from it,
    P R Q, projects to R again: the optimizer notices nothing. A weight whose basis is due at the next step
    sends its gradient whole, so that the basis is that of the mean; with staggered refreshes that is one
    weight in `update_proj_gap` per step. `.grad` then holds only what lies in the subspace, and a norm taken
    from it (for clipping) is that of the projected gradient.
    """
    if not isinstance(optimizer, GaLore):
        raise TypeError(f"projected_all_reduce is for a GaLore optimizer, not {type(optimizer).__name__}")
    if optimizer.whole_gradients:
        raise ValueError(
            f"{type(optimizer).__name__} moves weights by full gradients, and projected ones alone would be sent: use "
            "DistributedDataParallel without this hook"
        )
    for group in optimizer.param_groups:
        if group.get("residual"):
            raise ValueError("the residual is not reduced with projected gradients: set residual=False")
    group_in_use = process_group or dist.group.WORLD
    if group_in_use is None:
        raise RuntimeError("there are no processes to reduce over yet: call torch.distributed.init_process_group first")
    optimizer.process_group = group_in_use

    # DistributedDataParallel reads these annotations as types, so this file must not make strings of them.
    @torch.no_grad()
    def hook(_: object, bucket: dist.GradBucket) -> Future[Tensor]:
        pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        held = {p for group in optimizer.param_groups for p in group["params"]}
        pieces = [_sent(optimizer, p, g) if p in held else g for p, g in pairs]  # the others are another optimizer's
        flat = torch.cat([piece.reshape(-1) for piece in pieces]).div_(group_in_use.size())
        work = dist.all_reduce(flat, group=group_in_use, async_op=True)
        assert work is not None

        def put_back(future: Future[list[Tensor]]) -> Tensor:
            means = future.value()[0].split([piece.numel() for piece in pieces])
            with torch.no_grad():
                for (p, g), piece, mean in zip(pairs, pieces, means, strict=True):
                    whole = mean.view(piece.shape)
                    if piece is not g:
                        whole = project_back(whole, optimizer.bases(p)).reshape(g.shape)
                    g.copy_(whole)
            return bucket.buffer()

        return work.get_future().then(put_back)

    return hook


def _sent(optimizer: GaLore, p: Tensor, g: Tensor) -> Tensor:
    """What of p's gradient goes over the wire: R, or g itself."""
    layout = optimizer.layout(p)
    if layout is None or optimizer.refresh_due(p):
        return g
    return project(layout.matrices(g), optimizer.bases(p))
