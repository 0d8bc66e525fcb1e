"""DDP and FSDP2 on two processes: the gradients of one process on the whole batch."""

import pytest
import torch
from backrazor import Razor
from support import run_ranks
from torch import nn


def build():
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))  # noqa: E731
    return nn.Sequential(block(), block())


def batch():
    return torch.randn(2, 1024, 32, generator=torch.Generator().manual_seed(1))


def whole_gradients():
    model = build()
    for part in batch().split(1):
        with Razor(0.1):
            loss = model(part).square().mean() / 2
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def ddp(expected):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    model = DistributedDataParallel(build())
    with Razor(0.1):
        loss = model(batch()[dist.get_rank()][None]).square().mean()
    loss.backward()
    for name, p in model.module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def fsdp(expected):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = build()
    for block in model:
        fully_shard(block)
    fully_shard(model)
    with Razor(0.1):
        loss = model(batch()[dist.get_rank()][None]).square().mean()
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)


def test_ddp():
    run_ranks(2, ddp, whole_gradients())


@pytest.mark.slow
def test_fsdp2():
    run_ranks(2, fsdp, whole_gradients())
