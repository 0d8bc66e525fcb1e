"""Fixtures for every package's tests."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of commands that tests start: tiny models run faster on one thread
# Some virtual machines announce AMX and then do not run it: bfloat16 products would end the process. The processor
# reads this at its first product, so it stands before torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import matplotlib.figure  # noqa: F401  # loaded here once, for the commands that tests fork from this process
import pytest
import torch
import torch._dynamo  # every optimizer loads it at its first use
import tqdm

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # its thread may hold a lock at the moment of a fork, which the child then waits for


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data files that MEMTRAIN_DATA names."""
    folder = os.environ.get("MEMTRAIN_DATA")
    if not folder:
        pytest.skip("MEMTRAIN_DATA is not set: it names the folder with real data files")
    return Path(folder)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
