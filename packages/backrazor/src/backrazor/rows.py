"""How a tensor is cut into groups of rows for the low-bit packing (:mod:`.lowbit`): fixed by its shape."""

from dataclasses import dataclass

GROUP = 64
"""Rows of a group, about: a sample is cut into equal parts. Its two ends take 32 bits, half a bit an element."""
SHORTEST = 16
"""Fewer rows than this are no group."""
LEAST, MOST = 2, 8
"""Bits of a code."""


@dataclass(frozen=True)
class Rows:
    """How memory is cut: ``blocks`` of ``rows`` × ``columns``, in groups of ``group`` rows of one column."""

    blocks: int
    rows: int
    columns: int
    group: int
    width: int

    @property
    def groups(self) -> int:
        """Groups of a block's column; the last may be short."""
        return -(-self.rows // self.group)

    @property
    def elements(self) -> int:
        return self.blocks * self.rows * self.columns


def rows_of(shape: tuple[int, ...], channels: set[int], width: int) -> Rows | None:
    """The cut of a tensor of ``shape``, in the order of its memory; None where no channel has enough rows.

    Args:
        shape: sizes from the outermost dimension in memory to the innermost.
        channels: dimensions whose indices are different channels.
        width: bits of a code.
    """
    last = len(shape)
    columns = 1
    while last and last - 1 in channels:  # channels that stand side by side
        last -= 1
        columns *= shape[last]
    rows = 1
    while last and last - 1 not in channels and (last > 1 or rows < GROUP):  # a sample, or several short ones
        last -= 1
        rows *= shape[last]
    if rows < SHORTEST:
        return None
    blocks = 1
    for size in shape[:last]:
        blocks *= size
    parts = max(1, (rows + GROUP // 2) // GROUP)
    return Rows(blocks, rows, columns, -(-rows // parts), width)
