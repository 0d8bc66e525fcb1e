"""Dropout's random numbers are PyTorch's: the same elements kept, the same state left, the same bits of the product."""

import math

import pytest
import torch
import torch.nn.functional as F
from backrazor import Razor, cpu_kernels, drawing
from backrazor.ops.attention_dropout import attention_with_dropout

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
P = (0.021, 0.1, 1 / 3, 0.5, 0.97, 1.0)
"""1 / (1 − 0.021) is another number in float32 than in float64, rounded to float32."""

LAYOUTS = {
    "rows": lambda x: x,
    "transposed": lambda x: x.mT,
    "channels last": lambda x: x.view(1, 5, 7, -1).contiguous(memory_format=torch.channels_last),
    "with holes": lambda x: x[:, ::3],
    "expanded": lambda x: x[:, :1].expand(-1, 9),
    "one element": lambda x: x[0, 0],
    "nothing": lambda x: x[:, :0],
}


@pytest.fixture(params=["kernels", "torch"])
def path(request, monkeypatch):
    """With the C kernels, and where there are none."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    elif cpu_kernels.library() is None:
        pytest.skip("no C compiler: there are no kernels to compare")
    drawing.draws_the_same.cache_clear()
    yield request.param
    drawing.draws_the_same.cache_clear()


@pytest.mark.parametrize("drawn_before", [0, 1, 2, 311, 623, 624, 625])
def test_the_numbers_and_the_state_after_them_are_pytorchs(path, drawn_before):
    assert drawing.draws_the_same() == (path == "kernels")
    for n in (1, 2, 311, 312, 313, 5_001):
        for p in (0.1, 0.7):
            torch.manual_seed(n)
            torch.empty(drawn_before).random_()
            torch.randn(3)  # PyTorch keeps the second of a pair of normal numbers: it is part of the state
            state = torch.get_rng_state()
            plain = torch.empty(n, dtype=torch.bool).bernoulli_(1 - p)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            assert torch.equal(drawing.kept_of(torch.empty(n), p), plain)
            assert torch.equal(torch.get_rng_state(), after)


def test_another_generator_is_left_to_pytorch(monkeypatch):
    """A state of another size, one with another place in it, and numbers that are others, as of another PyTorch."""
    if cpu_kernels.library() is None:
        pytest.skip("no C compiler: PyTorch draws in any case")
    kept = torch.empty(10, dtype=torch.bool)
    state = torch.get_rng_state()
    assert not cpu_kernels.bernoulli(state[:-8].clone(), 0.5, kept)
    elsewhere = state.clone()
    elsewhere[8], elsewhere[16:24] = 2, 255  # not at the end of its numbers, and far beyond it
    before = elsewhere.clone()
    assert not cpu_kernels.bernoulli(elsewhere, 0.5, kept)
    assert torch.equal(elsewhere, before)
    true_one = cpu_kernels.bernoulli
    monkeypatch.setattr(cpu_kernels, "bernoulli", lambda state, p, kept: true_one(state, 1 - p, kept))
    drawing.draws_the_same.cache_clear()
    assert not drawing.draws_the_same()
    drawing.draws_the_same.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_has_the_bits_of_pytorchs(path, dtype, layout):
    for p in P:
        x = torch.randn(35, 36).to(dtype)
        x.view(-1)[::50] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]).repeat(7)[:26].to(dtype)
        x = LAYOUTS[layout](x).requires_grad_()
        g = torch.randn(x.shape).to(dtype)
        found = []
        for razor in (None, Razor(0.1)):
            torch.manual_seed(7)
            if razor is None:
                y = F.dropout(x, p)
            else:
                with razor:
                    y = F.dropout(x, p)
            (dx,) = torch.autograd.grad(y, x, g)
            found.append((y, dx, torch.get_rng_state()))
        (y, dx, state), (our_y, our_dx, our_state) = found
        assert our_y.stride() == y.stride()
        assert our_y.dtype == y.dtype
        assert torch.equal(state, our_state)
        for theirs, ours in ((y, our_y), (dx, our_dx)):
            assert torch.equal(theirs.isnan(), ours.isnan())
            assert torch.equal(theirs.nan_to_num(3.0), ours.nan_to_num(3.0))
            assert torch.equal(theirs.nan_to_num().signbit(), ours.nan_to_num().signbit())


HEADS = {"as many": (2, 4, 9, 8), "grouped": (2, 2, 9, 8), "three dimensions": (4, 9, 8), "five": (3, 2, 4, 9, 8)}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_by_steps_has_the_bits_of_pytorchs_one_call(path, heads, mask, autocast):
    n = 9 if mask == "causal" else 7
    attn_mask = {"bool": torch.rand(n, 9) > 0.3, "float": torch.randn(n, 9)}.get(mask)
    if mask == "bool":
        attn_mask[0] = False  # a row without any key
    for dtype in DTYPES[:3]:
        shape = HEADS[heads]
        lead = (2, 4) if heads == "grouped" else shape[:-2]
        q, k, v = (torch.randn(*s).to(dtype).requires_grad_() for s in ((*lead, n, 8), shape, (*shape[:-1], 5)))
        given = attn_mask.to(dtype) if mask == "float" else attn_mask
        settings = {"dropout_p": 0.3, "is_causal": mask == "causal", "scale": 0.4, "enable_gqa": heads == "grouped"}
        found = []
        for call in (F.scaled_dot_product_attention, lambda *a, **s: attention_with_dropout(*a, **s)[0]):
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = call(q, k, v, given, **settings)
            torch.manual_seed(4)
            grads = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape).to(out.dtype))
            found.append((out, *grads))
        theirs, ours = found
        assert ours[0].dtype == theirs[0].dtype
        assert torch.equal(ours[0], theirs[0])
        coarse = dtype == torch.bfloat16 or autocast
        for a, b in zip(theirs[1:], ours[1:], strict=True):
            assert (a - b).norm() <= (0.02 if coarse else 1e-5) * a.norm()


def test_what_is_kept_is_as_likely_as_it_should_be(path):
    """Independent of PyTorch's own numbers: within five standard errors."""
    n, p = 200_000, 0.3
    torch.manual_seed(0)
    kept = drawing.kept_of(torch.empty(n), p).double()
    assert abs(kept.mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    centred = kept - (1 - p)
    assert abs((centred[1:] * centred[:-1]).mean().item()) < 5 * p * (1 - p) / math.sqrt(n)
