"""Gradients of linear layers that are projected from their factors: the same steps, and no full gradient."""

import copy
import io
from contextlib import nullcontext
from functools import partial

import problems
import pytest
import torch
from backrazor import Razor
from galore_vit import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, InBackward
from galore_vit.factored import FactoredLinear, Factors
from galore_vit.projection import project
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

GAP = problems.KEYS["update_proj_gap"]


ADAFACTOR = partial(GaLoreAdafactor, relative_step=False)


def in_backward_of(model, kind=GaLoreAdamW, norm="projected", micro_batches=1, factored=True, lr=1e-2, **keys):
    optimizer = kind(problems.mlp_groups(model, **keys), lr=lr)
    return InBackward(optimizer, micro_batches, norm=norm, model=model if factored else None)


def whole_gradients(model):
    """-> a list that gets the shape of every weight gradient that is made. Before InBackward is: it frees them."""
    made = []
    for p in model.parameters():
        if p.ndim == 2:
            p.register_post_accumulate_grad_hook(lambda p: made.append(p.shape) if p.grad is not None else None)
    return made


def spent(in_backward):
    in_backward.step()
    in_backward.zero_grad()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("used", ["P", "Q", "PQ"])
def test_products_are_those_of_the_gradient(k, used):
    N, m, n, r = 37, 11, 7, 3
    Y, X = torch.randn(N, k * m, dtype=torch.float64), torch.randn(N, n, dtype=torch.float64)
    stack = () if k == 1 else (k,)
    G = (Y.T @ X).reshape(*stack, m, n)
    P = torch.randn(*stack, m, r, dtype=torch.float64) if "P" in used else None
    Q = torch.randn(*stack, r, n, dtype=torch.float64) if "Q" in used else None
    factors = Factors.of(Y, X, k)
    torch.testing.assert_close(factors.project((P, Q)), project(G, (P, Q)))
    right, left = torch.randn(n, 5, dtype=torch.float64), torch.randn(m, 5, dtype=torch.float64)
    torch.testing.assert_close(factors.times(right), G @ right)
    torch.testing.assert_close(factors.transposed_times(left), G.mT @ left)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GaLoreAdamW, GaLoreAdamW8bit, ADAFACTOR], ids=["adamw", "8bit", "adafactor"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_the_steps_are_those_of_whole_gradients(kind, proj_type):
    a, b = problems.mlp().double(), problems.mlp().double()
    plain = kind(problems.mlp_groups(a, proj_type=proj_type), lr=1e-2)
    made = whole_gradients(b)
    inner = in_backward_of(b, kind, proj_type=proj_type)
    for t in range(2 * GAP + 5):
        assert torch.equal(problems.backward(a, t), problems.backward(b, t)) or t
        assert all(p.grad is None for p in inner.factored)
        plain.step()
        plain.zero_grad()
        spent(inner)
    assert problems.same(a, b, rtol=1e-9)
    assert len(inner.factored) == 3
    # Of 45 steps each weight was made whole at its refreshes alone: the first, and once in each gap after it.
    assert len(made) == 3 * 3


@pytest.mark.parametrize(("rank", "norm"), [(5, "sketch"), (2, "projected")])  # 3·2 of 9 columns are kept
def test_a_split_weight_and_inputs_of_three_dimensions(rank, norm):
    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(9, 36, bias=False), nn.GELU(), nn.Linear(36, 9)).double()

    def groups(of):
        return [{"params": [of[0].weight], **problems.KEYS, "rank": rank, "split": 3},
                {"params": [of[2].weight], **problems.KEYS}, {"params": [of[2].bias]}]  # fmt: skip

    a, b = model(), model()
    plain = GaLoreAdamW(groups(a), lr=1e-2)
    inner = InBackward(GaLoreAdamW(groups(b), lr=1e-2), norm=norm, model=b)
    for _ in range(25):
        x = torch.randn(4, 3, 9, dtype=torch.float64).transpose(0, 1)
        for of in (a, b):
            (of(x) - x.sin()).square().mean().backward()
        plain.step()
        plain.zero_grad()
        spent(inner)
    assert problems.same(a, b, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["projected", "sketch"])
def test_micro_batches_and_norms_are_those_of_whole_gradients(norm):
    a, b = problems.mlp().double(), problems.mlp().double()
    first = in_backward_of(a, norm=norm, micro_batches=3, factored=False)
    made = whole_gradients(b)
    second = in_backward_of(b, norm=norm, micro_batches=3)
    clipped = 0
    for t in range(GAP + 3):
        for part in range(3):
            problems.backward(a, 3 * t + part)
            problems.backward(b, 3 * t + part)
        of_a, of_b = (clip_grad_norm_(o.parameters(), 0.5) for o in (first, second))
        assert float(of_a) == pytest.approx(float(of_b), rel=1e-9)
        clipped += float(of_a) > 0.5
        spent(first)
        spent(second)
    assert clipped > 5
    assert problems.same(a, b, rtol=1e-9)
    # The gradients of a step that finds a basis are made: 3 weights, 2 refreshes, 3 micro-batches.
    assert len(made) == 3 * 2 * 3


def test_one_backward_pass_with_the_sketched_norm_is_right_on_average():
    model = nn.Linear(64, 96, bias=False)
    inner = in_backward_of(model, norm="sketch", lr=0.0)
    ratios = []
    for _ in range(60):
        x, y = torch.randn(40, 64), torch.randn(40, 96)
        (model(x) * y).sum().backward()
        ratios.append(float(clip_grad_norm_(inner.parameters(), 1e9) / (y.T @ x).norm()))
        spent(inner)
    assert abs(sum(ratios) / 60 - 1) < 0.02
    assert max(abs(r - 1) for r in ratios) < 0.2


class Shared(nn.Module):
    """One layer at two places, and a table that is the head's weight too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(13, 8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words):
        x = self.twice(self.twice(self.table(words)).tanh())
        return self.head(x)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_layer_at_two_places_and_a_tied_table_add_up(micro_batches):
    torch.manual_seed(2)
    a = Shared().double()
    b = copy.deepcopy(a)
    keys = {"rank": 3, "update_proj_gap": 8}
    first, second = (
        InBackward(
            GaLoreAdamW([{"params": [m.table.weight, m.twice.weight], **keys}, {"params": [m.twice.bias]}], lr=1e-2),
            micro_batches, norm="projected", model=m if m is b else None,
        )
        for m in (a, b)
    )  # fmt: skip
    assert len(second.factored) == 2
    for _ in range(20):
        for _ in range(micro_batches):
            words, wanted = torch.randint(0, 13, (2, 30))
            for model in (a, b):
                nn.functional.cross_entropy(model(words), wanted).backward()
        spent(first)
        spent(second)
    assert problems.same(a, b, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    a, b = problems.mlp().double(), problems.mlp().double()
    first, second = in_backward_of(a, factored=False), in_backward_of(b)
    for t in range(25):
        for model, stepper in ((a, first), (b, second)):
            x, y = (v.double() for v in problems.mlp_batch(t))
            x.requires_grad_()
            ((checkpoint(model, x, use_reentrant=reentrant) - y) ** 2).mean().backward()
            spent(stepper)
    assert problems.same(a, b, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_outputs_are_equal_and_projections_near(dtype):
    a, b = problems.mlp(), problems.mlp()
    first, second = in_backward_of(a, factored=False), in_backward_of(b)
    for t in range(2):  # at the second step nothing is due
        for model, stepper in ((a, first), (b, second)):
            if t == 1:
                model.load_state_dict(a.state_dict())
                x, y = problems.mlp_batch(t, 256)
                with torch.autocast("cpu", dtype):
                    out = model(x)
                assert out.dtype == dtype
                ((out.float() - y) ** 2).mean().backward()
                continue
            problems.backward(model, t)
            spent(stepper)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() <= 0.03 * p.grad.norm()
        assert (p.grad - q.grad).norm() > 0 or p.ndim < 2


@pytest.mark.parametrize(
    ("dtype", "proj_type", "norm", "kept_columns"),
    [
        (torch.float32, "right", "projected", 5),
        (torch.bfloat16, "right", "projected", 5),
        (torch.float64, "right", "sketch", 24),
        (torch.float32, "left", "projected", 24),
        (torch.float32, "full", "projected", 24),
    ],
)
def test_the_forward_pass_is_bit_equal_and_what_is_kept(dtype, proj_type, norm, kept_columns):
    plain = nn.Linear(24, 40).to(dtype)
    model = nn.Sequential(copy.deepcopy(plain))
    inner = in_backward_of(model, norm=norm, proj_type=proj_type)
    x = torch.randn(5, 7, 24, dtype=dtype)

    def saved(call):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = call(x)
        there = {plain.weight.shape, (5, 24)}  # weights and bases are kept anyway
        return out, sum(t.numel() for t in kept if t.shape not in there)

    model(x).sum().backward()  # the first basis
    spent(inner)
    plain.load_state_dict(model[0].state_dict())
    (out, kept), (wanted, plainly) = saved(model), saved(plain)
    assert torch.equal(out, wanted)
    assert plainly == x.numel()
    assert kept == 35 * kept_columns
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
    assert model(x.detach().requires_grad_()).requires_grad
    again = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(model(again).sum(), again)
    other = x.clone().requires_grad_()
    torch.testing.assert_close(dx, torch.autograd.grad(plain(other).sum(), other)[0])


def test_within_back_razor_the_projections_are_exact():
    """What a layer keeps of X is X Qᵀ, whole; ReLU's derivative is exact there too."""
    made = [copy.deepcopy(problems.mlp()) for _ in range(3)]
    for model in made:
        model[1], model[3] = nn.ReLU(), nn.ReLU()
    steppers = [in_backward_of(m, proj_type="right", factored=m is made[1]) for m in made]
    for model, stepper in zip(made, steppers, strict=True):
        problems.backward(model, 0)
        spent(stepper)
    for model, save in zip(made, (nullcontext(), Razor(keep=0.1), Razor(keep=0.1)), strict=True):
        with save:
            problems.backward(model, 1, size=64)
    plain, factored, pruned = (torch.cat([p.grad.flatten() for p in s.parameters()]) for s in steppers)
    torch.testing.assert_close(factored, plain, rtol=1e-4, atol=1e-6)
    assert (pruned - plain).norm() > 10 * (factored - plain).norm()


def test_a_basis_that_was_replaced_between_the_passes_is_refused():
    model = problems.mlp()
    inner = in_backward_of(model, proj_type="right")
    problems.backward(model, 0)
    spent(inner)
    x, y = problems.mlp_batch(1)
    loss = ((model(x) - y) ** 2).mean()
    with torch.no_grad():
        inner.optimizer.state[model[2].weight]["Q"].mul_(-1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_a_file_and_close_give_plain_layers():
    model = problems.mlp()
    before = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    inner = in_backward_of(model)
    problems.backward(model, 0)
    spent(inner)
    assert all(isinstance(model[i], FactoredLinear) for i in (0, 2, 4))
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == before
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        problems.backward(other, 1)
        assert all(p.grad is not None for p in other.parameters())
        assert all(s.grad is None for s in inner._compact.values())
    inner.close()
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))
    problems.backward(model, 1)
    assert all(p.grad is not None for p in model.parameters())


def test_tensors_in_the_place_of_weights_have_gradients_of_their_own():
    model = problems.mlp()
    inner = in_backward_of(model)
    problems.backward(model, 0)
    spent(inner)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, others, (torch.randn(3, 12),)).sum().backward()
    assert all(p.grad is not None for p in others.values())
    assert all(p.grad is None for p in inner.parameters())


def test_what_is_not_a_plain_linear_layer_goes_the_ordinary_way():
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), Own(24, 16), nn.Tanh(), nn.Linear(16, 10))
    model[4].forward = model[4].forward  # as somebody's hook does
    other = copy.deepcopy(problems.mlp())
    other.load_state_dict(model.state_dict())
    inner = in_backward_of(model)
    assert [p is model[0].weight for p in inner.factored] == [True]
    plain = in_backward_of(other, factored=False)
    for t in range(25):
        problems.backward(model, t)
        problems.backward(other, t)
        spent(inner)
        spent(plain)
    assert problems.same(model, other, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_goes_the_ordinary_way():
    a, b = problems.mlp(), problems.mlp()
    made = whole_gradients(b)
    first, second = in_backward_of(a, factored=False), in_backward_of(b)
    compiled = torch.compile(b, backend="aot_eager")
    for t in range(4):
        problems.backward(a, t)
        problems.backward(compiled, t)
        spent(first)
        spent(second)
    assert problems.same(a, b, rtol=1e-5)
    assert len(made) == 3 * 4


def test_a_bad_gradient_changes_nothing():
    model = problems.mlp()
    inner = in_backward_of(model)
    problems.backward(model, 0)
    spent(inner)
    before = problems.copied(list(model.parameters()))
    x, y = problems.mlp_batch(1)
    ((model(x) - y * float("inf")) ** 2).mean().backward()
    with pytest.warns(UserWarning, match="skipped"):
        inner.step()
    inner.zero_grad()
    assert problems.same(before, list(model.parameters()))


def test_a_wrong_number_of_passes_is_refused():
    model = problems.mlp()
    inner = in_backward_of(model, micro_batches=2)
    for t in range(2):
        problems.backward(model, t)
        problems.backward(model, t)
        if t == 0:
            spent(inner)
    problems.backward(model, 3)
    with pytest.raises(RuntimeError, match="3 backward passes"):
        inner.step()


def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was():
    model = problems.mlp()
    optimizer = GaLoreAdamW(problems.mlp_groups(model), lr=1e-2)
    with pytest.raises(ValueError, match='norm="exact" needs gradients'):
        InBackward(optimizer, model=model)
    with pytest.raises(ValueError, match="none of the model's"):
        InBackward(optimizer, norm="projected", model=nn.Conv2d(3, 4, 1))
    assert type(model[0]) is nn.Linear
    problems.backward(model, 0)
    assert model[0].weight.grad is not None
    inner = in_backward_of(model)
    problems.backward(model, 0)
    spent(inner)
    x = torch.randn(3, 12, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_resumed_in_the_middle_of_a_gap_the_bytes_are_equal():
    def trained(stop_at):
        model = problems.mlp()
        inner = in_backward_of(model)
        for t in range(GAP + 9):
            if t == stop_at:
                weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(inner.optimizer.state_dict())
                model = problems.mlp(seed=5)
                inner = in_backward_of(model)
                model.load_state_dict(weights)
                inner.optimizer.load_state_dict(state)
            problems.backward(model, t)
            spent(inner)
        return model

    assert problems.same(trained(None), trained(7))


# -- what loops do besides forward, backward, step, zero_grad ------------------------------------------------------


def both(made=problems.mlp, **options):
    """A model with gradients that are made, and one without; both have taken a first step."""
    a, b = made().double(), made().double()
    steppers = [in_backward_of(m, factored=m is b, **options) for m in (a, b)]
    return list(zip((a, b), steppers, strict=True))


def batch(step):
    return tuple(v.double() for v in problems.mlp_batch(step))


def error(model, step):
    x, y = batch(step)
    return (model(x) - y).square().mean()


def zero_grad_after_the_forward_pass(model, inner, t):
    loss = error(model, t)
    inner.zero_grad()
    loss.backward()
    inner.step()


def first_steps_are_not_finite(model, inner, t):
    loss = error(model, t) * (float("nan") if t < 3 else 1.0)
    inner.zero_grad()
    loss.backward()
    inner.step()


def one_bias_alone(model, inner, t):
    error(model, t).backward(inputs=[model[2].bias] if t % 3 == 2 else None)
    spent(inner)


def gradient_of_the_input_first(model, inner, t):
    x, y = batch(t)
    x.requires_grad_()
    (g,) = torch.autograd.grad((model(x) - y).square().mean(), x)
    (model((x + 0.1 * g.sign()).detach()) - y).square().mean().backward()
    spent(inner)


def jacobian_in_between(model, inner, t):
    x, _ = batch(t)
    torch.autograd.functional.jacobian(model, x[:2])
    error(model, t).backward()
    spent(inner)


def a_backward_pass_that_breaks_off(model, inner, t):
    def broken(_):
        raise ArithmeticError

    x, y = batch(t)
    hidden = model[0](x)
    handle = hidden.register_hook(broken)
    loss = (model[4](model[3](model[2](model[1](hidden)))) - y).square().mean()
    with pytest.raises(ArithmeticError):
        loss.backward()
    handle.remove()
    inner.zero_grad()
    error(model, t).backward()
    spent(inner)


def a_layer_without_a_gradient(model, inner, t):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None if t % 3 == 2 else dy

    x, y = batch(t)
    (model[4](model[3](Cut.apply(model[2](model[1](model[0](x)))))) - y).square().mean().backward()
    spent(inner)


def functorch_in_between(model, inner, t):
    x, _ = batch(t)
    torch.func.vmap(model)(x)
    torch.func.grad(lambda v: model(v).sum())(x)
    torch.func.jvp(model, (x,), (x,))
    error(model, t).backward()
    spent(inner)


def backward_inside_of_autocast(model, inner, t):
    loss = error(model, t)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    spent(inner)


def a_float64_model_under_autocast(model, inner, t):
    with torch.autocast("cpu", torch.bfloat16):
        loss = error(model, t)
    loss.backward()
    spent(inner)


def a_hook_of_ones_own(model, inner, t):
    if t == 0:
        model[2].weight.register_hook(lambda g: g * 0.5)
    error(model, t).backward()
    spent(inner)


def the_first_weight_changed_in_between(model, inner, t):
    loss = error(model, t)
    with torch.no_grad():
        model[0].weight.mul_(1.0)  # its inputs need no gradient, so nothing needs it
    loss.backward()
    spent(inner)


LOOPS = [
    zero_grad_after_the_forward_pass, first_steps_are_not_finite, one_bias_alone, gradient_of_the_input_first,
    jacobian_in_between, a_backward_pass_that_breaks_off, a_layer_without_a_gradient, functorch_in_between,
    backward_inside_of_autocast, a_float64_model_under_autocast, a_hook_of_ones_own,
    the_first_weight_changed_in_between,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a gradient is NaN")
@pytest.mark.parametrize("proj_type", ["std", "right"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_in_any_loop_the_steps_are_those_of_whole_gradients(loop, proj_type):
    (a, first), (b, second) = both(proj_type=proj_type, update_proj_gap=4)
    for t in range(11):
        for model, inner in ((a, first), (b, second)):
            loop(model, inner, t)
    assert problems.same(a, b, rtol=1e-9)
    at = [[int(o.optimizer.state[m[i].weight]["refresh_at"]) for i in (0, 2, 4)] for m, o in ((a, first), (b, second))]
    assert at[0] == at[1]
    assert not problems.same(a, problems.mlp().double(), rtol=1e-3)


@pytest.mark.parametrize("retained", [False, True])
def test_two_passes_of_one_step_through_a_checkpoint(retained):
    class Middle(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    def made():
        model = problems.mlp()
        model[2] = Middle(model[2])
        return model

    (a, first), (b, second) = both(made, micro_batches=2, update_proj_gap=4)
    for t in range(9):
        for model, inner in ((a, first), (b, second)):
            losses = [error(model, 2 * t), error(model, 2 * t + 1)]
            for loss in losses[:1] * 2 if retained else losses:
                loss.backward(retain_graph=retained)
            spent(inner)
    assert problems.same(a, b, rtol=1e-9)


def test_autograd_grad_returns_the_gradient_or_says_why_not():
    (a, first), (b, second) = both(norm="sketch")
    for model, inner in ((a, first), (b, second)):
        error(model, 0).backward()
        spent(inner)
    wanted = torch.autograd.grad(error(a, 1), list(a.parameters()))
    torch.testing.assert_close(torch.autograd.grad(error(b, 1), list(b.parameters())), wanted)
    second.close()
    inner = in_backward_of(b, proj_type="right")
    error(b, 0).backward()
    spent(inner)
    with pytest.raises(RuntimeError, match="only X Qᵀ was kept"):
        torch.autograd.grad(error(b, 1), list(b.parameters()))


def test_close_however_the_model_was_changed():
    model = problems.mlp()
    inner = in_backward_of(model)
    problems.backward(model, 0)
    spent(inner)
    forward, shallow = model[0].forward, copy.copy(model[4])
    model[0].forward = lambda x: forward(x)  # as accelerate does
    nn.utils.parametrizations.weight_norm(model[2])
    inner.close()
    inner.close()
    problems.backward(model, 1)
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    shallow(torch.randn(3, 16)).sum().backward()
    assert model[4].weight.grad is not None


def test_what_happens_between_the_passes_is_said():
    for change, said in (
        (lambda inner: inner.close(), "was closed between"),
        (lambda inner: [inner.optimizer.state[p]["refresh_at"].zero_() for p in inner.factored], "a basis is due"),
    ):  # fmt: skip
        model = problems.mlp()
        inner = in_backward_of(model)
        problems.backward(model, 0)
        spent(inner)
        loss = model(torch.randn(4, 12)).sum()
        change(inner)
        with pytest.raises(RuntimeError, match=said):
            loss.backward()


def test_a_copy_can_be_used_again_and_two_at_once_are_refused():
    model = problems.mlp()
    inner = in_backward_of(model)
    twin = copy.deepcopy(model)
    twin.add_module("more", nn.Linear(10, 10))
    assert len(in_backward_of(twin).factored) == 4
    with pytest.raises(ValueError, match=r"close\(\) it first"):
        in_backward_of(model)
    inner.close()
    assert len(in_backward_of(model).factored) == 3


def test_inputs_that_are_no_plain_tensors_go_the_ordinary_way():
    model = nn.Sequential(nn.Linear(12, 24))
    inner = in_backward_of(model)
    model(torch.randn(5, 12)).sum().backward()
    spent(inner)
    jagged = torch.nested.nested_tensor([torch.randn(2, 12), torch.randn(3, 12)], layout=torch.jagged)
    assert model(jagged).is_nested
    assert model(torch.eye(12).to_sparse()).shape == (12, 24)
    vector = torch.randn(12)
    torch.testing.assert_close(model(vector), model(vector[None])[0])
    model(torch.randn(0, 12)).sum().backward()
    assert all(float(p.grad.abs().sum()) == 0.0 for p in inner.parameters())
    meta = nn.Linear(12, 24, device="meta")
    other = in_backward_of(nn.Sequential(meta))
    assert meta(torch.randn(3, 12, device="meta")).shape == (3, 24)
    assert len(other.factored) == 1
