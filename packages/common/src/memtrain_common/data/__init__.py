"""Data sets and their batches: pure functions of (seed, step)."""
