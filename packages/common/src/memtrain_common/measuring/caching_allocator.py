"""CUDA's caching allocator without CUDA: what PyTorch would reserve for a sequence of allocations. No torch here.

PyTorch asks the driver for segments and cuts tensors out of them, so that what it holds (*reserved*) is more than what
tensors hold (*allocated*). The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` for one stream and default
settings:

- a size is rounded up to 512 bytes;
- up to 1 MiB it comes from the small pool, whose segments have 2 MiB; from the large pool a size below 10 MiB gets a
  segment of 20 MiB, any other one of its own size, rounded up to 2 MiB;
- of the free blocks that suffice, the smallest is taken, of several the one with the lowest address;
- it is split if what remains is at least 512 bytes (small), or more than 1 MiB (large);
- a freed block grows together with free neighbours of its segment, and stays reserved;
- where the device is full, segments that are wholly free go back to it.

With ``expandable_segments`` each pool has one range of addresses, which memory is mapped into as it is needed, in pages
of 2 MiB (small) or 20 MiB (large); every block is split down to 512 bytes.

Compared with sequences worked out by hand (``tests/common/test_caching_allocator.py``). Not compared with a GPU.
"""

import bisect
from dataclasses import dataclass, field

MIB = 2**20
LEAST_BLOCK = 512
SMALL = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
LEAST_OWN_SEGMENT = 10 * MIB
OWN_SEGMENT_UNIT = 2 * MIB


class OutOfMemoryError(Exception):
    """The device has no room for an allocation, although all that is cached went back to it."""


@dataclass(eq=False)
class Block:
    """A piece of a segment."""

    small: bool
    address: int
    size: int
    used: bool = False
    mapped: bool = True
    """False of the rest of an expandable segment's addresses, which have no memory."""
    before: "Block | None" = None
    after: "Block | None" = None
    expandable: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """By which the best fit is found."""
        return self.size, self.address


@dataclass
class Pool:
    """Free blocks of one kind, by size and address."""

    small: bool
    free: list[Block] = field(default_factory=list)
    tail: Block | None = None
    """The unmapped rest of the expandable segment."""

    def add(self, block: Block) -> None:
        bisect.insort(self.free, block, key=lambda b: b.key)

    def remove(self, block: Block) -> None:
        del self.free[bisect.bisect_left(self.free, block.key, key=lambda b: b.key)]

    @property
    def page(self) -> int:
        return SMALL_SEGMENT if self.small else LARGE_SEGMENT


class CachingAllocator:
    """One device's memory.

    Args:
        expandable_segments: as ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``.
        capacity: bytes of the device; None has no end.
    """

    def __init__(self, *, expandable_segments: bool = False, capacity: int | None = None) -> None:
        self.expandable, self.capacity = expandable_segments, capacity
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._pools = {small: Pool(small) for small in (True, False)}
        self._next_address = 0

    def allocate(self, n_bytes: int) -> Block:
        """Memory for a tensor.

        Raises:
            OutOfMemoryError: beyond the capacity.
        """
        size = rounded(n_bytes)
        pool = self._pools[size <= SMALL]
        block = self._best_fit(pool, size) or self._new(pool, size)
        if self._splits(block, size):
            self._split(pool, block, size)
        block.used = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Give a tensor's memory back to the cache."""
        assert block.used
        block.used = False
        self.allocated -= block.size
        self._pools[block.small].add(self._grown(block))

    def restart(self) -> None:
        """Forget the peaks so far."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def empty_cache(self) -> None:
        """Give every segment that is wholly free back to the device; of expandable ones, whole pages."""
        for pool in self._pools.values():
            for block in [b for b in pool.free if not b.expandable and b.before is None and b.after is None]:
                pool.remove(block)
                self.reserved -= block.size
            for block in [b for b in pool.free if b.expandable]:
                self._unmap(pool, block)

    # -- finding ---------------------------------------------------------------------------------------------------

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        at = bisect.bisect_left(pool.free, (size, 0), key=lambda b: b.key)
        if at == len(pool.free):
            return None
        # the last free block before unmapped addresses counts as large as it may become: it is the last choice
        while self.expandable and _at_the_end(pool.free[at]) and at + 1 < len(pool.free):
            at += 1
        block = pool.free[at]
        pool.remove(block)
        return block

    def _new(self, pool: Pool, size: int) -> Block:
        if self.expandable:
            return self._map(pool, size)
        n_bytes = segment_size(size)
        self._reserve(n_bytes)
        block = Block(pool.small, self._next_address, n_bytes)
        self._next_address += n_bytes
        return block

    def _reserve(self, n_bytes: int) -> None:
        if self.capacity is not None and self.reserved + n_bytes > self.capacity:
            self.empty_cache()
            if self.reserved + n_bytes > self.capacity:
                raise OutOfMemoryError(f"{n_bytes:,} bytes more than {self.reserved:,} of {self.capacity:,}")
        self.reserved += n_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    # -- splitting and growing together ----------------------------------------------------------------------------

    def _splits(self, block: Block, size: int) -> bool:
        rest = block.size - size
        return rest >= LEAST_BLOCK if block.small or block.expandable else rest > SMALL

    def _split(self, pool: Pool, block: Block, size: int) -> None:
        rest = Block(
            block.small, block.address + size, block.size - size, before=block, after=block.after,
            expandable=block.expandable,
        )  # fmt: skip
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        pool.add(rest)

    def _grown(self, block: Block) -> Block:
        """The block with its free neighbours, which leave the pool."""
        pool = self._pools[block.small]
        for other in (block.before, block.after):
            if other is None or other.used or not other.mapped:
                continue
            pool.remove(other)
            first, second = (other, block) if other is block.before else (block, other)
            first.size += second.size
            first.after = second.after
            if second.after is not None:
                second.after.before = first
            block = first
        return block

    # -- expandable segments ---------------------------------------------------------------------------------------

    def _map(self, pool: Pool, size: int) -> Block:
        """Memory at the end of what is mapped: together with a free block there."""
        if pool.tail is None:
            start = 0 if pool.small else 2**40 * pool.page
            pool.tail = Block(pool.small, start, 2**39 * pool.page, mapped=False, expandable=True)
        last = pool.tail.before
        free = last.size if last is not None and not last.used and last.mapped else 0
        n_bytes = -(-(size - free) // pool.page) * pool.page
        self._reserve(n_bytes)
        tail = pool.tail
        last = tail.before  # a full device may have taken its pages
        block = Block(pool.small, tail.address, n_bytes, before=last, after=tail, expandable=True)
        if last is not None:
            last.after = block
        tail.before, tail.address, tail.size = block, tail.address + n_bytes, tail.size - n_bytes
        block = self._grown(block)
        if block.size < size:
            pool.add(block)
            return self._map(pool, size)
        return block

    def _unmap(self, pool: Pool, block: Block) -> None:
        """Give back the pages that lie wholly in the last free block; in the middle they stay here, which reserves a
        little more than PyTorch would."""
        if not _at_the_end(block):
            return
        assert pool.tail is not None
        start = -(-block.address // pool.page) * pool.page
        n_bytes = block.address + block.size - start
        if n_bytes <= 0:
            return
        pool.remove(block)
        block.size -= n_bytes
        self.reserved -= n_bytes
        tail = pool.tail
        tail.address, tail.size = start, tail.size + n_bytes
        if block.size:
            pool.add(block)
        else:
            tail.before = block.before
            if block.before is not None:
                block.before.after = tail


def rounded(n_bytes: int) -> int:
    """Bytes that a tensor takes: a multiple of 512, at least one."""
    return max(1, -(-n_bytes // LEAST_BLOCK)) * LEAST_BLOCK


def segment_size(size: int) -> int:
    """Bytes that are asked of the driver for a rounded size, where no free block suffices."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < LEAST_OWN_SEGMENT:
        return LARGE_SEGMENT
    return -(-size // OWN_SEGMENT_UNIT) * OWN_SEGMENT_UNIT


def _at_the_end(block: Block) -> bool:
    return block.after is not None and not block.after.mapped
