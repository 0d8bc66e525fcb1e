"""Bits of a code for each kind of tensor in the mode "low-bit": what ``keep``, the dial, means."""

LEAST, MOST = 2, 8
LOWEST = 1 / 16
"""The ``keep`` at which every code has its least bits. Below it, what a block computes is recomputed from its norms."""

EXTRA = {
    "norm": 0.0,
    "batch norm": 0.85,
    "query": 0.8,
    "key": 1.3,
    "value": 0.8,
    "activation": 0.2,
    "input": -0.2,
}
"""Bits above 32 · keep, before rounding down."""


def width_of(kind: str, keep: float) -> int:
    """Bits of a code: 32 · keep and what the kind needs beyond, a whole number from 2 to 8.

    Below ``LOWEST`` a layer norm's x̂, from which the rest is recomputed, has four times 32 · keep.
    """
    if kind == "norm" and keep < LOWEST:
        return int(min(max(4 * 32 * keep, LEAST), MOST))
    return int(min(max(32 * keep + EXTRA[kind], LEAST), MOST))
