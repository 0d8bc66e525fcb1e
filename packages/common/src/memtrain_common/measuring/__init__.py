"""Measurements of a run: memory (measured and predicted), energy, timing; and their pictures."""
