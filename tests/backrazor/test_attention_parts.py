"""Attention and its gradients, some samples at a time: those of PyTorch's own call, whatever the parts."""

import pytest
import torch
import torch.nn.functional as F
from backrazor import Razor
from backrazor.ops import attention_low_bit, attention_parts
from backrazor.ops.attention_low_bit import Recorded
from backrazor.ops.attention_parts import Stepwise


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
@pytest.mark.parametrize("p_drop", [0.0, 0.3])
@pytest.mark.parametrize("mask", ["none", "one for all", "of each sample", "of each head, a float", "causal"])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_the_steps_without_a_graph_have_its_gradients(kv_heads, mask, p_drop, at_once, monkeypatch):
    n, m = (13, 13) if mask == "causal" else (13, 17)
    memory = torch.randn(3, n, 6, 8).transpose(1, 2)  # as a model's projections leave them
    tensors = [memory, torch.randn(3, kv_heads, m, 8), torch.randn(3, kv_heads, m, 5)]
    if mask == "one for all":
        tensors.append(torch.rand(n, m) > 0.4)
    elif mask == "of each sample":
        tensors.append(torch.rand(3, 1, n, m) > 0.4)
        tensors[-1][1, :, 2] = False  # a row without any key
    elif mask == "of each head, a float":
        tensors.append(torch.randn(6, n, m) if at_once % 2 else torch.randn(3, 6, n, m))
    settings = {"dropout_p": p_drop, "is_causal": mask == "causal", "scale": None, "enable_gqa": kv_heads != 6}
    assert Stepwise.fits(tuple(tensors))
    monkeypatch.setattr(attention_parts, "PART", at_once * 6 * n * m + 5)
    every = (True,) * 3 + (mask == "of each head, a float",) * (len(tensors) - 3)
    some = [every, (False, True, False, False), (False, False, True, False), (True, False, True, every[-1])]
    for needs in (case[: len(tensors)] for case in some):
        torch.manual_seed(5)
        recorded = Recorded(tuple(tensors), needs, settings)
        torch.manual_seed(5)
        steps = Stepwise(tuple(tensors), settings)
        torch.testing.assert_close(steps.out, recorded.out.detach())
        g = torch.randn(steps.out.shape).transpose(1, 2).contiguous().transpose(1, 2)
        for ours, theirs in zip(steps.gradients(g, needs), recorded.gradients(g, needs), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_steps_are_left_to_pytorch_where_they_are_not_written_for():
    q = torch.randn(2, 4, 9, 8)
    assert Stepwise.fits((q, q, q))
    for other in ((q[0],) * 3, (q.double(),) * 3, (q.bfloat16(),) * 3, (q, q[:1], q[:1]), (q, q[:, :2], q)):
        assert not Stepwise.fits(other)


def test_without_dropout_the_steps_are_taken_where_p_is_no_larger_than_q_k_v_and_o():
    for (n, m, d), taken in {
        (64, 64, 16): True,
        (65, 65, 16): False,
        (64, 96, 16): False,
        (47, 200, 64): False,
        (48, 48, 64): True,
        (256, 256, 64): True,
    }.items():
        assert Stepwise.pays((torch.empty(2, 3, n, d), *(torch.empty(2, 3, m, d),) * 2)) is taken


@pytest.mark.parametrize(("length", "taken"), [(40, 0), (64, 1), (70, 0)])
def test_a_razors_backward_pass_takes_them_there_once_and_has_the_same_gradient(length, taken, monkeypatch):
    met = []

    class Counted(Stepwise):
        def __init__(self, *given):
            met.append(given)
            super().__init__(*given)

    monkeypatch.setattr(attention_low_bit, "Stepwise", Counted)
    x, w = torch.randn(3, length, 192), torch.randn(64, 64, requires_grad=True)
    found = []
    for pays in (Stepwise.pays, lambda tensors: False):
        monkeypatch.setattr(Counted, "pays", staticmethod(pays))
        leaf = x.clone().requires_grad_()
        with Razor(0.1):
            q, k, v = leaf.view(3, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v)
            loss = F.linear(out.transpose(1, 2).reshape(3, length, 64), w).square().mean()
        found.append((loss, *torch.autograd.grad(loss, (leaf, w))))
    assert len(met) == taken
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
