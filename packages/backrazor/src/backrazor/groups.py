"""Which elements are kept: exactly k of every group of n, for a fraction ``keep``, and how their places are written.

The elements of one group stand m apart in memory (m columns, n rows), so that a group's maximum is a maximum over
contiguous rows. The k places of a group are one number, their rank among the C(n, k) subsets (combinatorial number
system):

    rank = C(p_1, 1) + C(p_2, 2) + … + C(p_k, k)        p_1 < p_2 < … < p_k

which takes ceil(log2 C(n, k)) bits: at most a bitmask's n, and fewer than k offsets of ceil(log2 n) bits.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SUBSETS = 1 << 16  # ranks have at most 16 bits, and the table of subsets stays in a processor's cache
MOST_ROWS = 1 << 16


@dataclass(frozen=True)
class Groups:
    """Keep the k largest of every n."""

    k: int
    n: int

    @property
    def rank_bits(self) -> int:
        return max(1, (math.comb(self.n, self.k) - 1).bit_length())

    @property
    def place_bits(self) -> int:
        """Bits of one place within a group; the selection keys hold it in their lowest bits."""
        return max(1, (self.n - 1).bit_length())

    def stored_bits(self, value_bits: float) -> float:
        """Bits an element of the tensor takes: k values and one rank for every n elements."""
        return (self.k * value_bits + self.rank_bits) / self.n

    def shannon_bits(self, value_bits: float) -> float:
        """The limit for any k/n of the elements, chosen freely: H(k/n) + (k/n) · value bits."""
        p = self.k / self.n
        entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
        return entropy + p * value_bits


@functools.cache
def groups_for(keep: float) -> Groups | None:
    """The largest group whose k/n is within 1 % of ``keep`` (or as near as any) and whose ranks fit 16 bits.

    None where the nearest fraction is 1: everything is kept.
    """
    best: tuple[tuple[float, int], Groups | None] = ((abs(1 - keep) / keep, 0), None)
    for k in range(1, 65):
        for n in {math.floor(k / keep), math.ceil(k / keep)}:
            if k < n <= MOST_ROWS and math.comb(n, k) <= MOST_SUBSETS:
                distance = abs(k / n - keep) / keep
                badness = (distance if distance > 0.01 else 0.0, -n)
                if badness < best[0]:
                    best = (badness, Groups(k, n))
    return best[1]


@functools.cache
def binomials(n: int, k: int, device: torch.device) -> Tensor:
    """C(p, j) for j = 1 … k: int32 (k, n). A j-th place is at most n − k + j − 1; larger ones are never looked up."""
    rows = [[min(math.comb(p, j), MOST_SUBSETS) for p in range(n)] for j in range(1, k + 1)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@functools.cache
def _subsets(n: int, k: int, device: torch.device) -> Tensor:
    """The places of every rank: int64 (k, C(n, k))."""
    colex = sorted(itertools.combinations(range(n), k), key=lambda c: c[::-1])
    return torch.tensor(colex, dtype=torch.int64, device=device).T.contiguous()


@functools.cache
def short_subsets(groups: Groups) -> Tensor:
    """The same table in uint16, for the CPU's kernels."""
    return _subsets(groups.n, groups.k, torch.device("cpu")).to(torch.uint16)


def rank(places: list[Tensor], groups: Groups) -> Tensor:
    """Ranks of subsets: k tensors of places in rising order, each int32 (...), to int32 (...)."""
    out = places[0]
    for j in range(1, groups.k):
        column = binomials(groups.n, groups.k, out.device)[j]
        out = out + column.index_select(0, places[j].reshape(-1)).view_as(out)
    return out


def unrank(ranks: Tensor, groups: Groups) -> Tensor:
    """Places of subsets: int32 (...) to int64 (k, ...)."""
    table = _subsets(groups.n, groups.k, ranks.device)
    out = torch.empty((groups.k, *ranks.shape), dtype=torch.int64, device=ranks.device)
    flat = ranks.reshape(-1)
    for row, places in zip(table, out.view(groups.k, -1), strict=True):
        torch.index_select(row, 0, flat, out=places)
    return out
