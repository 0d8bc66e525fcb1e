"""A combination's peak, composed of moments: against sums written out, moment by moment."""

import random
from dataclasses import replace

import pytest
from memtrain_apps.compose.axes import Axes
from memtrain_apps.plan.forecast import SCALED_LOSS, Workplace, compose_forecast
from memtrain_apps.plan.uses import OptimizerUse, StepUse

BATCH = 5
USE = StepUse(
    parameters=25, trained=20, weights=100, buffers=10, gradients=80, activations=200, host=0, peak=330, beside=290,
    left=100 + 10 + 80 + BATCH, flops=1000,
)  # fmt: skip
STATE = OptimizerUse(state=160, extra=0, merging=0)


def peak(use=USE, optim=STATE, **place):
    return compose_forecast(Workplace(None, 4, **place), Axes(), use, optim).peak


def test_the_state_lies_beside_the_pass():
    assert peak() == 330 + 160
    assert peak(optim=replace(STATE, state=0)) == 330


def test_the_optimizers_step_and_the_merge_come_after_the_pass():
    standing = 100 + 10 + BATCH + 160
    assert peak(optim=replace(STATE, extra=900)) == standing + 80 + 900
    assert peak(optim=replace(STATE, merging=900)) == standing + 900  # gradients are gone


def test_earlier_micro_batches_leave_their_gradients():
    assert peak(micro_batches=3) == 290 + 80 + SCALED_LOSS + 160
    assert peak(replace(USE, peak=900), micro_batches=3) == 900 + SCALED_LOSS + 160


def test_ddp_holds_every_gradient_twice():
    assert peak(processes=4) == peak() + 80


@pytest.mark.parametrize("seed", range(20))
def test_no_moment_is_above_the_peak_and_one_reaches_it(seed):
    draw = random.Random(seed)
    weights, buffers, gradients, state, extra, merging = (draw.randrange(1, 400) for _ in range(6))
    most = weights + buffers + gradients + BATCH + draw.randrange(400)
    left = weights + buffers + gradients + BATCH
    use = replace(USE, weights=weights, buffers=buffers, gradients=gradients, peak=most, left=left)
    moments = {
        "in the pass": most + state,
        "in the step": weights + buffers + BATCH + gradients + state + extra,
        "in the merge": weights + buffers + BATCH + state + merging,
    }
    assert peak(use, OptimizerUse(state, extra, merging)) == max(moments.values())


def test_fsdp_stands_with_shards_and_gathers_two_blocks():
    use = replace(
        USE,
        shard_weights=30,
        shard_gradients=24,
        rest_weights=20,
        rest_gradients=16,
        block_weights=10,
        block_gradients=8,
    )
    gathered = 20 + 3 * 10 + 2 * (16 + 8)
    passing = 290 - 100 + 30 + 24 + gathered
    assert peak(use, processes=4, parallel="fsdp") == passing + 160
