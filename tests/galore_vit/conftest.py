"""Puts this folder's helper module within reach of its tests, which pytest imports by path."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def plain_bfloat16() -> Iterator[None]:
    """Without oneDNN, whose bfloat16 products end the process on processors that announce AMX and lack it."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield
