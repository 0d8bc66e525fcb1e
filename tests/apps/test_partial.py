"""Some blocks checkpointed: what is chosen for a budget against every other choice, and how it is said."""

import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from backrazor import Razor
from memtrain_apps.compose.axes import Axes, check, in_plain_words, save_words
from memtrain_apps.compose.compose import saving
from memtrain_apps.compose.families import blocks as blocks_of
from memtrain_apps.compose.partial import BlockMoments, StepMoments, fastest, numbers_of, words_of
from memtrain_apps.run import choosing
from memtrain_apps.run.choosing import choose_saving
from memtrain_apps.run.config import PretrainConfig, checked
from memtrain_apps.run.predicting import predict_moments, predict_run
from memtrain_apps.run.text import language_model
from memtrain_apps.run.workload import Workload
from memtrain_common.errors import UserError
from memtrain_common.measuring.memory import SavedActivations
from memtrain_common.models.gpt import next_token_loss
from memtrain_common.training.task import Task

CPU = torch.device("cpu")


def subsets(n):
    return [s for size in range(n + 1) for s in combinations(range(n), size)]


def peak_of(step, again):
    """Written out moment by moment: in each block, forward or backward, and between them."""
    grown, moments = 0, []
    for i, block in enumerate(step.blocks):
        moments.append(grown + block.most[i in again])
        grown += block.grows[i in again]
    return max([*moments, grown + step.loss])


def step_of(draw, n, *, equal=False):
    def block():
        grows = draw.randrange(40, 400)
        return BlockMoments((grows, draw.randrange(10, 40)), (grows + draw.randrange(90), grows + draw.randrange(90)),
                            draw.randrange(50, 90))  # fmt: skip

    return StepMoments((block(),) * n if equal else tuple(block() for _ in range(n)), draw.randrange(300))


@pytest.mark.parametrize("most", [2048, 64])
@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_eight_blocks_is_faster_in_its_memory(seed, most):
    """Against all 256, at every peak that one of them has; within 2 % where choices that are near become one."""
    step = step_of(random.Random(seed), 8, equal=seed % 2 == 0)
    peaks = {s: peak_of(step, s) for s in subsets(8)}
    flops = {s: sum(step.blocks[i].flops for i in s) for s in peaks}
    for limit in {*peaks.values(), min(peaks.values()) - 1}:
        fits = [s for s in peaks if peaks[s] <= limit]
        mine = fastest(step, limit, most)
        assert (mine is None) == (not fits)
        if fits:
            best = min(flops[s] for s in fits)
            assert peaks[mine] <= limit
            # a step is a forward pass, a backward pass of twice that, and what runs again
            assert 3 * step.flops + flops[mine] <= (1.0 if most > 256 else 1.02) * (3 * step.flops + best)


def test_of_equal_blocks_the_first_ones_are_checkpointed():
    step = StepMoments((BlockMoments((9, 2), (9, 9), 5),) * 4, 0)
    assert [fastest(step, limit) for limit in (36, 35, 29, 22, 15, 14)] == [(), (0,), (0,), (0, 1), (0, 1, 2), None]


def test_blocks_are_named_and_read_again():
    for blocks in subsets(6)[1:]:
        assert numbers_of(words_of(blocks), 6) == blocks
    assert numbers_of("", 3) == (0, 1, 2)
    assert numbers_of("2", 3) == (0, 1)
    for words in ("0", "4", "1-3", "a", "2-1", "0,,1", "-1", "1,", "²", "0-99999", "99999999999", "0-99999999999"):
        with pytest.raises(UserError, match=r"names no blocks of the 3.*checkpoint:1 for the first"):
            numbers_of(words, 3)
    assert numbers_of("0", 3, "backrazor") == ()
    with pytest.raises(UserError, match=r"--save backrazor:4 names no blocks of the 3.*backrazor:1 for the first"):
        numbers_of("4", 3, "backrazor")


def test_the_flags_say_which_blocks():
    assert in_plain_words(["--save", "checkpoint:3", "--optim", "sgd"]) == [
        "--save", "checkpoint", "--optim", "sgd", "--checkpoint-blocks", "3",
    ]  # fmt: skip
    assert in_plain_words(["--save=checkpoint:0-1,3-3"]) == ["--save=checkpoint", "--checkpoint-blocks", "0-1,3-3"]
    assert in_plain_words(["--save", "checkpoint:3", "backrazor:0", "all"]) == [
        "--save", "checkpoint", "backrazor", "all", "--checkpoint-blocks", "3", "--razor-blocks", "0",
    ]  # fmt: skip
    for axes in (Axes(), Axes(save="backrazor"), Axes(save="checkpoint", checkpoint_blocks="3"),
                 Axes(save="backrazor", razor_blocks="1-2")):  # fmt: skip
        words = in_plain_words(["--save", save_words(axes)])
        assert words[1] == axes.save
        assert words[3:] == [w for w in (axes.checkpoint_blocks, axes.razor_blocks) if w]
    assert in_plain_words(["--save", "auto", "--budget", "6GiB"]) == ["--budget", "6GiB"]
    assert in_plain_words(["--budget=6GiB", "--save=auto"]) == ["--budget=6GiB"]
    with pytest.raises(UserError, match="--save auto needs --budget"):
        in_plain_words(["--save", "auto"])
    with pytest.raises(UserError, match="names checkpoint with two choices of blocks"):
        in_plain_words(["--save", "checkpoint:3", "checkpoint:4"])
    with pytest.raises(UserError, match="leave one of the two out"):
        checked(PretrainConfig(save="backrazor", budget="6GiB"))
    with pytest.raises(UserError, match="no unit"):
        checked(PretrainConfig(budget="6"))
    assert check(Axes(save="checkpoint", checkpoint_blocks="3")).checkpoint_blocks == "3"


@pytest.fixture(scope="module")
def workload():
    """A GPT of four blocks."""
    torch.manual_seed(0)
    config = PretrainConfig(n_layer=4, n_head=2, n_embd=16, block_size=24, batch_size=6)
    batch = (torch.zeros(6, 24, dtype=torch.long), torch.zeros(6, 24, dtype=torch.long))
    task = Task(language_model(config, 64), lambda step: batch, next_token_loss)
    return config, Workload(task, lambda *_: {}, "loss", False, 1, 1, {})


@pytest.mark.slow
def test_moments_of_two_steps_tell_the_peak_of_every_choice(workload):
    """To the byte, each of all 16 choices predicted whole; with accumulated gradients too."""
    config, work = workload
    for micro_batches in (1, 3):
        mine = replace(config, gradient_accumulation_steps=micro_batches)
        step = predict_moments(work, mine, Axes(), device=CPU)
        assert step.flops == 4 * (2 * 6 * 24 * 16 * 16 * 12 + 4 * 6 * 24 * 24 * 16)  # twelve 16×16 matrices, attention
        for blocks in subsets(4) if micro_batches == 1 else [(), (1, 3)]:
            words = "" if len(blocks) == 4 else words_of(blocks)
            axes = Axes(save="checkpoint", checkpoint_blocks=words) if blocks else Axes()
            assert predict_run(work, mine, axes, device=CPU).peak_bytes == peak_of(step, blocks)


@pytest.mark.slow
def test_a_run_keeps_what_its_budget_allows(workload):
    """Never above the budget; nothing runs again that need not; below every choice, the least is said."""
    config, work = workload
    some = predict_run(work, config, Axes(save="checkpoint", checkpoint_blocks="2"), device=CPU).peak_bytes
    chosen = choose_saving(work, replace(config, budget=f"{some}B"), CPU)
    assert (chosen.axes.save, chosen.axes.checkpoint_blocks) == ("checkpoint", "2")
    assert (chosen.predicted.peak_bytes, chosen.flops) == (some, 2 / 4)
    assert "--save checkpoint:2, which checkpoints 2 of 4 blocks" in chosen.why
    whole = choose_saving(work, replace(config, budget="1GiB"), CPU)
    assert (whole.axes, whole.flops) == (Axes(), 0)
    with pytest.raises(UserError, match="nothing fits --budget 9KB: the least that train full with adamw needs"):
        choose_saving(work, replace(config, budget="9KB"), CPU)


@pytest.mark.slow
@pytest.mark.parametrize("told", [None, (), (0,)])
def test_before_gradients_become_approximate_every_block_is_checkpointed(workload, monkeypatch, told):
    """Where the moments are wrong: nothing fits by them, everything does, or a choice that is too large each time."""
    config, work = workload
    least = predict_run(work, config, Axes(save="checkpoint"), device=CPU).peak_bytes
    monkeypatch.setattr(choosing, "fastest", lambda *_: told)
    chosen = choose_saving(work, replace(config, budget=f"{least}B"), CPU)
    assert (chosen.axes.save, chosen.axes.checkpoint_blocks, chosen.predicted.peak_bytes) == ("checkpoint", "", least)
    assert chosen.flops == 1


@pytest.mark.slow
def test_below_every_exact_choice_few_blocks_become_approximate(workload):
    """Back Razor in some blocks, the others checkpointed; never above the budget; one block less would not fit."""
    config, work = workload
    predicted = lambda axes: predict_run(work, config, axes, device=CPU).peak_bytes  # noqa: E731
    budget = predicted(Axes(save="checkpoint")) - 1
    chosen = choose_saving(work, replace(config, budget=f"{budget}B"), CPU)
    assert (chosen.axes.save, chosen.predicted.peak_bytes <= budget) == ("backrazor", True)
    mine = numbers_of(chosen.axes.razor_blocks, 4, "backrazor")
    assert 0 < len(mine) < 4
    assert chosen.axes.razor_blocks == words_of(range(len(mine)))  # of equal blocks the first ones
    assert chosen.flops == 1 - len(mine) / 4
    for i in mine:
        fewer = words_of([b for b in mine if b != i])
        assert predicted(Axes(save="backrazor", razor_blocks=fewer)) > budget
    assert f"gradients are approximate in {len(mine)} of 4 blocks and outside them" in chosen.why


@pytest.mark.slow
def test_back_razor_in_some_blocks_leaves_the_others_exact():
    """As a Razor that leaves those blocks to PyTorch, and holds less; predicted to the byte."""
    torch.manual_seed(1)
    config = PretrainConfig(n_layer=4, n_head=2, n_embd=32, block_size=24, batch_size=6)
    batch = tuple(torch.randint(64, (6, 24)) for _ in range(2))
    model = language_model(config, 64)
    names = list(blocks_of(model))
    found = {}
    for label, make in {
        "some": saving(model, Axes(save="backrazor", razor_blocks="1-2")),
        "left": lambda: Razor(0.1, exact=(names[0], names[3])),
        "all": saving(model, Axes(save="backrazor")),
        "checkpointed": saving(model, Axes(save="checkpoint")),
    }.items():
        recording = SavedActivations(model)
        with make(), recording:
            loss = next_token_loss(model, batch)
        saved = sum(recording.by_layer().values())
        found[label] = (loss, torch.autograd.grad(loss, list(model.parameters())), saved)
    for value, gradients, _ in found.values():
        assert value == found["all"][0]
        assert len(gradients) == len(found["all"][1])
    for mine, theirs in zip(found["some"][1], found["left"][1], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(found["some"][1], found["all"][1], strict=True))
    assert found["some"][2] < found["left"][2]
    task = Task(model, lambda _: batch, next_token_loss)
    work = Workload(task, lambda *_: {}, "loss", False, 1, 1, {})
    some = predict_run(work, config, Axes(save="backrazor", razor_blocks="1-2"), device=CPU)
    assert some.ledger.total("activations") == found["some"][2]
