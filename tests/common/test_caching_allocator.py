"""The caching allocator's rules against sequences worked out by hand, and what must hold of any sequence."""

import itertools
import random

import pytest
from memtrain_common.measuring.caching_allocator import (
    MIB,
    CachingAllocator,
    OutOfMemoryError,
    rounded,
    segment_size,
)

KIB = 2**10


def test_sizes_are_rounded_and_segments_are_of_three_kinds():
    assert [rounded(n) for n in (0, 1, 512, 513, 1025)] == [512, 512, 512, 1024, 1536]
    assert segment_size(512) == segment_size(MIB) == 2 * MIB
    assert segment_size(MIB + 512) == segment_size(10 * MIB - 512) == 20 * MIB
    assert segment_size(10 * MIB) == 10 * MIB
    assert segment_size(10 * MIB + 512) == 12 * MIB
    assert segment_size(33 * MIB) == 34 * MIB


def test_small_tensors_share_a_segment_of_two_mebibytes():
    gpu = CachingAllocator()
    blocks = [gpu.allocate(700 * KIB) for _ in range(2)]
    assert (gpu.allocated, gpu.reserved) == (1400 * KIB, 2 * MIB)
    third = gpu.allocate(700 * KIB)  # 648 KiB are left: not enough
    assert gpu.reserved == 4 * MIB
    gpu.allocate(648 * KIB)  # exactly what is left of the first
    assert (gpu.reserved, gpu.allocated) == (4 * MIB, 2748 * KIB)
    gpu.free(blocks[0])
    gpu.free(third)
    gpu.allocate(600 * KIB)  # best fit: the hole of 700, not the second segment, free and whole
    gpu.allocate(100 * KIB)  # its rest
    gpu.allocate(MIB)  # fits the second segment
    assert gpu.reserved == 4 * MIB
    assert gpu.peak_reserved == 4 * MIB


def test_a_large_block_is_split_only_where_more_than_a_mebibyte_remains():
    gpu = CachingAllocator()
    gpu.allocate(6 * MIB)  # a segment of 20, 14 remain
    assert gpu.reserved == 20 * MIB
    gpu.allocate(13 * MIB)  # of the 14, unsplit: one mebibyte is not more than one
    assert (gpu.reserved, gpu.allocated) == (20 * MIB, 20 * MIB)
    gpu.allocate(5 * MIB)
    assert gpu.reserved == 40 * MIB
    gpu.allocate(13 * MIB - 512)  # leaves 2 MiB + 512
    assert (gpu.reserved, gpu.allocated) == (40 * MIB, 38 * MIB - 512)
    gpu.allocate(2 * MIB)
    assert (gpu.reserved, gpu.allocated) == (40 * MIB, 40 * MIB)


def test_small_and_large_tensors_never_share_a_segment():
    gpu = CachingAllocator()
    gpu.free(gpu.allocate(8 * MIB))
    assert (gpu.allocated, gpu.reserved) == (0, 20 * MIB)
    gpu.allocate(100)
    assert gpu.reserved == 22 * MIB


def test_freed_neighbours_grow_together():
    gpu = CachingAllocator()
    a, b, c = (gpu.allocate(6 * MIB) for _ in range(3))  # 2 MiB remain of the 20
    gpu.free(a)
    gpu.free(c)
    gpu.allocate(9 * MIB)  # holes of 6 and of 8: a new segment
    assert gpu.reserved == 40 * MIB
    gpu.free(b)
    gpu.allocate(19 * MIB)  # the whole first segment is free
    assert gpu.reserved == 40 * MIB


def test_fragmentation_reserves_what_no_tensor_can_use():
    """Of five tensors every other one goes: the same bytes in larger pieces do not fit the holes."""
    gpu = CachingAllocator()
    blocks = [gpu.allocate(12 * MIB) for _ in range(5)]
    for block in blocks[::2]:
        gpu.free(block)
    assert (gpu.allocated, gpu.reserved) == (24 * MIB, 60 * MIB)
    gpu.allocate(36 * MIB)
    assert (gpu.allocated, gpu.reserved) == (60 * MIB, 96 * MIB)
    expandable = CachingAllocator(expandable_segments=True)
    blocks = [expandable.allocate(12 * MIB) for _ in range(5)]
    assert expandable.reserved == 60 * MIB  # three pages of 20
    for block in blocks[::2]:
        expandable.free(block)
    expandable.allocate(36 * MIB)  # grows from the last hole: 12 MiB there, and two pages
    assert (expandable.allocated, expandable.reserved) == (60 * MIB, 100 * MIB)
    expandable.allocate(12 * MIB)  # the first hole that suffices, not the end
    assert expandable.reserved == 100 * MIB


def test_an_expandable_segment_grows_by_pages_and_splits_to_512_bytes():
    gpu = CachingAllocator(expandable_segments=True)
    a = gpu.allocate(3 * MIB)
    gpu.allocate(17 * MIB - 512)
    assert gpu.reserved == 20 * MIB
    gpu.allocate(3 * MIB // 2)  # 512 bytes are left of the page
    assert gpu.reserved == 40 * MIB
    gpu.free(a)
    gpu.allocate(3 * MIB - 512)
    assert (gpu.reserved, gpu.allocated) == (40 * MIB, 3 * MIB - 512 + 17 * MIB - 512 + 3 * MIB // 2)
    gpu.allocate(100)
    assert gpu.reserved == 42 * MIB  # the small pool has pages of 2 MiB


def test_a_full_device_gets_back_what_is_wholly_free():
    gpu = CachingAllocator(capacity=64 * MIB)
    kept, gone = gpu.allocate(30 * MIB), gpu.allocate(30 * MIB)
    gpu.free(gone)
    gpu.allocate(34 * MIB)  # 30 + 34 fit when the free 30 go back
    assert gpu.reserved == 64 * MIB
    with pytest.raises(OutOfMemoryError):
        gpu.allocate(512)
    gpu.free(kept)
    gpu.allocate(MIB)
    assert gpu.reserved == 36 * MIB


def test_an_emptied_cache_keeps_segments_in_use():
    gpu = CachingAllocator()
    a, _ = gpu.allocate(5 * MIB), gpu.allocate(5 * MIB)
    gpu.free(a)
    gpu.free(gpu.allocate(50 * MIB))
    gpu.empty_cache()
    assert gpu.reserved == 20 * MIB


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_of_any_sequence(seed, expandable):
    """Blocks never overlap, nothing is lost, and reserved is at least what live tensors take."""
    rng = random.Random(seed)
    gpu = CachingAllocator(expandable_segments=expandable)
    live = []
    for _ in range(400):
        if live and rng.random() < 0.45:
            gpu.free(live.pop(rng.randrange(len(live))))
        else:
            n = int(2 ** rng.uniform(4, 26))
            block = gpu.allocate(n)
            assert block.size >= n
            assert block.size - rounded(n) <= (0 if block.small or expandable else MIB)
            live.append(block)
        spans = sorted((b.address, b.size) for b in live)
        assert all(x + n <= y for (x, n), (y, _) in itertools.pairwise(spans))
        assert gpu.allocated == sum(b.size for b in live) <= gpu.reserved <= gpu.peak_reserved
    for block in live:
        gpu.free(block)
    assert gpu.allocated == 0
    gpu.empty_cache()
    assert gpu.reserved == 0
