"""Packing: exactly k of n, against a slow twin; sizes from shapes alone; bits against the Shannon limit."""

import math
import subprocess
import sys

import pytest
import torch
from backrazor import bits, packing
from backrazor.groups import Groups, groups_for, rank, unrank
from backrazor.layout import layout_of
from backrazor.saved import Geometry, prune
from backrazor.values import decode, encode
from slow import entropy, pruned
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16])
@pytest.mark.parametrize("n", [1, 7, 8, 31])
def test_codes_come_back_from_the_fewest_bytes(width, n):
    codes = torch.randint(0, 1 << width, (3, n))
    packed = bits.pack(codes, width)
    assert packed.shape == (3, bits.packed_bytes(n, width))
    assert torch.equal(bits.unpack(packed, n, width).long(), codes)
    assert packed.shape[1] <= math.ceil(n * width / 8) + 3


@pytest.mark.parametrize("groups", [Groups(1, 2), Groups(3, 9), Groups(2, 67), Groups(5, 7)])
def test_every_subset_has_its_rank(groups):
    ranks = torch.arange(math.comb(groups.n, groups.k), dtype=torch.int32)
    places = unrank(ranks, groups)
    assert (places[1:] > places[:-1]).all()
    assert len({tuple(p) for p in places.T.tolist()}) == len(ranks)
    assert torch.equal(rank(list(places.int()), groups), ranks)


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.1, 0.05, 0.03, 0.01, 0.8, 0.001])
def test_stored_bits_are_within_the_shannon_limit(keep):
    groups = groups_for(keep)
    p = groups.k / groups.n
    assert abs(p - keep) <= 0.011 * keep
    limit = entropy(p) + 16 * p
    layout = layout_of(4, 30_000, groups, "bf16")
    tensors = packing.pack(torch.randn(4, 30_000), layout)
    stored = 8 * sum(t.nbytes for t in tensors) / (4 * 30_000)
    assert stored <= 1.1 * limit
    assert math.isclose(groups.shannon_bits(16), limit)
    assert sum(t.nbytes for t in tensors) == packing.stored_bytes(layout)


def test_everything_kept_is_dense():
    assert groups_for(1.0) is None
    assert groups_for(0.999) is None


KEEPS = (0.99, 0.5, 0.1, 0.03)
SHAPES = ((3, 7, 11), (1, 997), (2, 5, 3301), (40, 13), (5, 4001))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EVERY_PAIR = [(k, s, DTYPES[(i + j) % 3]) for i, k in enumerate(KEEPS) for j, s in enumerate(SHAPES)]


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "shape", "dtype"), EVERY_PAIR)
def test_the_largest_of_every_group_come_back(keep, shape, dtype):
    x = torch.randn(shape).to(dtype)
    saved = prune(x, groups_for(keep), "bf16")
    got = saved.recipe.rebuild(saved.tensors, dtype)
    assert got.shape == x.shape
    assert torch.equal(got, pruned(x, keep))


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 19])
def test_chunks_do_not_matter(monkeypatch, chunk):
    x = torch.randn(6, 17_000)
    layout = layout_of(6, 17_000, groups_for(0.1), "fp32")
    whole = packing.pack(x, layout)
    monkeypatch.setattr(packing, "CHUNK", chunk * 30)
    assert all(torch.equal(a, b) for a, b in zip(whole, packing.pack(x, layout), strict=True))


def test_ties_cannot_blow_up_and_nan_is_not_hidden():
    layout = layout_of(2, 20_000, groups_for(0.1), "fp32")
    for x in (torch.zeros(2, 20_000), torch.ones(2, 20_000), torch.randn(2, 20_000).relu()):
        got = packing.unpack(packing.pack(x, layout), layout, torch.float32)
        assert (got != 0).sum() <= 2 * layout.kept
        assert sum(t.nbytes for t in packing.pack(x, layout)) == packing.stored_bytes(layout)
    x = torch.randn(2, 20_000)
    x[1, 77], x[0, 5] = math.nan, math.inf
    got = packing.unpack(packing.pack(x, layout), layout, torch.float32).view(2, -1)
    assert math.isnan(got[1, 77])
    assert got[0, 5] == math.inf


def test_a_sample_is_packed_the_same_whatever_stands_beside_it():
    x = torch.randn(4, 20_011)
    groups = groups_for(0.1)
    together = packing.unpack(
        packing.pack(x, layout_of(4, 20_011, groups, "bf16")), layout_of(4, 20_011, groups, "bf16"), x.dtype
    )
    alone = layout_of(1, 20_011, groups, "bf16")
    for i in range(4):
        assert torch.equal(together.view(4, -1)[i], packing.unpack(packing.pack(x[i], alone), alone, x.dtype))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 6, 10, 20).to(memory_format=torch.channels_last),
        lambda: torch.randn(4, 40, 30).transpose(1, 2),
        lambda: torch.randn(4, 30, 60)[:, :, ::2],
        lambda: torch.randn(30, 1, 50).expand(30, 4, 50),
        lambda: torch.randn(2000),
    ],
)
def test_any_strides(make):
    x = make()
    saved = prune(x, groups_for(0.25), "fp32")
    got = saved.recipe.rebuild(saved.tensors, x.dtype)
    assert got.shape == x.shape
    assert torch.equal(got[got != 0], x[got != 0])
    assert 0.2 < (got != 0).float().mean() < 0.3
    if Geometry.of(x).stride == x.stride():
        assert got.stride() == x.stride()


@pytest.mark.parametrize(
    ("values", "error"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-11), ("int8", 1 / 254 + 2**-8)]
)
def test_formats_err_as_stated(values, error):
    x = torch.randn(3, 1000) * torch.logspace(-2, 2, 1000)
    got = decode(encode(x, values), values, 1000, torch.float32)
    scale = x.abs()
    if values == "int8":
        padded = torch.nn.functional.pad(scale, (0, 24)).view(3, 8, 128)
        scale = padded.amax(-1, keepdim=True).expand(3, 8, 128).reshape(3, -1)[:, :1000]
    assert ((got - x).abs() <= error * scale + (2**-25 if values == "fp16" else 1e-12)).all()
    assert encode(torch.tensor([[1e6, -1e6]]), "fp16")[0].tolist() == [[65504, -65504]]


@pytest.mark.parametrize("values", ["bf16", "int8", "fp32"])
def test_shapes_without_elements_are_the_real_ones(values):
    for shape in ((3, 50_000), (2, 700)):
        layout = layout_of(*shape, groups_for(0.1), values)
        real = packing.pack(torch.randn(shape), layout)
        with FakeTensorMode():
            fake = packing.pack(torch.randn(shape), layout)
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


TRITON = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
import torch
from backrazor import packing, triton_kernels
from backrazor.groups import groups_for
from backrazor.layout import Layout

torch.manual_seed(0)
for keep in (0.5, 0.1, 0.03):
    for spans, size in ((1, 500), (2, 4003)):
        for values in ("bf16", "fp32"):
            layout = Layout(spans, size, groups_for(keep), values)
            x = torch.randn(spans, size)
            x[0, :40] = 1.0  # ties
            kept, ranks = packing._pack_cpu(x, layout)
            got, got_ranks = triton_kernels.pack_cuda(x, layout)
            assert torch.equal(ranks, got_ranks), (keep, spans, values)
            assert torch.equal(kept, got), (keep, spans, values)
            dense = triton_kernels.unpack_cuda(kept.float(), ranks, layout)
            assert torch.equal(dense, packing.unpack(packing.pack(x, layout), layout, torch.float32))
            half = triton_kernels.pack_cuda(x.bfloat16(), layout)
            assert all(torch.equal(a, b) for a, b in zip(half, packing._pack_cpu(x.bfloat16(), layout)))

from backrazor import lowbit, triton_lowbit
from backrazor.rows import rows_of

for shape, channels in (((2, 83, 40), {2}), ((3, 7, 49), {1}), ((130, 9), {1}), ((2, 3, 200), {1})):
    for width in (2, 3, 4, 8):
        for dtype in (torch.float32, torch.bfloat16):
            x = (3 * torch.randn(shape) + 5 * torch.randn(shape[-1])).to(dtype)
            x[0, :5] = 1.5
            cut = rows_of(shape, channels, width)
            part = x.reshape(cut.blocks, cut.rows, cut.columns)
            ends = torch.empty((cut.blocks, cut.groups, 2, cut.columns), dtype=torch.bfloat16)
            codes = lowbit._codes(part, cut, ends)
            got_ends = torch.empty_like(ends)
            got = triton_lowbit.pack_cuda(part, cut, lowbit.shrink(width), got_ends)
            assert torch.equal(ends, got_ends), (shape, width, dtype)
            assert torch.equal(codes.view(-1), got), (shape, width, dtype)
            packed = lowbit.bits.pack(got, width)
            dense = triton_lowbit.unpack_cuda(got, got_ends, cut)
            assert torch.equal(dense, lowbit.unpack(packed, ends, cut, torch.float32)), (shape, width, dtype)
"""


@pytest.mark.slow
def test_triton_kernels_equal_the_cpu_path():
    pytest.importorskip("triton", reason="triton is not installed: it comes with PyTorch for CUDA")
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
