"""Learning rates of the studies on real models: a search that ends where the best has been surrounded.

The first grid of a way of training is stated in ``real_study.py``, with a head at 1e-3. After it, the best rate found
so far must have a greater and a smaller one beside it: the grid goes on by 1, 3, 10, 30, … Where the head has a rate of
its own, the best pair must also have a head ten times faster and one ten times slower beside it, at the same rate; and
of the three best pairs two more seeds decide, since a pair that serves one seed may fail another.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

HEAD_RATE = 1e-3
"""Of a fresh head beside something else that is trained, unless a search finds another."""


FINALISTS = 3
"""So many pairs are compared by so many seeds."""


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of what is trained and of a fresh head beside it."""

    rate: float
    head: float = HEAD_RATE

    def __str__(self) -> str:
        return str(self.rate) if self.head == HEAD_RATE else f"{self.rate}, head {self.head}"

    @classmethod
    def read(cls, written: str) -> "Rates":
        """From ``str`` of one."""
        rate, _, head = written.partition(", head ")
        return cls(float(rate), float(head or HEAD_RATE))

    def written(self) -> dict[str, float]:
        """As a result has them; the head's only where it is not 1e-3."""
        return {"learning_rate": self.rate} | ({} if self.head == HEAD_RATE else {"head_learning_rate": self.head})


def search(
    first: Iterable[float], tried: dict[Rates, float], score: Callable[[Rates], float], heads: bool, least: bool
) -> Rates:
    """The best rates, with all that is missing of ``tried`` scored and added to it. Of equal scores, the first tried.

    Args:
        first: the grid that is stated beforehand, with the head at 1e-3.
        heads: whether the head's rate is searched too.
        least: whether less is better.
    """
    asked = [Rates(rate) for rate in first]
    while True:
        for rates in asked:
            if rates not in tried:
                tried[rates] = score(rates)
        best = best_of(tried, least)
        asked = beyond(best, list(tried), heads)
        if not asked:
            return best


def confirmed(
    tried: dict[Rates, float], further: dict[Rates, list[float]], score: Callable[[Rates, int], float], least: bool
) -> Rates:
    """Of the best pairs that were tried the one with the best mean over seeds.

    Args:
        further: scores of further seeds; what is missing of them is scored and added.
        score: of rates by a further seed, 1, 2, …
    """
    finalists = sorted(tried, key=lambda rates: tried[rates], reverse=not least)[:FINALISTS]
    for rates in finalists:
        scores = further.setdefault(rates, [])
        while len(scores) < FINALISTS - 1:
            scores.append(score(rates, len(scores) + 1))
    return best_of({rates: (tried[rates] + sum(further[rates])) / FINALISTS for rates in finalists}, least)


def best_of(tried: dict[Rates, float], least: bool) -> Rates:
    return (min if least else max)(tried, key=lambda rates: tried[rates])


def beyond(best: Rates, tried: list[Rates], heads: bool) -> list[Rates]:
    """What must still be tried around the best; nothing if it is surrounded.

    Args:
        heads: whether the head's rate is searched too.
    """
    rates = _missing(best.rate, [t.rate for t in tried if t.head == best.head], (1, 3))
    of_head = _missing(best.head, [t.head for t in tried if t.rate == best.rate], (1,)) if heads else []
    return [Rates(rate, best.head) for rate in rates] + [Rates(best.rate, head) for head in of_head]


def _missing(best: float, tried: list[float], digits: tuple[int, ...]) -> list[float]:
    """The next of ``digits`` times a power of ten on each side where nothing was tried yet."""
    ladder = [float(f"{digit}e{power}") for power in range(-9, 3) for digit in digits]
    above = [] if max(tried) > best else [next(value for value in ladder if value > best)]
    below = [] if min(tried) < best else [next(value for value in reversed(ladder) if value < best)]
    return above + below
