"""Puts this folder's helper module within reach of its tests, which pytest imports by path; what commands load."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def loaded() -> None:
    """The slow libraries, loaded once here for the commands that tests fork from this process."""
    import sklearn.datasets  # noqa: F401
    import torchvision.transforms.functional  # noqa: F401
    from torch._subclasses import FakeTensorMode  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForImageClassification,
        BertForSequenceClassification,
        GPT2LMHeadModel,
        ViTForImageClassification,
    )
