"""How a tensor is cut into spans and groups: fixed by its shape, the same on every device.

A tensor is read in the order of its memory and cut into spans: one sample each (an index of the outermost dimension),
or several samples where one is short. A span of ``size`` elements is a matrix of n rows and m = ceil(size / n)
columns, each column one group.
"""

from dataclasses import dataclass

from .groups import Groups

SHORTEST_SPAN = 1 << 14


@dataclass(frozen=True)
class Layout:
    """``spans`` spans of ``size`` elements, ``groups`` of each kept in a format of :mod:`.values`."""

    spans: int
    size: int
    groups: Groups
    values: str

    @property
    def columns(self) -> int:
        return -(-self.size // self.groups.n)

    @property
    def kept(self) -> int:
        """Values a span keeps."""
        return self.groups.k * self.columns


def layout_of(samples: int, sample_size: int, groups: Groups, values: str) -> Layout:
    """Spans of one sample, or of the least number of samples that divides the batch and is long enough."""
    merged = 1
    while merged < samples and (merged * sample_size < SHORTEST_SPAN or samples % merged):
        merged += 1
    return Layout(samples // merged, merged * sample_size, groups, values)
