"""Projecting inside the backward pass: the same steps, with compact gradients only."""

import copy

import problems
import pytest
import torch
from galore_vit import GaLoreAdamW, InBackward, Refresh
from torch import nn
from torch.nn.utils import clip_grad_norm_

EXACT = Refresh(method="svd", stagger=False, rotate=False)


def pair(proj_type="std", **options):
    """The same model and optimizer twice; the second inside the backward pass."""
    a, b = problems.mlp(), problems.mlp()
    plain = GaLoreAdamW(problems.mlp_groups(a, proj_type=proj_type), lr=1e-2, **options)
    inner = GaLoreAdamW(problems.mlp_groups(b, proj_type=proj_type), lr=1e-2, **options)
    return a, plain, b, inner


def step(*optimizers):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_equals_the_ordinary_step(proj_type):
    a, plain, b, inner = pair(proj_type)
    in_backward = InBackward(inner)
    for t in range(45):
        problems.backward(a, t)
        problems.backward(b, t)
        step(plain, in_backward)
    assert problems.same(a, b, rtol=1e-5)
    assert not problems.same(a, problems.mlp(), rtol=1e-2)


def test_full_gradients_are_freed_during_the_backward_pass():
    _, _, b, inner = pair()
    InBackward(inner)
    matrices = {p for p in b.parameters() if p.ndim == 2}
    alive = []
    for module in b:
        module.register_full_backward_hook(lambda *_: alive.append(sum(p.grad is not None for p in matrices)))
    problems.backward(b, 0)
    assert len(alive) == len(b)
    assert max(alive) <= 1
    assert all(p.grad is None for p in matrices)


@pytest.mark.slow
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_accumulation_is_one_step_of_the_sum(proj_type):
    """Four micro-batches equal one batch of the four, except that a due basis is the first one's."""
    a, plain, b, inner = pair(proj_type, refresh=Refresh(method="svd", stagger=False))
    in_backward = InBackward(inner, micro_batches=4)
    for t in range(19):
        if t == 0:  # both take their first basis from the same gradient
            problems.backward(a, 0)
            bases = {p: plain.item(p).new_bases for p in a.parameters() if p.ndim == 2}
            plain.zero_grad()
            plain._new_bases = lambda p, *_, found=bases: found[p]
        for part in range(4):
            problems.backward(a, 4 * t + part)
            problems.backward(b, 4 * t + part)
            if part < 3:
                assert all(torch.equal(p, q) or t for p, q in zip(a.parameters(), b.parameters(), strict=True))
        step(plain, in_backward)
    assert problems.same(a, b, rtol=1e-5)
    assert {int(s["step"]) for s in inner.state.values()} == {19}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batches", "largest", "steps", "least", "rel"), [(1, 0.05, 45, 20, 1e-3), (3, 1.0, 15, 5, 1e-5)]
)
def test_clipping_is_by_the_norm_of_the_full_accumulated_gradient(micro_batches, largest, steps, least, rel):
    """The weights of an ordinary step on the accumulated, clipped gradients."""
    a, plain, b, inner = pair()
    in_backward = InBackward(inner, micro_batches=micro_batches)
    if micro_batches > 1:  # a due basis is the first micro-batch's
        twin = dict(zip(a.parameters(), b.parameters(), strict=True))
        plain._new_bases = lambda p, *_: in_backward._new_bases[twin[p]]
    clipped = 0
    for t in range(steps):
        for part in range(micro_batches):
            problems.backward(a, micro_batches * t + part)
            problems.backward(b, micro_batches * t + part)
        found = clip_grad_norm_(in_backward.parameters(), largest)
        norm = clip_grad_norm_(a.parameters(), largest)
        assert found == pytest.approx(float(norm), rel=rel)
        clipped += int(norm > largest)
        step(plain, in_backward)
    assert clipped > least
    assert problems.same(a, b, rtol=1e-4)


def test_the_projected_norm_is_what_moves_the_weights():
    _, _, b, inner = pair()
    in_backward = InBackward(inner, micro_batches=2, norm="projected")
    for part in range(2):
        problems.backward(b, part)
    vectors = [p.grad for p in b.parameters() if p.ndim < 2]
    compact = [r.grad for r in in_backward._compact.values()]
    found = clip_grad_norm_(in_backward.parameters(), 1e9)
    assert float(found) == pytest.approx(float(torch.nn.utils.get_total_norm([*vectors, *compact])))
    held = sum(p.grad.numel() for p in in_backward.parameters())
    assert held == sum(g.numel() for g in (*vectors, *compact))
    with pytest.raises(ValueError, match="norm must be"):
        InBackward(inner, norm="true")


@pytest.mark.slow
@pytest.mark.parametrize("proj_type", ["std", "left", "right", "full"])
def test_over_micro_batches_the_sketched_norm_is_right_on_average(proj_type):
    torch.manual_seed(0)
    shapes = [(96, 64), (64, 96)] * 4
    params = problems.weights(*shapes)
    optimizer = GaLoreAdamW([{"params": params, **problems.KEYS, "proj_type": proj_type}], lr=0.0)
    in_backward = InBackward(optimizer, micro_batches=3, norm="sketch")
    ratios, projected = [], []
    for _ in range(12):
        full = [torch.zeros(s) for s in shapes]
        for _ in range(3):
            parts = [torch.randn(s) for s in shapes]
            for f, g in zip(full, parts, strict=True):
                f += g
            sum((p * g).sum() for p, g in zip(params, parts, strict=True)).backward()
        true = torch.cat([f.flatten() for f in full]).norm()
        compact = [in_backward._compact[p].grad.norm() for p in params]
        ratios.append(float(clip_grad_norm_(in_backward.parameters(), 1e9) / true))
        projected.append(float(torch.stack(compact).norm() / true))
        in_backward.step()
        in_backward.zero_grad()
    assert sum(projected) / 12 < 0.7  # the part that is seen alone is far off
    assert max(abs(r - 1) for r in ratios) < 0.05
    assert abs(sum(ratios) / 12 - 1) < 0.01


def test_a_scaler_scales_and_skips():
    a, plain, b, inner = pair()
    in_backward = InBackward(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for t in range(25):
        problems.backward(a, t)
        clip_grad_norm_(a.parameters(), 0.05)
        plain.step()
        plain.zero_grad()
        x, y = problems.mlp_batch(t)
        scaler.scale(((b(x) - y) ** 2).mean()).backward()
        scaler.unscale_(in_backward)
        clip_grad_norm_(in_backward.parameters(), 0.05)
        scaler.step(in_backward)
        scaler.update()
        in_backward.zero_grad()
    assert problems.same(a, b, rtol=1e-4)
    before = problems.copied(list(b.parameters()))
    x, y = problems.mlp_batch(99)
    scaler.scale(((b(x) - y * float("inf")) ** 2).mean()).backward()
    scaler.step(in_backward)
    scaler.update()
    in_backward.zero_grad()
    assert problems.same(before, list(b.parameters()))
    assert scaler.get_scale() == 2.0**9


@pytest.mark.filterwarnings("error")  # torch warns of schedules that step before their optimizer
def test_a_schedule_moves_the_optimizers_rate():
    a, plain, b, inner = pair()
    in_backward = InBackward(inner)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in (plain, inner)]
    for t in range(20):
        for model, stepper, schedule in ((a, plain, schedules[0]), (b, in_backward, schedules[1])):
            problems.backward(model, t)
            stepper.step()
            stepper.zero_grad()
            schedule.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert problems.same(a, b, rtol=1e-5)


def test_a_wrong_number_of_passes_is_refused():
    _, _, b, inner = pair()
    in_backward = InBackward(inner, micro_batches=2)
    problems.backward(b, 0)
    with pytest.raises(RuntimeError, match="1 backward passes"):
        in_backward.step()


def test_what_cannot_be_is_refused():
    groups = problems.mlp_groups(problems.mlp())
    with pytest.raises(ValueError, match="residual"):
        InBackward(GaLoreAdamW(groups, residual=True))
    with pytest.raises(ValueError, match="micro_batches"):
        InBackward(GaLoreAdamW(problems.mlp_groups(problems.mlp())), micro_batches=0)


def test_a_bad_gradient_changes_nothing_and_close_gives_the_optimizer_back():
    _, _, b, inner = pair()
    in_backward = InBackward(inner)
    before = problems.copied(list(b.parameters()))
    x, y = problems.mlp_batch(0)
    ((b(x) - y * float("nan")) ** 2).mean().backward()
    with pytest.warns(UserWarning, match="skipped"):
        in_backward.step()
    in_backward.zero_grad()
    assert problems.same(before, list(b.parameters()))
    assert all(int(s["step"]) == 0 for s in inner.state.values())
    in_backward.close()
    problems.backward(b, 0)
    inner.step()
    assert not problems.same(before, list(b.parameters()))


def test_a_second_one_over_the_same_weights_is_refused_until_the_first_is_closed():
    model = problems.mlp()
    first = InBackward(GaLoreAdamW(problems.mlp_groups(model)))
    for settings in ({}, {"norm": "sketch", "model": model}):
        with pytest.raises(ValueError, match="another InBackward takes these weights' gradients: close"):
            InBackward(GaLoreAdamW(problems.mlp_groups(model)), **settings)
    before = model[0].weight.detach().clone()
    problems.backward(model, 0)
    first.step()  # what was refused has changed nothing
    assert not torch.equal(model[0].weight, before)
    first.close()
    optimizer = GaLoreAdamW(problems.mlp_groups(model))
    InBackward(optimizer).close()
    before = model[0].weight.detach().clone()
    problems.backward(model, 1)
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_the_optimizers_own_step_is_refused_while_its_gradients_are_taken():
    model = problems.mlp()
    optimizer = GaLoreAdamW(problems.mlp_groups(model))
    in_backward = InBackward(optimizer)
    problems.backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"call in_backward\.step\(\)"):
        optimizer.step()
    assert problems.same(before, list(model.parameters()))
    in_backward.step()
    assert not problems.same(before, list(model.parameters()))
    assert not copy.deepcopy(optimizer).fed


def test_a_gradient_written_by_hand_is_not_overlooked():
    model = problems.mlp()
    in_backward = InBackward(GaLoreAdamW(problems.mlp_groups(model)))
    problems.backward(model, 0)
    model[2].weight.grad = 0.1 * model[2].weight.detach()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"\(16, 24\) has a gradient that no backward pass gave"):
        in_backward.step()
    assert problems.same(before, list(model.parameters()))


def test_a_sparse_gradient_is_refused_in_words():
    table = nn.Embedding(40, 12, sparse=True)
    InBackward(GaLoreAdamW([{"params": [table.weight], "rank": 3}]))
    with pytest.raises(ValueError, match="build the embedding with sparse=False"):
        table(torch.arange(5)).sum().backward()
