"""The C kernels: the same bits as the vectorised torch, threads or none, and words where there is no compiler."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from backrazor import Razor, bits, coded, cpu_kernels, packing, values
from backrazor.groups import groups_for
from backrazor.layout import Layout
from backrazor.ops.pointwise import ACTIVATIONS, derivative_steps

pytestmark = pytest.mark.skipif(cpu_kernels.library() is None, reason="no C compiler: there are no kernels to compare")


def by_torch(monkeypatch, call):
    """What ``call`` gives without the kernels."""
    with monkeypatch.context() as m:
        m.setattr(cpu_kernels, "library", lambda: None)
        return call()


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "threads"), [(0.9, 1), (0.5, 1), (0.2, 1), (0.1, 1), (0.03, 1), (0.004, 1), (0.1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_the_same_to_the_bit(monkeypatch, keep, dtype, threads):
    groups = groups_for(keep)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for spans, size in ((1, groups.n), (3, 7 * groups.n - 1), (2, 20_003), (5, groups.n * (groups.n + 260) - 5)):
            for written in ("bf16", "fp32", "int8", "fp16") if keep == 0.1 else ("bf16",):
                layout = Layout(spans, size, groups, written)
                x = torch.randn(spans, size).to(dtype)
                x[0, : size // 3] = 1.0  # ties
                if written != "int8":  # whose scale would be infinite
                    x[-1, -1] = torch.inf
                quick = packing.pack(x, layout)
                slow = by_torch(monkeypatch, lambda x=x, layout=layout: packing.pack(x, layout))
                for a, b in zip(quick, slow, strict=True):
                    assert a.shape == b.shape
                    assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
                dense = packing.unpack(quick, layout, torch.float32)
                slow = by_torch(monkeypatch, lambda q=quick, layout=layout: packing.unpack(q, layout, torch.float32))
                assert torch.equal(dense.nan_to_num(), slow.nan_to_num())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 7, 255, 4097, 100_003])
def test_codes_are_the_same_to_the_bit(monkeypatch, n):
    for width in range(1, 9):
        codes = torch.randint(0, 1 << width, (n,), dtype=torch.uint8)
        packed = bits.pack(codes, width)
        assert torch.equal(packed, by_torch(monkeypatch, lambda c=codes, w=width: bits.pack(c, w)))
        assert torch.equal(bits.unpack(packed, n, width), codes)
    x, g = 3 * torch.randn(n), torch.randn(n)
    activation = ACTIVATIONS[F.gelu]
    for levels in activation.levels.values():
        steps = derivative_steps(activation, (), levels)
        quick = coded.code(x, steps, levels)
        slow = by_torch(monkeypatch, lambda s=steps, levels=levels: coded.code(x, s, levels))
        assert torch.equal(quick.tensors[0], slow.tensors[0])
        recipe = quick.recipe
        torch.testing.assert_close(
            recipe.times(quick.tensors, g),
            by_torch(monkeypatch, lambda r=recipe, q=quick: r.times(q.tensors, g)),
            rtol=0,
            atol=0,
        )


def test_eight_bits_are_the_same_to_the_bit(monkeypatch):
    x = torch.randn(3, 1000) * torch.logspace(-30, 20, 1000)
    quick, slow = values.encode(x, "int8"), by_torch(monkeypatch, lambda: values.encode(x, "int8"))
    assert all(torch.equal(a, b) for a, b in zip(quick, slow, strict=True))
    back = values.decode(quick, "int8", 1000, torch.float32)
    assert torch.equal(back, by_torch(monkeypatch, lambda: values.decode(quick, "int8", 1000, torch.float32)))


@pytest.mark.parametrize("call", list(ACTIVATIONS), ids=lambda call: getattr(call, "__name__", str(call)))
def test_thresholds_give_the_nearest_level(call):
    activation = ACTIVATIONS[call]
    x = torch.cat([torch.linspace(-9, 9, 40_001, dtype=torch.float64), torch.tensor([-1e6, -60.0, 0.0, 60.0, 1e6])])
    derivative = activation.backward(torch.ones_like(x), x)
    for levels in activation.levels.values():
        codes = derivative_steps(activation, (), levels)(x)
        got = codes.double() * levels.step + levels.first
        nearest = levels.nearest(derivative).double() * levels.step + levels.first
        assert ((got - derivative).abs() - (nearest - derivative).abs()).max() < 1e-12


def test_without_a_compiler_a_warning_says_so_once_and_torch_packs(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.delenv("BACKRAZOR_KERNELS", raising=False)
    cpu_kernels.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no-such-compiler.*install a C compiler"):
            assert cpu_kernels.library() is None
        x, w = torch.randn(8, 5000, requires_grad=True), torch.randn(3, 5000, requires_grad=True)
        with warnings.catch_warnings(), Razor(0.1):
            warnings.simplefilter("error")
            y = F.linear(x, w)
        y.sum().backward()
        slow = w.grad.clone()
    finally:
        monkeypatch.undo()
        cpu_kernels.library.cache_clear()
    w.grad = None
    with Razor(0.1):
        y = F.linear(x, w)
    y.sum().backward()
    assert torch.equal(w.grad, slow)


@pytest.mark.slow
def test_the_library_is_built_into_the_cache_and_can_be_asked_not_to(monkeypatch, tmp_path):
    def built(setting):
        monkeypatch.setenv("BACKRAZOR_KERNELS", setting)
        cpu_kernels.library.cache_clear()
        return cpu_kernels.library() is not None, len(list(tmp_path.glob("backrazor/*")))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        assert built("off") == (False, 0)
        assert built("on") == (True, 1)
    finally:
        monkeypatch.undo()
        cpu_kernels.library.cache_clear()
    assert (tmp_path / "backrazor").stat().st_mode & 0o077 == 0
