"""Bits of a code for each kind of tensor in the mode "low-bit": what ``keep``, the dial, means."""

LEAST, MOST = 2, 8
LOWEST = 0.09
"""Below this ``keep`` codes of 2 bits would lose a deep transformer's gradient: instead, what a block computes is
recomputed from its norms."""

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

    Below ``LOWEST`` a layer norm's x̂, from which the rest is recomputed, has four times 32 · keep; and what of Q, K and
    V cannot be recomputed, since a rotary embedding stands between, has the bits of keep = 0.1.
    """
    if kind == "norm" and keep < LOWEST:
        return int(min(max(4 * 32 * keep, LEAST), MOST))
    if kind in ("query", "key", "value") and keep < LOWEST:
        keep = 0.1
    return int(min(max(32 * keep + EXTRA[kind], LEAST), MOST))
