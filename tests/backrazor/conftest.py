"""Puts this folder's helper module within reach of its tests, which pytest imports by path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
