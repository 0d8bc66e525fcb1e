"""The folder of real data files that some benchmarks need."""

import os
from pathlib import Path

from memtrain_common.errors import UserError


def data() -> Path:
    """The folder that MEMTRAIN_DATA names.

    Raises:
        UserError: if it names none.
    """
    folder = Path(os.environ.get("MEMTRAIN_DATA", ""))
    if not os.environ.get("MEMTRAIN_DATA") or not folder.is_dir():
        raise UserError("the environment variable MEMTRAIN_DATA must name the folder of real data files")
    return folder
