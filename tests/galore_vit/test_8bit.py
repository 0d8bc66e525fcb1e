"""8-bit moments: their storage, and that nothing small freezes."""

import problems
import pytest
import torch
from galore_vit import GaLoreAdamW, GaLoreAdamW8bit, block8bit, state_bytes
from galore_vit.block8bit import code_values, decode, encode, scale_count
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_256_values_over_seven_decades(signed):
    values = code_values(signed)
    assert len(values) == len(set(values)) == 256
    assert values[-1] == 1.0
    assert (min(values) < -0.99) == signed
    assert min(v for v in values if v > 0) < 1e-6


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (3, 5, 111)])
def test_round_trip_is_the_nearest_code(signed, shape):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw) * 10 ** torch.randn(shape, generator=draw)
    x = x if signed else x.abs()
    codes, scales = torch.zeros(shape, dtype=torch.uint8), torch.zeros(scale_count(x.numel()))
    encode(x, codes, scales, signed=signed)
    found = decode(codes, scales, signed=signed)
    values = torch.tensor(code_values(signed))
    for start in range(0, x.numel(), 256):  # slowly: each number against all 256
        block, got = x.flatten()[start : start + 256], found.flatten()[start : start + 256]
        best = ((block / block.abs().max()).unsqueeze(1) - values).abs().min(1).values * block.abs().max()
        limit = 1e-6 * block.abs().max()
        assert ((block - got).abs() <= best + limit).all()


def test_a_prediction_on_fake_tensors_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(block8bit, "_kept_tables", {})

    def round_trip():
        x = torch.linspace(-1, 1, 300)
        codes, scales = torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
        encode(x, codes, scales, signed=True)
        return decode(codes, scales, signed=True)

    with FakeTensorMode():
        round_trip()
    assert type(round_trip()) is torch.Tensor
    with FakeTensorMode():  # nor does what ran before it change what it counts
        assert type(block8bit._tables(True, torch.zeros(1))[0]) is FakeTensor


def test_zero_stays_zero_and_nothing_else_becomes_zero():
    x = torch.tensor([0.0, 1e-30, 1.0])
    codes, scales = torch.zeros(3, dtype=torch.uint8), torch.zeros(1)
    encode(x, codes, scales, signed=False)
    found = decode(codes, scales, signed=False)
    assert found[0] == 0
    assert found[1] > 0
    encode(torch.zeros(3), codes, scales, signed=False)
    assert (decode(codes, scales, signed=False) == 0).all()


@pytest.mark.parametrize("shape", [(1,), (5,), (9, 7), (24, 16), (400, 80)])
def test_small_tensors_never_freeze(shape):
    """The published 8-bit step leaves weights whose compact gradient is small exactly as they were."""
    W = torch.nn.Parameter(torch.zeros(shape))
    keys = {**problems.KEYS, "rank": 2} if len(shape) == 2 else {}
    optimizer = GaLoreAdamW8bit([{"params": [W], **keys}], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        before = W.detach().clone()
        problems.set_grads([W], step)
        W.grad += 0.01
        optimizer.step()
        assert (W - before).norm() > 1e-4


def distance(params):
    """How far the weights are from the solution of the regression."""
    return float(sum((p - 0.1 * (i + 1)).norm() for i, p in enumerate(params)))


@pytest.mark.slow
def test_learns_like_32_bits():
    shapes = [(400, 80), (80, 400), (7,)]
    wide, narrow = problems.weights(*shapes), problems.weights(*shapes)
    keys = {**problems.KEYS, "rank": 16}
    a = GaLoreAdamW([{"params": wide, **keys}], lr=1e-1)
    b = GaLoreAdamW8bit([{"params": narrow, **keys}], lr=1e-1, weight_decay=0.0)
    start = distance(wide)
    problems.train(a, wide, 0, 80)
    problems.train(b, narrow, 0, 80)
    assert distance(wide) < 0.95 * start
    assert distance(narrow) == pytest.approx(distance(wide), rel=0.05)
    assert state_bytes(b) < 0.62 * state_bytes(a)  # fp32 bases stay; the moments shrink fourfold
