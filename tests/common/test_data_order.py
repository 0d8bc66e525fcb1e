"""Data order: reproducible from (seed, step) alone, fair, and the same for any number of processes."""

import numpy as np
import pytest
from memtrain_common.data.order import epoch_batch, epoch_order, random_bits, random_offsets, rank_share, stratified


def splitmix64(state, n):
    """The published generator, one word at a time in Python's integers."""
    out = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_known_values_of_splitmix64():
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # the generator's published test


def test_bits_are_splitmix64_from_a_hashed_state():
    def mixed(z):
        return splitmix64((z - 0x9E3779B97F4A7C15) % 2**64, 1)[0]

    state = 0
    for word in (42, 7):
        state = mixed(state ^ ((word + 0x9E3779B97F4A7C15) % 2**64))
    assert random_bits(42, 7, size=5).tolist() == splitmix64(state, 5)


def test_the_order_never_changes():
    """Written down once: another value here means that runs made before cannot be repeated."""
    assert random_offsets(1337, 3, size=4, high=1000).tolist() == [478, 268, 55, 764]
    assert epoch_order(1337, 0, 8).tolist() == [5, 7, 6, 0, 4, 3, 2, 1]


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**64 - 1, -1])
def test_every_seed_is_taken_in_silence(seed, recwarn):
    assert len(set(random_bits(seed, 5, size=9).tolist())) == 9
    assert not recwarn.list


def test_offsets_are_uniform_and_differ_between_steps_and_seeds():
    draws = np.concatenate([random_offsets(0, step, size=1000, high=10) for step in range(100)])
    counts = np.bincount(draws, minlength=10)
    assert counts.sum() == 100_000
    assert (abs(counts - 10_000) < 5 * np.sqrt(9000)).all()
    a, b, c = (random_offsets(*key, size=50, high=2**40) for key in ((0, 1), (0, 2), (1, 1)))
    assert len(set(a) & set(b)) == len(set(a) & set(c)) == 0


@pytest.mark.parametrize(("batch", "size"), [(4, 12), (5, 12), (16, 6), (1, 1)])
def test_each_epoch_sees_every_sample_once(batch, size):
    steps = 3 * size
    seen = np.concatenate([epoch_batch(9, s, batch=batch, size=size) for s in range(steps)])
    for epoch in range(len(seen) // size):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))
    if size > 6:
        assert seen[:size].tolist() != seen[size : 2 * size].tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_all_processes_are_the_global_batch(world):
    rows = epoch_batch(0, 5, batch=8, size=100)
    shares = [rank_share(rows, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares)) == sorted(rows)
    for h in range(2):  # the h-th half of every share comes from the h-th half of the batch
        for share in shares:
            assert set(share.reshape(2, -1)[h]) <= set(rows.reshape(2, -1)[h])


def test_refusals():
    with pytest.raises(ValueError, match="a batch of 6 cannot be shared equally by 4"):
        rank_share(np.arange(6), 0, 4)
    with pytest.raises(ValueError, match="high >= 1"):
        random_offsets(0, 0, size=1, high=0)
    with pytest.raises(ValueError, match="0 samples"):
        epoch_batch(0, 0, batch=1, size=0)


def test_stratified_parts_are_even_in_every_class():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    parts = stratified(labels, 5, seed=1)
    for c, n in enumerate((10, 6, 4)):
        assert (np.bincount(parts[labels == c], minlength=5) == n).all()
    assert not np.array_equal(parts, stratified(labels, 5, seed=2))
